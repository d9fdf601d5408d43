"""`--config=RECIPE[:ARG] --config.field=value`: a locked ml-collections configuration.

RECIPE is a file, or the name of one that comes with the package: `medcare`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from medmoe_jax.cli.places import check_fields
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import check

# The folder configs/ of the project, inside the package.
SHIPPED = Path(__file__).parents[1] / "configs"


def load_config(arguments: Sequence[str]) -> ConfigDict:
    """The configuration that these command-line arguments name, locked.

    Args:
      arguments: `--config=RECIPE[:ARG]` and `--config.field=value`, and nothing else.

    Raises:
      UserError: no such recipe, an unknown field (with the closest known one), a value of another
        type, or an argument that is not about the configuration.
    """
    given = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), "")
    if not given:
        raise UserError(f"--config is missing: a file, or one of {', '.join(_names())}")
    name, colon, argument = given.partition(":")
    file = f"{_recipe(name, given)}{colon}{argument}"
    arguments = [a for a in arguments if not a.startswith("--config=")]
    try:
        config = _parse([f"--config={file}"])
    except (
        *(AttributeError, ImportError, KeyError, NameError, SyntaxError),
        *(TypeError, ValueError, flags.Error),
    ) as error:
        raise UserError(f"{file}: {_last_line(error)}") from error
    try:  # an OSError of the file is kept until somebody touches the configuration
        getattr(config, "lock", None)
    except OSError as error:
        raise UserError(f"{file}: {error.__cause__}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() must return an ml_collections.ConfigDict")
    strangers = [a for a in arguments if not a.startswith("--config")]
    if strangers:
        raise UserError(f"unknown argument '{strangers[0]}'; see --help")
    new = {a: found for a in arguments if (found := _new_field(a, config))}
    arguments = [a for a in arguments if a not in new]
    _check_fields(arguments, config)
    try:
        config = _with_fields(_parse([f"--config={file}", *arguments]), new.values())
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, flags.Error) as error:
        raise UserError(f"--config: {error}") from None
    check_fields(config)
    return config


def _names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.py"))


def _recipe(name: str, given: str) -> Path:
    """The file of a recipe that is given by its path or by its name."""
    if os.path.isfile(name):
        return Path(name)
    if name in _names():
        return SHIPPED / f"{name}.py"
    check(given, "--config", ())
    if re.fullmatch(r"[\w-]+", name):
        close = difflib.get_close_matches(name, _names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(_names())}"
        raise UserError(f"--config: no file and no recipe is called '{name}'; {hint}")
    raise UserError(f"--config: there is no file '{name}'")


# Mappings of the configuration that may be given any key.
_OPEN = re.compile(r"--config\.(data\.(?:template_options|sources\.\w+\.columns))\.(\w+)=(.*)")


def _new_field(argument: str, config: ConfigDict) -> tuple[str, str, Any] | None:
    """`(section, key, value)` where the argument adds a key to an open mapping."""
    found = _OPEN.fullmatch(argument)
    if not found or found[1] not in _paths(config) or f"{found[1]}.{found[2]}" in _paths(config):
        return None
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(found[3], found[3]))
    except (SyntaxError, ValueError):
        value = found[3]
    return found[1], found[2], value


def _with_fields(config: ConfigDict, fields: Iterable[tuple[str, str, Any]]) -> ConfigDict:
    with config.unlocked():
        for section, key, value in fields:
            functools.reduce(getattr, section.split("."), config)[key] = value
    return config


def _last_line(error: BaseException) -> str:
    """The end of an error's text; config_flags puts the path of the file before it."""
    return (str(error).strip().splitlines() or ["no message"])[-1]


def _parse(arguments: Sequence[str]):
    values = flags.FlagValues()
    command = ["medmoe", *arguments]
    config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=command
    )
    values(command)
    return values.config


def _check_fields(arguments: Sequence[str], config: ConfigDict) -> None:
    """Raise UserError for a field that the configuration does not have."""
    known = list(_paths(config))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"--config.{name}: the configuration has no such field{hint}")


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{key}.")
