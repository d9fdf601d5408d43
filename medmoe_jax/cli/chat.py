"""Talk with a model: many turns, answers as they come.

  medmoe chat --config=FILE --workdir=DIR
  echo "What does a lack of vitamin C cause?" | medmoe chat --config=FILE --workdir=DIR

A line is a question; one that begins with / is a command, which /help lists, and // begins a
question with a /. Ctrl-C stops an answer or a command, Ctrl-D or the end of the input ends the
talk. Answers are written to standard output, all else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from rich.console import Console

from medmoe_jax.api.opening import open_stage
from medmoe_jax.cli.session import (
    add_language_argument,
    add_length_argument,
    add_model_arguments,
    add_sampling_arguments,
    check_length,
    length_of,
    open_run,
    sampling_of,
)
from medmoe_jax.cli.talk import Talk
from medmoe_jax.errors import UserError
from medmoe_jax.inference.streaming import NewText
from medmoe_jax.parallel import processes
from medmoe_jax.screen import harmless, typed_by_hand
from medmoe_jax.training.terminal import console, note

_LINES = 1000  # that the history keeps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_length_argument(parser, 512)
    parser.add_argument(
        "--history",
        metavar="FILE",
        help="lines typed in a terminal, for the arrow keys; '' = none are kept "
        "(default: chat_history in the user's state folder)",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    check_length(arguments)
    sampling = sampling_of(arguments)
    if processes.count() > 1:
        raise UserError("a talk is led in one process, and here are several")
    typed = _typed(arguments.history) if typed_by_hand() else None
    opened = open_run(rest, arguments.workdir)
    trained = open_stage(opened, arguments.stage)
    length = length_of(arguments, opened.setup.base.config.max_positions)
    talk = Talk(
        opened.setup, trained, sampling, length, arguments.off, arguments.language, arguments.system
    )
    with talk, _without_news():
        if typed is not None:
            note(f"{talk.about()}\n/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        for line in _lines(typed):
            _take(talk, line)


@contextlib.contextmanager
def _without_news() -> Generator[None]:
    """What is logged of compiling and the like is no part of a talk."""
    log = logging.getLogger("medmoe_jax")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _take(talk: Talk, line: str) -> None:
    """Do what a line asks for; what cannot be done, or is stopped, is said; the talk goes on."""
    text = line.strip()
    try:
        if text.startswith("/") and not text.startswith("//"):
            console.print(talk.command(text), markup=False, highlight=False)
        elif text:
            _answer(talk, text.removeprefix("/") if text.startswith("//") else text)
    except UserError as error:
        note(harmless(str(error)))
    except KeyboardInterrupt:
        note("stopped")


def _answer(talk: Talk, text: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it and keeps what was said."""
    stopped: list[str] = []
    try:
        with contextlib.closing(talk.ask(text)) as answer:
            for said in answer:
                _print(said)
    except KeyboardInterrupt:
        stopped = ["stopped"]
    print(flush=True)
    for remark in (*stopped, *talk.remarks):
        note(remark)


def _print(said: NewText) -> None:
    """Print new text: reasoning on standard error, the answer on standard output."""
    if said.reasoning:
        console.print(
            harmless(said.reasoning), style="dim", end="", markup=False, highlight=False,
            soft_wrap=True,
        )  # fmt: skip
    if said.content:
        print(harmless(said.content), end="", flush=True)


def _typed(history: str | None) -> Typed:
    """A terminal's lines, kept in the file of the option `--history`.

    Raises:
      UserError: they cannot be kept there.
    """
    try:
        path = _history_file() if history is None else Path(history) if history else None
        return Typed(path)
    except (OSError, RuntimeError) as error:  # the latter where no home folder is known
        reason = f"{error.strerror}: '{path}'" if isinstance(error, OSError) else error
        raise UserError(
            f"--history: lines that are typed cannot be kept ({reason}); name another file, or "
            "keep none with --history="
        ) from None


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "medmoe" / "chat_history"


def _lines(typed: Typed | None) -> Iterator[str]:
    """What the person writes, line by line, to the end of the input."""
    if typed is None:
        try:
            yield from sys.stdin or ()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text ({error})") from None
        return
    while True:
        try:
            yield typed.line()
        except KeyboardInterrupt:  # leaves the line, not the talk
            print()
        except EOFError:
            print()
            return


class Typed:
    """Lines that are typed in a terminal, with arrow keys and those typed before."""

    def __init__(self, path: Path | None) -> None:
        """`path`: where lines are kept, for the next talk too; None = nowhere."""
        self._path = path
        import readline  # not every Python has it, and the other commands do without

        self._readline = readline
        readline.clear_history()
        readline.set_history_length(_LINES)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What is asked may be of a patient.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, mode=0o600))
            readline.read_history_file(path)
        out = Console()
        colour = out.color_system is not None and not out.no_color
        # Readline must know which characters of the prompt take no place.
        self._prompt = "\x01\x1b[1;36m\x02> \x01\x1b[0m\x02" if colour else "> "

    def line(self) -> str:
        """The next one. Raises EOFError at the end, KeyboardInterrupt for one that is left."""
        line = input(self._prompt)
        if self._path is not None:
            self._readline.write_history_file(self._path)
        return line
