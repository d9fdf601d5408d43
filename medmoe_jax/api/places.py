"""Which places the fields of a configuration take: what is not in the table is no path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.storage.places import REMOTE, check

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


def check_fields(config: ConfigDict) -> None:
    """Raise UserError for a field that names a place which it does not take."""
    for name, schemes in FIELDS.items():
        section, _, field = name.partition(".")
        for path in paths(config.get(section, {}).get(field)):
            check(path, name, schemes)
    for name in config.get("stages", {}).get("order", ()):
        fields = config.stages.get(name, {}).get("evaluation", {})
        for path in paths(fields.get("tasks")):
            check(path, f"stages.{name}.evaluation.tasks", REMOTE)
    for name, source in config.get("data", {}).get("sources", {}).items():
        check(source["path"], f"data.sources.{name}.path", SOURCE)


def paths(value: Any) -> Iterator[str]:
    """The paths in a value: one, several, several with commas between, or TASK=PATH."""
    if isinstance(value, str):
        for one in value.split(","):
            one = one.removeprefix("task:")
            yield from (one, one.partition("=")[2])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from paths(one)
