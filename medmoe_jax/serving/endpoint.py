"""An address that answers: from a request to its whole answer, or to a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Token
from medmoe_jax.inference.streaming import NewText
from medmoe_jax.kinds import whole_number
from medmoe_jax.serving.answering import Answers, HungUp
from medmoe_jax.serving.asked import Asked, Text
from medmoe_jax.serving.metrics import Metrics
from medmoe_jax.serving.models import PreparedPrompt, Served
from medmoe_jax.serving.offsets import TextOffsets
from medmoe_jax.serving.refusals import Refused, busy, late
from medmoe_jax.serving.told import AnswerForm, Envelope, News, Usage

_GONE = 499  # nginx's number for a client that has hung up


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
      seconds: from its arrival to the end of its answer.
      body: bytes of the request.
    """

    seconds: float = 600.0
    body: int = 16 << 20


class Endpoint:
    """Answers the requests of one form."""

    def __init__(
        self,
        parse: Callable[[bytes], Asked],
        form: AnswerForm,
        models: Mapping[str, Served],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        """
        Args:
          parse: reads a request.
          form: writes answers.
          models: that can be asked, by name.
          limits: of each request.
          metrics: that count.
        """
        self._parse, self._form = parse, form
        self._models, self._limits, self._metrics = models, limits, metrics

    async def __call__(self, request: Request) -> Response:
        """The answer; Refused where there is none."""
        limit = self._limits.seconds
        until = time.monotonic() + limit
        count = self._metrics.requests.labels
        name = ""
        try:
            asked = self._parse(await self._body(request))
            served = find(self._models, asked.model)
            name = served.name
            prompts = await anyio.to_thread.run_sync(_prepare, served, asked)
            scored = await _score(served, asked, prompts, limit, until)
            answers = Answers(served, asked, prompts, scored, limit, until).watch(request.receive)
            telling = Telling(self._form, served, asked, prompts, self._metrics)
            response = await telling.response(answers)
        except Refused as error:
            count(name, error.status).inc()
            raise
        except (ClientDisconnect, HungUp):
            response = Response(status_code=_GONE)
        if not isinstance(response, EventStream):  # which counts its own end
            count(name, response.status_code).inc()
        return response

    async def _body(self, request: Request) -> bytes:
        """What was sent. Raises Refused where it is too large, too slow or no JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no page in a browser can send without being asked
            raise Refused(f"content-type: must be application/json, not '{kind}'", 415)
        limit, body = self._limits.body, bytearray()
        too_large = Refused(f"the request has more than {limit:,} bytes, the most taken", 413)
        declared = whole_number(request.headers.get("content-length", ""))
        if declared is not None and declared > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refused("the request came too slowly", 408, code="timeout") from None
        return bytes(body)


def find(models: Mapping[str, Served], name: str) -> Served:
    """A model by its name. Raises Refused."""
    if name not in models:
        known = ", ".join(models)
        raise Refused(
            f"model: there is no '{name}'; known: {known}", 404, "model", "model_not_found"
        )
    return models[name]


def _prepare(served: Served, asked: Asked) -> list[PreparedPrompt]:
    try:
        return served.prepare(asked)
    except UserError as error:
        raise Refused(str(error)) from error


async def _score(
    served: Served, asked: Asked, prompts: Sequence[PreparedPrompt], limit: float, until: float
) -> Sequence[Sequence[Token]]:
    """The tokens of prompts that are to be told with their log-probabilities, read until then."""
    if not (isinstance(asked, Text) and asked.echo and asked.log_probs):
        return ()
    if served.scoring.statistics().tasks_waiting >= served.worker.places:
        raise busy(served.worker.places)
    ids = [list(prompt.ids) for prompt in prompts]
    languages = [prompt.language for prompt in prompts]
    told = functools.partial(served.model.engine.told, ids, asked.alternatives, languages)
    try:
        async with asyncio.timeout(until - time.monotonic()):
            return await anyio.to_thread.run_sync(
                told, limiter=served.scoring, abandon_on_cancel=True
            )
    except TimeoutError:
        raise late(limit) from None


class Telling:
    """Writes the answers to one request."""

    def __init__(
        self,
        form: AnswerForm,
        served: Served,
        asked: Asked,
        prompts: Sequence[PreparedPrompt],
        metrics: Metrics,
    ) -> None:
        self._form, self._served, self._asked, self._metrics = form, served, asked, metrics
        self._envelope = Envelope(form, served.name)
        self.usage = Usage(sum(len(prompt.ids) for prompt in prompts))
        self._began = time.monotonic()
        self._offsets = [
            _offsets(served, asked, number, prompt)
            for number, prompt in enumerate(prompts)
            for _ in range(asked.n)
        ]
        metrics.prompt_tokens.labels(served.name).inc(self.usage.prompt)

    async def response(self, answers: Answers) -> Response:
        """The whole answer, or what streams it."""
        if self._asked.stream:
            return EventStream(self, answers)
        gathered: dict[int, list[News]] = {number: [] for number in range(len(self._offsets))}
        async with answers:
            async for news in answers:
                self._count(news)
                gathered[news.index].append(news)
        self._end()
        choices = [self._form.choice(*self._told(_joined(all_))) for all_ in gathered.values()]
        return JSONResponse(self._envelope.whole(choices, self.usage))

    async def events(self, answers: Answers) -> Any:
        """Yields the chunks of the answer as JSON values."""
        begun: set[int] = set()
        async for news in answers:
            self._count(news)
            delta = self._form.delta(*self._told(news), news.index not in begun)
            begun.add(news.index)
            yield self._envelope.chunk([delta])
        self._end()
        if self._asked.usage:
            yield self._envelope.chunk([], self.usage)

    def count_end(self, status: int) -> None:
        """Count the request, by how a stream of its answer has ended."""
        self._metrics.requests.labels(self._served.name, status).inc()

    def _told(self, news: News) -> tuple[News, dict[str, Any] | None]:
        """News with its log-probabilities, where they are asked for."""
        if not self._asked.log_probs:
            return news, None
        tokenizer = self._served.model.encoder.tokenizer
        places = self._offsets[news.index].add([token.id for token in news.tokens])
        return news, self._form.log_probs(tokenizer, news.tokens, places)

    def _count(self, news: News) -> None:
        name = self._served.name
        if not self.usage.said and news.said_tokens:
            seconds = time.monotonic() - self._began
            self._metrics.first_seconds.labels(name).observe(seconds)
        self.usage.said += news.said_tokens
        self._metrics.said_tokens.labels(name).inc(news.said_tokens)

    def _end(self) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.seconds.labels(self._served.name).observe(seconds)


def _offsets(served: Served, asked: Asked, number: int, prompt: PreparedPrompt) -> TextOffsets:
    """What tells the places of tokens of an answer to the prompt of this number."""
    written = isinstance(asked, Text) and isinstance(asked.prompts[number], str)
    echo = isinstance(asked, Text) and asked.echo and asked.log_probs
    return TextOffsets(served.model.encoder.tokenizer, prompt.ids, prompt.text, written, echo)


def _joined(parts: Sequence[News]) -> News:
    """All news of an answer as one."""
    said = NewText(
        "".join(news.said.content for news in parts),
        "".join(news.said.reasoning for news in parts),
    )
    tokens = tuple(token for news in parts for token in news.tokens)
    return News(parts[0].index, said, tokens, parts[-1].ended)


class EventStream(Response):
    """Server-sent events, each of them JSON; the last one says that they are all."""

    def __init__(self, telling: Telling, answers: Answers) -> None:
        super().__init__(headers={"cache-control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._telling, self._answers = telling, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the places of the answers are freed whatever happens."""

        async def tell(text: str) -> None:
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async with self._answers as answers:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            ended, last = 200, "[DONE]"
            try:
                async for chunk in self._telling.events(answers):
                    await tell(json.dumps(chunk, ensure_ascii=False, allow_nan=False))
            except Refused as error:
                ended, last = error.status, json.dumps(error.content, ensure_ascii=False)
            except (HungUp, OSError):
                ended = _GONE
            self._telling.count_end(ended)
            if ended == _GONE:
                return
            with contextlib.suppress(OSError):  # all was told
                await tell(last)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
