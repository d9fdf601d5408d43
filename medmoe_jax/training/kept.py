"""The configuration that a stage of a work directory was last trained with, to open it again.

W/run.json is written by whatever trains, imports or fits a stage there. It stands in for
a recipe where none is named; nothing is proved by it: whether a stage's end is that of the
configuration, its own records tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.checkpoints.records import RecordError, read_record, write_record
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import place
from medmoe_jax.training.config import recipe
from medmoe_jax.training.places import found_from

NAME = "run.json"


def keep(config: ConfigDict, workdir: str | Path) -> None:
    """Write the configuration, and where its relative paths begin; unless it is the one there.

    Raises:
      RecordError: the file that is there was changed.
    """
    content = json.loads(json.dumps({"config": config.to_dict(), "folder": str(Path.cwd())}))
    if not is_kept(workdir) or _read(workdir)["config"] != content["config"]:
        write_record(place(workdir) / NAME, content)


def is_kept(workdir: str | Path) -> bool:
    """Whether the work directory names a configuration."""
    return (place(workdir) / NAME).is_file()


def kept(workdir: str | Path) -> ConfigDict:
    """The configuration that was kept, locked; what its relative paths name is found from anywhere.

    Raises:
      UserError: there is none, or the file was changed.
    """
    content, config = _read(workdir), recipe()
    try:
        with config.unlocked():
            config.update(_tuples(content["config"]))
            found_from(config, content.get("folder", ""))  # none in those of earlier versions
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place(workdir) / NAME}: not a configuration: {error}") from None
    return config.lock()


def _read(workdir: str | Path) -> dict[str, Any]:
    try:
        return read_record(place(workdir) / NAME, "config")[0]
    except RecordError as error:
        raise RecordError(
            f"{error}; put back what was written there, or remove the file and name the recipe"
        ) from None


def _tuples(value: Any) -> Any:
    """A value of JSON as a configuration has it: its sequences are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
