"""Which places every option and every field of a configuration takes.

One table for all commands: what is not in it is no path. An option that names another place is
refused before the command begins, so that nothing is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.storage.places import REMOTE, check

_NAMES = frozenset({"hf", "tfds"})  # of data sets, and of models
_LOCAL: frozenset[str] = frozenset()
_ROWS = REMOTE | _NAMES
# By option; those of one command that differ stand behind its name.
OPTIONS = {
    "workdir": REMOTE,
    "output": REMOTE,
    "out": REMOTE,
    "json": REMOTE,
    "runs": REMOTE,
    "input": _ROWS,
    "dataset": _ROWS,
    "data": _ROWS,
    "train": _ROWS,
    "against": _ROWS,
    "tasks": REMOTE,
    "adapter": REMOTE,
    "tokenizer": REMOTE,
    "template": REMOTE,
    "table": REMOTE,
    "evaluation": _LOCAL,
    "key_file": _LOCAL,
    "api_key_file": _LOCAL,
    "history": _LOCAL,
    # What is made in several files, with tools that know disks alone.
    "demo workdir": _LOCAL,
    "export output": _LOCAL,
    "data output": _LOCAL,
    "tokenizer output": _LOCAL,
}
FIELDS = {
    "base.path": REMOTE | {"hf"},
    "base.tokenizer": REMOTE,
    "data.template": REMOTE,
    "data.languages": REMOTE,
    "run.compilation_cache": _LOCAL,
    "run.tasks": REMOTE,
}
SOURCE = _ROWS  # data.sources.NAME.path


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that names a place which it does not take."""
    for name, value in vars(arguments).items():
        schemes = OPTIONS.get(f"{arguments.command} {name}", OPTIONS.get(name))
        if schemes is not None:
            for path in _paths(value):
                check(path, f"--{name.replace('_', '-')}", schemes)


def check_fields(config: ConfigDict) -> None:
    """Raise UserError for a field that names a place which it does not take."""
    for name, schemes in FIELDS.items():
        section, _, field = name.partition(".")
        for path in _paths(config.get(section, {}).get(field)):
            check(path, name, schemes)
    for name in config.get("stages", {}).get("order", ()):
        fields = config.stages.get(name, {}).get("evaluation", {})
        for path in _paths(fields.get("tasks")):
            check(path, f"stages.{name}.evaluation.tasks", REMOTE)
    for name, source in config.get("data", {}).get("sources", {}).items():
        check(source["path"], f"data.sources.{name}.path", SOURCE)


def _paths(value: Any) -> Iterator[str]:
    """The paths in an option: one, several, several with commas between, or TASK=PATH."""
    if isinstance(value, str):
        for one in value.split(","):
            one = one.removeprefix("task:")
            yield from (one, one.partition("=")[2])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)
