"""A conversation with a model: it remembers what was said, and answers as the tokens come."""

from __future__ import annotations

import dataclasses
import queue
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Self

from medmoe_jax import interrupts
from medmoe_jax.data.conversation import Turn, check_text
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.inference.streaming import NewText
from medmoe_jax.inference.worker import Told, Worker
from medmoe_jax.ranges import COUNT


class Answered(NamedTuple):
    """The last answer: ids, the expert of its language, and who gave it."""

    prompt: tuple[int, ...]
    ids: list[int]
    language: int
    engine: Engine


def check_room(max_tokens: int, context: int) -> None:
    """Raise ParameterError for an answer that leaves no room for a question in the context."""
    COUNT.check_whole("max_tokens", max_tokens)
    if max_tokens >= context:
        raise ParameterError(
            f"max_tokens: {max_tokens} leave no room for a question in a context of {context} "
            "tokens"
        )


def _check(text: object, where: str) -> None:
    """Raise UserError, beginning with `where`, for what is no text."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {text!r} is no text")
    check_text(text, where)


class Chat:
    """A conversation. As a context manager it ends its thread, in which the decoder is, at the end.

    One that is not closed ends it when nothing refers to the conversation any more.

    Attributes:
      turns: what was said so far, the system's text aside.
      system: what the model is told first, or "".
    """

    _worker: Worker | None = None  # of the class too, for one that could not be made

    def __init__(
        self, model: LanguageModel, sampling: Sampling, max_tokens: int, system: str = ""
    ) -> None:
        """
        Args:
          model: who answers.
          sampling: how tokens are drawn; each answer draws from a stream of its own.
          max_tokens: of an answer.
          system: see above.

        Raises:
          UserError: an answer leaves no room for a prompt, or the template takes no such system
            text.
        """
        check_room(max_tokens, model.context)
        self._model, self._sampling, self._max_tokens = model, sampling, max_tokens
        self.turns: list[Turn] = []
        self.system = ""
        self._last: Answered | None = None
        self._remarks: list[str] = []
        self.tell(system)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """End the decoder's thread; what is asked later starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def tell(self, system: str) -> None:
        """Set what the model is told first, "" for nothing.

        Raises:
          UserError: the template takes no such text.
        """
        _check(system, "the system text")
        if system:
            self._model.encoder.prompt(
                [{"role": "system", "content": system}, {"role": "user", "content": "x"}]
            )
        self.system = system

    def forget(self) -> None:
        """Begin anew: nothing was said; the system's text stays."""
        self.turns, self._last = [], None

    @interrupts.never_lost()
    def say(self, text: str) -> str:
        """The answer to a question, once it is whole; see `ask`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Generator[str]:
        """Yields the text of an answer as it comes, without its reasoning; see `ask`."""
        answer = self.ask(text)
        try:
            for said in answer:
                if said.content:
                    yield said.content
        finally:
            answer.close()

    def ask(self, text: str) -> Generator[NewText]:
        """Yields the answer to a question as it comes; stopped early, what was said is kept.

        Raises:
          UserError: the question cannot be asked; the talk is as before.
        """
        _check(text, "the question")
        self._remarks = []
        question: Turn = {"role": "user", "content": text}
        asked = [*self._system_turns(), *self.turns, question]
        fitted, ids = self._model.fitted(asked, self._max_tokens)
        self._remark_on(asked, fitted)
        self.turns = [turn for turn in fitted if turn["role"] != "system"]
        sampling = dataclasses.replace(self._sampling)
        self._sampling = dataclasses.replace(sampling, first=sampling.first + 1)
        request = Request(
            tuple(ids), self._max_tokens, self._model.ends, sampling,
            self._model.language(asked),
        )  # fmt: skip
        self._last = Answered(request.prompt, [], request.language, self._model.engine)
        said: list[NewText] = []
        try:
            for one in self._answer(request, self._last.ids):
                said.append(one)
                yield one
        finally:
            self._keep(said)

    @property
    def remarks(self) -> list[str]:
        """What is to be known of the last answer beside its text."""
        return self._remarks

    def _answer(self, request: Request, ids: list[int]) -> Iterator[NewText]:
        """The text of an answer; its ids are added to the list."""
        if self._worker is None:
            # One answers at a time, but one that was stopped keeps its place to the step's end.
            self._worker = Worker(self._model.engine.decoding(), sys.maxsize)
        worker = self._worker
        reader = self._model.reader(request.prompt)
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        (ask,) = worker.ask([(request, told.put)], float("inf"))
        try:
            while not reader.ended:
                one = told.get()
                if isinstance(one, BaseException):
                    raise one
                new = [token.id for token in one.tokens]
                taken = reader.taken
                text = reader.add(new, one.ended)
                ids += new[: reader.taken - taken]
                yield text
        finally:
            worker.cancel(ask)
        if reader.ended == "length":
            self._remarks.append(f"cut at {self._max_tokens} tokens, the most of an answer")

    def _keep(self, said: Sequence[NewText]) -> None:
        """An answer becomes a turn, where there is any."""
        content = "".join(one.content for one in said)
        reasoning = "".join(one.reasoning for one in said)
        if not content:
            self.turns.pop()
            self._remarks.append("no answer; the question is forgotten")
            return
        turn: Turn = {"role": "assistant", "content": content}
        if reasoning:
            turn["reasoning_content"] = reasoning
        self.turns.append(turn)

    def _remark_on(self, asked: Sequence[Turn], fitted: Sequence[Turn]) -> None:
        """Say what did not fit the context."""
        dropped, context = len(asked) - len(fitted), self._model.context
        if dropped:
            self._remarks.append(
                f"the {dropped} oldest turns are forgotten: with an answer the talk does not fit "
                f"the context of {context} tokens"
            )
        if [turn["content"] for turn in asked[dropped:]][-1] != fitted[-1]["content"]:
            self._remarks.append(f"the question was cut to fit the context of {context} tokens")

    def _system_turns(self) -> list[Turn]:
        return [{"role": "system", "content": self.system}] if self.system else []
