"""Configurations: read from a recipe, and changed by fields."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from medmoe_jax.api.recipe_file import one_line, run_file
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.storage import places
from medmoe_jax.training.places import settle_fields
from medmoe_jax.training.shape import check_shape

# The folder configs/ of the project, inside the package.
SHIPPED = Path(__file__).parents[1] / "configs"
# Mappings of the configuration that may be given any key.
_OPEN = re.compile(r"(data\.(?:template_options|sources\.\w+\.columns))\.(\w+)")


def config(
    recipe: str | os.PathLike[str] | ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """A configuration, locked: an unknown field is an error.

    Args:
      recipe: a file with `get_config`, or the name of a recipe that comes with the package, either
        with an argument after a colon (`medcare:qwen2-1.5b`); or a configuration, which is copied.
      overrides: values by field, `{"run.save_every": 50, "data.sources.mine.path": "rows.jsonl"}`.

    Raises:
      UserError: no such recipe, an unknown field (with the closest known one), or a value of
        another type.
    """
    if isinstance(recipe, ConfigDict):
        changed = _apart(recipe.copy_and_resolve_references()).lock()
    else:
        changed = read_recipe(os.fspath(recipe))
    for name, value in (overrides or {}).items():
        set_field(changed, name, value)
    settle(changed)
    return changed


def settle(changed: ConfigDict) -> None:
    """Put the home folder for `~/` in its paths.

    Raises:
      UserError: a field is unknown, of another type, or names no place that it takes.
    """
    check_shape(changed)
    settle_fields(changed)


def variants(
    recipe: str | os.PathLike[str] | ConfigDict,
    stage: str,
    changes: Mapping[str, Mapping[str, Any]],
) -> ConfigDict:
    """A configuration with further stages, each like one that is there but for some fields.

    They start where that one does: in one work directory, what lies before it is trained once.

    Args:
      recipe: as of `config`; it stays as it is.
      stage: the name of the one that they are like.
      changes: by the name of each new stage, its values by field of a stage,
        `{"align_10": {"losses.orthogonality.weight": 10.0}}`.

    Raises:
      UserError: there is no such stage or field, or one of a new name is there already.
    """
    changed = config(recipe)
    known = [name for name in changed.stages if name != "order"]
    if stage not in known:
        raise ParameterError(f"stage: '{stage}' is none of {', '.join(known) or '(no stage)'}")
    for name, fields in changes.items():
        if name in changed.stages:
            raise ParameterError(f"changes: the recipe has a stage '{name}' already")
        if "." in name:
            raise ParameterError(f"changes: '{name}' holds a dot, which parts fields; write '_'")
        with changed.unlocked():
            changed.stages[name] = changed.stages[stage].copy_and_resolve_references()
            changed.stages.order = (*changed.stages.order, name)
        for field, value in fields.items():
            set_field(changed.stages[name], field, value)
    return changed.lock()


def read_recipe(given: str) -> ConfigDict:
    """What a recipe's `get_config` gives, locked. `given`: RECIPE or RECIPE:ARG, see `config`.

    Raises:
      UserError: no such recipe, or it cannot be read.
    """
    name, colon, argument = given.partition(":")
    file = _file(name, given)
    made = run_file(file, [argument] if colon else [])
    if not isinstance(made, ConfigDict):
        raise UserError(f"{file}: get_config() must return an ml_collections.ConfigDict")
    return _apart(made).lock()


def _apart(config: ConfigDict) -> ConfigDict:
    """The same, with every section an object of its own, that may be changed by itself.

    A recipe may put one `bank` or `source` into several places. References stay what they are, but
    a required one without a value is no error yet: the command line may give it.
    """
    fields: dict[str, Any] = {}
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference) and value.empty():
            value = placeholder(value.get_type())
        fields[key] = _apart(value) if isinstance(value, ConfigDict) else value
    return ConfigDict(fields)


def recipes() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.py"))


def _file(name: str, given: str) -> Path:
    """The file of a recipe that is given by its path or by its name."""
    if (file := places.local(name)).is_file():
        return file
    if name in recipes():
        return SHIPPED / f"{name}.py"
    places.check(given, "config", ())
    if re.fullmatch(r"[\w-]+", name):
        close = difflib.get_close_matches(name, recipes(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(recipes())}"
        raise ParameterError(f"config: no file and no recipe is called '{name}'; {hint}")
    raise ParameterError(f"config: there is no file '{name}'")


def set_field(changed: ConfigDict, name: str, value: Any) -> None:
    """Set a field by its dotted name.

    Raises:
      ParameterError: there is none, or the value is of another type.
    """
    section, _, key = name.rpartition(".")
    if not is_new(changed, name):
        check_field(changed, name)
    with changed.unlocked():
        inner = functools.reduce(getattr, section.split("."), changed) if section else changed
        if isinstance(value, bool) and key in inner and inner.get_type(key) is float:
            raise ParameterError(f"{name}: {value} is not a number")  # it would become 1.0
        try:
            inner[key] = value
        except TypeError as error:
            raise ParameterError(f"{name}: {one_line(error)}") from None


def is_new(changed: ConfigDict, name: str) -> bool:
    """Whether a field is one that an open mapping does not hold yet."""
    found = _OPEN.fullmatch(name)
    known = set(_fields(changed)) if found else set()
    return bool(found) and found[1] in known and name not in known


def check_field(changed: ConfigDict, name: str) -> None:
    """Raise ParameterError for a field that the configuration does not have."""
    known = list(_fields(changed))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ParameterError(f"{name}: the configuration has no such field{hint}")


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items(preserve_field_references=True):
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")
