"""`--config=RECIPE[:ARG] --config.field=value`: a locked ml-collections configuration.

RECIPE is a file, or the name of one that comes with the package: `medcare`. Where a work directory
was trained in, `--config` may be left out: it is what a stage was last trained with there.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from medmoe_jax.api.configs import (
    check_field,
    is_new,
    read_recipe,
    recipes,
    set_field,
    settle,
)
from medmoe_jax.errors import UserError, field_names
from medmoe_jax.training.kept import is_kept, kept

_FIELD = "--config."


def load_config(arguments: Sequence[str], workdir: str | Path = "") -> ConfigDict:
    """The configuration that these command-line arguments name, locked.

    Args:
      arguments: `--config=RECIPE[:ARG]` and `--config.field=value`, and nothing else; of one that
        comes twice, the last holds.
      workdir: whose own configuration is taken where the arguments name no recipe; "" = there is
        none.

    Raises:
      UserError: no such recipe, an unknown field (with the closest known one), a value of another
        type, or an argument that is not about the configuration.
    """
    arguments = _last_of_each(arguments)
    _check_apart(arguments)
    given = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), "")
    config = _read(given, workdir)
    strangers = [a for a in arguments if not a.startswith("--config")]
    if strangers:
        raise UserError(f"unknown argument '{strangers[0]}'; see --help")
    typed, new = [], {}
    for argument in arguments:
        name, _, text = argument.removeprefix(_FIELD).partition("=")
        if not argument.startswith(_FIELD):
            typed += [argument] if not argument.startswith("--config=") else []
        elif is_new(config, name):
            new[name] = _value(text)
        else:
            with field_names(_FIELD):
                check_field(config, name)
            typed.append(argument)
    try:
        config = _with(config, typed)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, flags.Error) as error:
        raise UserError(f"--config: {error}") from None
    for name, value in new.items():
        set_field(config, name, value)
    settle(config)
    return config


def _last_of_each(arguments: Sequence[str]) -> list[str]:
    """Without those whose name comes again later: ml-collections would join the tuples of both."""
    last: dict[str, str] = {}
    for argument in arguments:
        name = argument.partition("=")[0]
        last.pop(name, None)
        last[name] = argument
    return list(last.values())


def _check_apart(arguments: Sequence[str]) -> None:
    """Raise UserError where a section is set and one of its fields too: which holds is unclear."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith(_FIELD)]
    for section, name in itertools.permutations(names, 2):
        if name.startswith(f"{section}."):
            raise UserError(
                f"{name}: {section} sets all fields of its section; give one of the two"
            )


def _read(given: str, workdir: str | Path) -> ConfigDict:
    if given:
        with field_names("--"):
            return read_recipe(given)
    if workdir and is_kept(workdir):
        return kept(workdir)
    why = f"--workdir: nothing was trained in '{workdir}', so " if workdir else ""
    raise UserError(f"{why}--config is missing: a file, or one of {', '.join(recipes())}")


def _value(text: str) -> Any:
    """A value as Python writes it, or a text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        return text


def _with(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """A configuration with fields set by arguments, each read by the type of its field."""
    values = flags.FlagValues()
    command = ["medmoe", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    values(command)
    return values.config
