"""Which places every option of a command takes.

One table for all commands: what is not in it is no path. An option that names another place is
refused before the command begins, so that nothing is made. Fields: `training.places`.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence

from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import (
    REMOTE,
    check,
    check_makeable,
    check_utf8,
    is_remote,
    place,
    scheme_of,
)
from medmoe_jax.training.places import LOCAL, ROWS, paths, settled

# By option; those of one command that differ stand behind its name.
OPTIONS = {
    "workdir": REMOTE,
    "output": REMOTE,
    "out": REMOTE,
    "json": REMOTE,
    "runs": REMOTE,
    "input": ROWS,
    "dataset": ROWS,
    "data": ROWS,
    "train": ROWS,
    "against": ROWS,
    "tasks": REMOTE,
    "adapter": REMOTE,
    "tokenizer": REMOTE,
    "template": REMOTE,
    "table": REMOTE,
    "evaluation": LOCAL,
    "key_file": LOCAL,
    "api_key_file": LOCAL,
    "history": LOCAL,
    # What is made in several files, with tools that know disks alone.
    "demo workdir": LOCAL,
    "export output": LOCAL,
    "data output": LOCAL,
    "tokenizer output": LOCAL,
}
# Folders that are written into when the work is done: whether they can be is seen before.
FOLDERS = {"analyze out", "compare output", "eval output", "overlap output", "plot output"}
FOLDERS |= {"data output", "route output"}
# Where no path means something: that no lines are kept, that there is no run.
MAY_BE_EMPTY = {"history", "workdir"}
# What argparse takes for no option where it knows none of that name.
_UNKNOWN = re.compile(r"--[\w.-]+=.*\s", re.DOTALL)


def settle_options(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    """Put the home folder for `~/` in the options that are paths.

    Args:
      arguments: what the parser made of the words.
      words: the command line, to the end of its options.

    Raises:
      UserError: an option names a place which it does not take, or is empty, as a shell leaves
        `--output=$UNSET`; a word is not UTF-8; one that no option has stands for something
        else, such as the prompt; or `--output` cannot be written, or is a file that is read.
    """
    for word in words:
        check_utf8(word)
        if _UNKNOWN.match(word) and word in _texts(arguments):
            raise UserError(f"unknown argument '{word}'; see --help")
    for before, word in itertools.pairwise(["", *words]):
        option, _, value = (word or before + "=").partition("=")
        name, given = option[2:].replace("-", "_"), "=" in word or not word
        if given and not value and name in OPTIONS.keys() - MAY_BE_EMPTY:
            raise UserError(f"{option}: is empty; give a path, or leave the option out")
    for name, value in vars(arguments).items():
        schemes = OPTIONS.get(f"{arguments.command} {name}", OPTIONS.get(name))
        if schemes is not None:
            for path in paths(value):
                check(path, f"--{name.replace('_', '-')}", schemes)
            setattr(arguments, name, settled(value))
            if value and f"{arguments.command} {name}" in FOLDERS:
                check_makeable(place(getattr(arguments, name)))
    _check_output(arguments)


def _check_output(arguments: argparse.Namespace) -> None:
    """Raise UserError where what is written would stand in the place of what is read."""
    output = getattr(arguments, "output", None)
    if not output or is_remote(output) or not place(output).is_file():
        return
    read = [place(one) for one in paths(getattr(arguments, "input", None)) if not scheme_of(one)]
    if any(one.is_file() and one.samefile(place(output)) for one in read):
        raise UserError(
            f"--output: '{output}' is what --input reads, and would be lost; give another path"
        )


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The texts that stand for something, one by one."""
    values = [v if isinstance(v, list) else [v] for v in vars(arguments).values()]
    return [value for value in itertools.chain(*values) if isinstance(value, str)]
