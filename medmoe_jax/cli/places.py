"""Which places every option of a command takes.

One table for all commands: what is not in it is no path. An option that names another place is
refused before the command begins, so that nothing is made. Fields: `api.places`.
"""

from __future__ import annotations

import argparse

from medmoe_jax.api.places import LOCAL, ROWS, paths, settled
from medmoe_jax.storage.places import REMOTE, check

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


def settle_options(arguments: argparse.Namespace) -> None:
    """Put the home folder for `~/` in the options that are paths.

    Raises:
      UserError: an option names a place which it does not take.
    """
    for name, value in vars(arguments).items():
        schemes = OPTIONS.get(f"{arguments.command} {name}", OPTIONS.get(name))
        if schemes is not None:
            for path in paths(value):
                check(path, f"--{name.replace('_', '-')}", schemes)
            setattr(arguments, name, settled(value))
