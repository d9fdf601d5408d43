"""The `medmoe` command.

Exit status: 0 = done; 1 = bad input; 2 = wrong usage; 69 = another process of the run never came or
is gone; 74 = storage is full, failed or cannot be reached; 75 = asked to stop (SIGTERM), and saved
or not begun: the same command continues; 130 = Ctrl-C; 141 = whoever read the output is gone, as
`head` is. All else is a fault of the program.
"""

from __future__ import annotations

from medmoe_jax.cli import early  # what takes time comes after what listens for signals

# isort: split
import argparse
import atexit
import contextlib
import io
import itertools
import logging
import os
import select
import sys
from collections.abc import Generator, Sequence
from typing import TextIO

from jax._src import api as of_jax  # what cleans up at Python's end has no public name

import medmoe_jax
from medmoe_jax import interrupts
from medmoe_jax.cli import (
    analyze,
    chat,
    compare,
    completion,
    configs,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    judge,
    lm_eval,
    overlap,
    plan,
    plot,
    route,
    score,
    serve,
    tokenizer,
    train,
)
from medmoe_jax.cli.places import settle_options
from medmoe_jax.errors import ParameterError, Stopped, UserError, is_storage
from medmoe_jax.parallel import processes
from medmoe_jax.parallel.rollcall import GONE, ProcessError
from medmoe_jax.screen import harmless
from medmoe_jax.storage.objects import failures
from medmoe_jax.training.terminal import LogHandler, console

early.all_imported()

COMMANDS = {
    "demo": demo,
    "doctor": doctor,
    "plan": plan,
    "train": train,
    "plot": plot,
    "route": route,
    "import": import_,
    "eval": evaluate,
    "compare": compare,
    "judge": judge,
    "lm-eval": lm_eval,
    "overlap": overlap,
    "generate": generate,
    "chat": chat,
    "score": score,
    "serve": serve,
    "export": export,
    "analyze": analyze,
    "data": data,
    "tokenizer": tokenizer,
    "completion": completion,
}


class _Help(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width; indented ones, such as examples, stay whole."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(p if p.startswith(" ") else fill(p, width, indent) for p in paragraphs)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="medmoe",
        description="Adapt a frozen decoder LLM to medicine with mixtures of LoRA experts.",
    )
    top.add_argument("--version", action="version", version=medmoe_jax.__version__)
    group = top.add_argument_group(
        "several processes",
        "the same command in each of them, before COMMAND or in the environment",
    )
    group.add_argument(
        "--coordinator",
        default=os.environ.get("MEDMOE_COORDINATOR", ""),
        help="HOST:PORT of process 0, which also listens on PORT + 1; auto on Cloud TPU "
        "($MEDMOE_COORDINATOR)",
    )
    group.add_argument(
        "--processes",
        type=int,
        default=os.environ.get("MEDMOE_PROCESSES", "1"),
        help="how many ($MEDMOE_PROCESSES)",
    )
    group.add_argument(
        "--process",
        type=int,
        default=os.environ.get("MEDMOE_PROCESS", "0"),
        help="which one this is, from 0 on ($MEDMOE_PROCESS)",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        one = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    commands.choices["completion"].set_defaults(top=top)
    return top


NEXT = """Adapt a frozen decoder LLM to medicine with mixtures of LoRA experts.

  medmoe demo            the whole way, on a small model, in minutes
  medmoe doctor          does this machine have what a run needs?
  medmoe data inspect    your rows as they will be trained
  medmoe train           --config=medcare:qwen2-1.5b --workdir=runs/mine ...
  medmoe eval, generate  what has become of the model

medmoe --help lists all commands, medmoe COMMAND --help explains one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, see the module."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # as it is where it was closed
                sys.stdout.flush()  # not at Python's end, which would tell of a reader that is gone
    except BrokenPipeError:
        for stream in _unread():  # what Python writes at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return _cut_short(141)


def _unread() -> list[TextIO]:
    """Those of the standard streams whose reader is gone."""
    found = []
    for stream in (one for one in (sys.stdout, sys.stderr) if one is not None):
        with contextlib.suppress(OSError):  # no file is behind it, as in a notebook
            look = select.poll()
            look.register(stream.fileno(), 0)
            found += [stream for _, event in look.poll(0) if event]
    return found


def _run(argv: Sequence[str] | None) -> int:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(levelname)s: %(message)s",
        handlers=[LogHandler()],
        force=early.IS_PROGRAM,  # Orbax, once imported, has set a handler of absl's
    )
    logging.getLogger("medmoe_jax").setLevel(logging.INFO)
    # Orbax logs, with a traceback a thread, what it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if early.IS_PROGRAM:
        _write_any_text()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(NEXT)
        return 0
    command = COMMANDS.get(next((word for word in words if word in COMMANDS), ""))
    ends = {"--", getattr(command, "PASSED_ON", "--")}
    words, about = configs.apart(words, ends)
    arguments, strange = parser().parse_known_args(words)
    try:
        several = (arguments.coordinator, arguments.processes, arguments.process)
        with (
            early.stoppable(),
            interrupts.never_lost(),
            processes.Membership(*several),
            _one_speaks(),
        ):
            options = itertools.takewhile(lambda word: word not in ends, words)
            settle_options(arguments, [*about, *options])
            arguments.run(arguments, about + strange)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            raise
        _complain(arguments.command, _named(error, arguments))
        return processes.end(74 if is_storage(error) else 1)
    except failures() as error:
        _complain(arguments.command, error)
        return processes.end(74)
    except ProcessError as error:
        _complain(arguments.command, error)
        return processes.end(GONE)
    except Stopped as stop:
        print(f"\nmedmoe {arguments.command}: {stop}; the same command continues", file=sys.stderr)
        return 75
    except early.Terminated:
        print(f"\nmedmoe {arguments.command}: asked to stop; it starts again", file=sys.stderr)
        return _cut_short(early.STATUS)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is intact, the same command continues", file=sys.stderr)
        return _cut_short(early.INTERRUPTED)
    return 0


def _write_any_text() -> None:
    """Let standard output write a sign that its encoding lacks as `\\u75c5`, and not raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _cut_short(status: int) -> int:
    """The exit status of a command that left its work wherever it stood."""
    # It fails on a compilation that was left halfway, too; another JAX may have none.
    clean_up = getattr(of_jax, "clean_up", None)
    if early.IS_PROGRAM and clean_up:
        atexit.unregister(clean_up)
    return processes.end(early.cut_short(status))


_WRITTEN = ("workdir", "output", "out")  # options that name what a command writes


def _complain(command: str, error: object) -> None:
    print(harmless(f"medmoe {command}: error: {error}"), file=sys.stderr)


def _named(error: Exception, arguments: argparse.Namespace) -> str:
    """An error's message; where it begins with a parameter that is an option, with the option, and
    where it names no file, with the folders that the command writes into.
    """
    given = vars(arguments)
    name, _, rest = str(error).partition(":")
    if isinstance(error, ParameterError) and name in given:
        return f"--{name.replace('_', '-')}:{rest}"
    places = [f"--{key}={given[key]}" for key in _WRITTEN if given.get(key)]
    if isinstance(error, OSError) and error.filename is None and is_storage(error) and places:
        return f"{error}: while a file of {' or '.join(places)} was written"
    return str(error)


@contextlib.contextmanager
def _one_speaks() -> Generator[None]:
    """All processes but the first are silent, except for errors."""
    if not processes.index():
        yield
        return
    console.quiet = True
    logging.getLogger("medmoe_jax").setLevel(logging.WARNING)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


if __name__ == "__main__":
    sys.exit(main())
