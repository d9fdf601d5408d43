"""The configuration that a work directory was last used with, so that it can be opened again.

W/run.json is written by whatever trains, imports or fits a stage there. It stands in for
a recipe where none is named; nothing is proved by it: whether a stage's end is that of the
configuration, its own records tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.checkpoints.records import read_record, write_record
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import place
from medmoe_jax.training.config import recipe

NAME = "run.json"


def keep(config: ConfigDict, workdir: str | Path) -> None:
    """Write the configuration, in place of the one before."""
    write_record(place(workdir) / NAME, {"config": config.to_dict()})


def is_kept(workdir: str | Path) -> bool:
    """Whether the work directory names a configuration."""
    return (place(workdir) / NAME).is_file()


def kept(workdir: str | Path) -> ConfigDict:
    """The configuration that was kept, locked.

    Raises:
      UserError: there is none, or the file was changed.
    """
    path = place(workdir) / NAME
    content, _ = read_record(path, "config")
    config = recipe()
    try:
        with config.unlocked():
            config.update(_tuples(content["config"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a configuration: {error}") from None
    return config.lock()


def _tuples(value: Any) -> Any:
    """A value of JSON as a configuration has it: its sequences are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
