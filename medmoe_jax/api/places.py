"""Which places the fields of a configuration take: what is not in the table is no path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.storage.places import REMOTE, at_home, check

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
# Where one of `paths` begins in the home folder.
_HOME = re.compile(r"(^|,|=|task:)~(?=[/,]|$)")


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
    if isinstance(value, str):
        return _HOME.sub(lambda found: found[1] + at_home("~"), value)
    if isinstance(value, list | tuple):
        return type(value)(settled(one) for one in value)
    return value


def paths(value: Any) -> Iterator[str]:
    """The paths in a value: one, several, several with commas between, or TASK=PATH."""
    if isinstance(value, str):
        for one in value.split(","):
            one = one.removeprefix("task:")
            yield from (one, one.partition("=")[2])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from paths(one)
