"""From what a worker's thread tells to what a task of an event loop reads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Sequence

from starlette.types import Receive

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Token
from medmoe_jax.inference.streaming import NewText
from medmoe_jax.inference.worker import Ask, Closed, Full, TimeLimit, Told
from medmoe_jax.serving.asked import Asked, Text
from medmoe_jax.serving.models import PreparedPrompt, Served
from medmoe_jax.serving.refusals import Refused, broken, busy, closing, late
from medmoe_jax.serving.told import News


class HungUp(Exception):
    """The client is gone: nobody reads the answer."""


class Answers:
    """All answers to one request, as they come.

    To be used as an async context manager, which frees the places of the requests at its end,
    whatever that is, and iterated over: it gives `News`, or raises Refused, or HungUp.
    """

    def __init__(
        self,
        served: Served,
        asked: Asked,
        prompts: Sequence[PreparedPrompt],
        scored: Sequence[Sequence[Token]],
        limit: float,
        until: float,
    ) -> None:
        """Take a place for every answer.

        Args:
          served: the model.
          asked: what is asked of it.
          prompts: as ids, with their requests.
          scored: where the prompts are to be told, too: their tokens, with `asked.log_probs`.
          limit: the seconds that a request may take, for messages.
          until: the time, by the monotonic clock, at which it has taken long enough.

        Raises:
          Refused: there are not as many places, or the server ends.
        """
        self._served, self._asked, self._limit = served, asked, limit
        self._inbox: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._readers = [reader for prompt in prompts for reader in prompt.readers]
        self._ready: deque[News] = deque()
        if isinstance(asked, Text) and asked.echo:
            self._ready.extend(_echoes(asked, prompts, scored))
        requests = [request for prompt in prompts for request in prompt.requests]
        self._held: list[list[Token]] = [[] for _ in requests]  # told with their text
        self._left, self._gone = set(range(len(requests))), False
        loop = asyncio.get_running_loop()
        self._asks = self._ask(
            [(r, functools.partial(self._tell, loop, n)) for n, r in enumerate(requests)],
            until - time.monotonic(),
        )

    def _ask(self, requests: Sequence, seconds: float) -> list[Ask]:
        worker = self._served.worker
        try:
            return worker.ask(requests, seconds)
        except (Full, Closed) as error:
            raise _refusal(error, self._limit, worker.places) from error

    def _tell(self, loop: asyncio.AbstractEventLoop, number: int, told: Told) -> None:
        """Called by the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._inbox.put_nowait, (number, told))

    def watch(self, receive: Receive) -> Answers:
        """The same, which also sees that the client hangs up; `receive` is that of its request."""
        self._watch = asyncio.ensure_future(self._hang_up(receive))
        return self

    async def _hang_up(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._inbox.put_nowait((-1, HungUp()))  # for one who waits

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._watch.cancel()
        for ask in self._asks:
            self._served.worker.cancel(ask)

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> News:
        while not self._ready:
            if not self._left:
                raise StopAsyncIteration
            told = [await self._inbox.get()]
            while not self._inbox.empty():
                told.append(self._inbox.get_nowait())
            if self._gone:
                raise HungUp
            self._read(told)
        return self._ready.popleft()

    def _read(self, told: Sequence[tuple[int, Told]]) -> None:
        """Make news of all that has come since the last time."""
        tokens: dict[int, list[Token]] = {}
        ended: dict[int, str] = {}
        for number, one in told:
            if isinstance(one, BaseException):
                raise _refusal(one, self._limit, self._served.worker.places) from one
            tokens.setdefault(number, []).extend(one.tokens)
            ended[number] = one.ended
        for number in tokens.keys() & self._left:
            self._read_one(number, tokens[number], ended[number])

    def _read_one(self, number: int, tokens: Sequence[Token], ended: str) -> None:
        reader, held = self._readers[number], self._held[number]
        taken = reader.taken
        said = reader.add([token.id for token in tokens], ended)
        held += tokens[: reader.taken - taken]
        if reader.ended:
            self._left.discard(number)
            self._served.worker.cancel(self._asks[number])  # where a stop's text has ended it
        if said != NewText() or reader.ended:
            self._ready.append(News(number, said, tuple(held), reader.ended, len(held)))
            held.clear()


def _echoes(asked: Text, prompts: Sequence[PreparedPrompt], scored: Sequence[Sequence[Token]]):
    """The prompts as the beginning of each of their answers, or all of it."""
    ended = "" if asked.max_tokens else "length"
    for number, prompt in enumerate(prompts):
        tokens: Sequence[Token] = ()
        if asked.log_probs:
            # Nothing comes before the first token that it could be likely after.
            tokens = (Token(prompt.ids[0], math.nan), *scored[number][1:])
        for n in range(asked.n):
            yield News(number * asked.n + n, NewText(prompt.text), tokens, ended)


def _refusal(error: BaseException, seconds: float, places: int) -> Refused:
    """What a client is told of it. Whatever is not known is a fault of the server."""
    if isinstance(error, Full):
        return busy(places)
    if isinstance(error, TimeLimit):
        return late(seconds)
    if isinstance(error, Closed):
        return closing() if error.__cause__ is None else broken()
    return Refused(str(error)) if isinstance(error, UserError) else broken()
