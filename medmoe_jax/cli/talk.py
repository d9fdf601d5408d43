"""A conversation with a model, whose banks, language and system text may change under way."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import RenderableType

from medmoe_jax.adapters import lifecycle
from medmoe_jax.api.opening import language_model
from medmoe_jax.base import trees
from medmoe_jax.cli.bars import bars
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import routing
from medmoe_jax.inference.chat import Chat
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.trained import Trained


class _Command(NamedTuple):
    """What a line that begins with / does."""

    form: str
    does: str
    run: Callable[[str], RenderableType]


class Talk(Chat):
    """A conversation that commands steer. To be used as a context manager."""

    def __init__(
        self,
        setup: Setup,
        trained: Trained,
        sampling: Sampling,
        max_tokens: int,
        off: Sequence[str] = (),
        language: str = "",
        system: str = "",
    ) -> None:
        """
        Args:
          setup, trained: the configuration's parts and its weights.
          sampling, max_tokens, system: see `inference.chat.Chat`.
          off: banks left out.
          language: code of the talk's language; "" = it is detected where a bank asks.

        Raises:
          UserError: as of `api.opening.language_model` and `Chat`.
        """
        super().__init__(
            language_model(setup, trained, off, language), sampling, max_tokens, system
        )
        self._setup, self._trained = setup, trained
        self._off, self._language = list(off), language
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
        self.forget()
        return "a new talk"

    def _set_system(self, text: str) -> str:
        self.tell(text)
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
        if off != self._off:
            self.close()
        self._model, self._off, self._language = model, off, language

    def _route(self, rest: str) -> RenderableType:
        self._no_more(rest, "route")
        last = self._last
        if last is None or not last.ids:
            raise UserError("nothing has been answered yet")
        engine = last.engine
        gates = routing.spoke(
            engine.config,
            trees.overlay(engine.base, engine.trained),
            engine.banks,
            self._setup.mesh,
            last.prompt,
            last.ids,
            last.language,
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
