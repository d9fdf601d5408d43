"""Which places the fields of a configuration take: what is not in the table is no path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.storage.places import REMOTE, at_home, check, local, scheme_of

LOCAL: frozenset[str] = frozenset()
ROWS = REMOTE | {"hf", "tfds"}  # or names of data sets, and of models
FIELDS = {
    "base.path": REMOTE | {"hf"},
    "base.tokenizer": REMOTE,
    "data.template": REMOTE,
    "data.languages": REMOTE,
    "run.compilation_cache": LOCAL,
    "run.tasks": REMOTE,
}
SOURCE = ROWS  # data.sources.NAME.path
_NAMED = {"template", "languages", "tasks"}  # fields that take names beside files
_KIND = "task:"  # what stands before a path of `medmoe overlap`


def settle_fields(config: ConfigDict) -> None:
    """Put the home folder for `~/` in the fields that are paths.

    Raises:
      UserError: a field names a place which it does not take.
    """
    for section, key, name, schemes in _fields(config):
        for path in paths(section[key]):
            check(path, name, schemes)
        section[key] = settled(section[key])


def _fields(config: ConfigDict) -> Iterator[tuple[ConfigDict, str, str, frozenset[str]]]:
    """`(section, key, name, what it takes)` of every field that there is."""
    for name, schemes in FIELDS.items():
        section, _, key = name.partition(".")
        if key in config.get(section, {}):
            yield config[section], key, name, schemes
    for name in config.get("stages", {}).get("order", ()):
        fields = config.stages.get(name, {}).get("evaluation", {})
        if "tasks" in fields:
            yield fields, "tasks", f"stages.{name}.evaluation.tasks", REMOTE
    for name, source in config.get("data", {}).get("sources", {}).items():
        yield source, "path", f"data.sources.{name}.path", SOURCE


def settled(value: Any) -> Any:
    """A value that holds paths, as of `paths`, with the home folder for `~/`."""
    return _each(value, at_home)


def paths(value: Any) -> Iterator[str]:
    """The paths in a value: one, several, several with commas between, or TASK=PATH."""
    found: list[str] = []
    _each(value, lambda path: found.append(path) or path)
    return iter(found)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A value of that kind with each of its paths changed, and what may be the name before one."""
    if isinstance(value, str):
        return ",".join(_in_one(one, change) for one in value.split(","))
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return value


def _in_one(text: str, change: Callable[[str], str]) -> str:
    before = _KIND if text.startswith(_KIND) else ""
    name, equals, path = text.removeprefix(_KIND).partition("=")
    return before + change(name) + equals + (change(path) if equals else "")


def found_from(config: ConfigDict, folder: str) -> None:
    """Put absolute paths where relative ones name nothing from here, but something from a folder.

    What is there in neither stays as it is: it is a name, such as of a template or a task. So does
    what belongs to a stage, whose record has it as it was typed.
    """
    for section, key, name, _ in _fields(config):
        if name.startswith("stages."):
            continue
        change = functools.partial(_from, folder, may_be_name=key in _NAMED)
        value = section[key]
        section[key] = (
            tuple(map(change, value)) if isinstance(value, list | tuple) else change(value)
        )


def _from(folder: str, path: str, may_be_name: bool) -> str:
    """A path, or an absolute one; names have no ending, whatever lies there."""
    if not path or not folder or scheme_of(path) or (may_be_name and not PurePath(path).suffix):
        return path
    there = local(folder) / local(path)
    return str(there) if there.exists() and not local(path).exists() else path
