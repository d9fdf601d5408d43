"""A conversation with a model, whose banks, language and system text may change under way."""

from __future__ import annotations

import dataclasses
import difflib
import queue
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from rich.console import RenderableType

from medmoe_jax.adapters import lifecycle
from medmoe_jax.base import trees
from medmoe_jax.cli.bars import bars
from medmoe_jax.cli.session import language_model
from medmoe_jax.data.conversation import Turn, check_text
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import routing
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.inference.streaming import Said
from medmoe_jax.inference.worker import Told, Worker
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.trained import Trained


class _Answer(NamedTuple):
    """The last answer: ids, and the expert of its language."""

    prompt: tuple[int, ...]
    ids: list[int]
    language: int


class _Command(NamedTuple):
    """What a line that begins with / does."""

    form: str
    does: str
    run: Callable[[str], RenderableType]


class Talk:
    """A conversation. To be used as a context manager: its decoder is a thread.

    Attributes:
      turns: what was said so far, the system's text aside.
      system: what the model is told first, or "".
    """

    def __init__(
        self,
        setup: Setup,
        trained: Trained,
        sampling: Sampling,
        max_tokens: int,
        off: Sequence[str] = (),
        language: str = "",
    ) -> None:
        """
        Args:
          setup, trained: the configuration's parts and its weights.
          sampling: how tokens are drawn; each answer draws from a stream of its own.
          max_tokens: of an answer.
          off: banks left out.
          language: code of the talk's language; "" = it is detected where a bank asks.

        Raises:
          UserError: as of `cli.session.language_model`, or an answer leaves no room for a prompt.
        """
        self._setup, self._trained = setup, trained
        self._sampling, self._max_tokens = sampling, max_tokens
        self._off, self._language = list(off), language
        self.turns: list[Turn] = []
        self.system = ""
        self._last: _Answer | None = None
        self._remarks: list[str] = []
        self._worker: Worker | None = None
        self._model = language_model(setup, trained, off, language)
        if max_tokens >= self._model.context:
            raise UserError(
                f"--max-tokens: {max_tokens} leave no room for a question in a context of "
                f"{self._model.context} tokens"
            )
        self._commands = {
            "new": _Command("/new", "forget what was said", self._new),
            "system": _Command("/system TEXT", "tell the model this first; no TEXT: nothing",
                               self._set_system),
            "lang": _Command("/lang CODE", "the language of the talk, for routers; no CODE: it is "
                             "detected", self._set_language),
            "bank": _Command("/bank off|on NAME", "leave a bank out, or take it back; alone: list "
                             "them", self._set_bank),
            "route": _Command("/route", "which experts spoke in the last answer", self._route),
            "help": _Command("/help", "this", self._help),
        }  # fmt: skip

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.close()

    def about(self) -> str:
        """The model in a line."""
        stage = f"stage {self._trained.stage}" if self._trained.stage else "the base"
        return f"{stage}; {self._banks()}; context {self._model.context} tokens"

    def command(self, line: str) -> RenderableType:
        """Do what a line such as `/bank off NAME` says; what comes of it is to be shown.

        Raises:
          UserError: there is no such command, or it cannot be done.
        """
        name, _, rest = line.removeprefix("/").partition(" ")
        if name not in self._commands:
            close = difflib.get_close_matches(name, self._commands, 1)
            hint = f"; do you mean /{close[0]}?" if close else "; /help lists them"
            raise UserError(f"there is no command /{name}{hint}")
        return self._commands[name].run(rest.strip())

    def ask(self, text: str) -> Generator[Said]:
        """Yields the answer to a question as it comes; stopped early, what was said is kept.

        Raises:
          UserError: the question cannot be asked; the talk is as before.
        """
        check_text(text, "the question")
        self._remarks = []
        question: Turn = {"role": "user", "content": text}
        asked = [*self._system_turns(), *self.turns, question]
        fitted, ids = self._model.fitted(asked, self._max_tokens)
        self._remark_on(asked, fitted)
        self.turns = [turn for turn in fitted if turn["role"] != "system"]
        sampling = dataclasses.replace(self._sampling)
        self._sampling = dataclasses.replace(sampling, first=sampling.first + 1)
        request = Request(
            tuple(ids), self._max_tokens, self._model.stop_runs(), sampling,
            self._model.language(asked),
        )  # fmt: skip
        self._last = _Answer(request.prompt, [], request.language)
        said: list[Said] = []
        try:
            for one in self._answer(request, self._last.ids):
                said.append(one)
                yield one
        finally:
            self._keep(said)

    def remarks(self) -> list[str]:
        """What is to be known of the last answer beside its text."""
        return self._remarks

    def _answer(self, request: Request, ids: list[int]) -> Iterator[Said]:
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
                ids += new
                yield reader.add(new, one.ended)
        finally:
            worker.cancel(ask)
        if reader.ended == "length":
            self._remarks.append(f"cut at {self._max_tokens} tokens (--max-tokens)")

    def _keep(self, said: Sequence[Said]) -> None:
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

    def _banks(self) -> str:
        """All banks of the stage, those left out in brackets."""
        shown = [
            f"({name} off)" if name in self._off or state == "off" else name
            for name, (_, state) in self._trained.roster.items()
            if state != "merged"
        ]
        return f"banks: {', '.join(shown) or 'none'}"

    # Commands -----------------------------------------------------------------------------------

    def _new(self, rest: str) -> str:
        self._no_more(rest, "new")
        self.turns, self._last = [], None
        return "a new talk"

    def _set_system(self, text: str) -> str:
        check_text(text, "the system text")
        if text:
            self._setup.encoder.prompt(
                [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
            )
        self.system = text
        return f"the system text is: {text}" if text else "there is no system text"

    def _set_language(self, code: str) -> str:
        self._use(self._off, code)
        return f"the talk is in {code}" if code else "the language is detected"

    def _set_bank(self, rest: str) -> str:
        how, _, name = rest.partition(" ")
        name = name.strip()
        if not rest:
            return self._banks()
        if how not in ("on", "off") or not name:
            raise UserError(f"say {self._commands['bank'].form}")
        _, state = lifecycle.find(self._trained.roster, name)
        if how == "on" and state == "off":
            raise UserError(f"bank '{name}' is left out by the stage itself")
        others = [one for one in self._off if one != name]
        self._use([*others, name] if how == "off" else others, self._language)
        return self._banks()

    def _use(self, off: list[str], language: str) -> None:
        """Another set of banks or language from the next answer on."""
        model = language_model(self._setup, self._trained, off, language)
        if off != self._off and self._worker is not None:
            self._worker.close()
            self._worker = None
        self._model, self._off, self._language = model, off, language

    def _route(self, rest: str) -> RenderableType:
        self._no_more(rest, "route")
        if self._last is None or not self._last.ids:
            raise UserError("nothing has been answered yet")
        engine = self._model.engine
        gates = routing.spoke(
            engine.config,
            trees.overlay(engine.base, engine.trained),
            engine.banks,
            self._setup.mesh,
            *self._last,
            self._setup.languages,
        )
        return bars(gates)

    def _help(self, rest: str) -> str:
        self._no_more(rest, "help")
        width = max(len(one.form) for one in self._commands.values())
        return "\n".join(f"{one.form:<{width}}  {one.does}" for one in self._commands.values())

    def _no_more(self, rest: str, name: str) -> None:
        if rest:
            raise UserError(f"/{name} takes nothing more, and here is '{rest}'")
