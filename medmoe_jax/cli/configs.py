"""`--config=RECIPE[:ARG] --config.field=value`: a locked ml-collections configuration.

RECIPE is a file, or the name of one that comes with the package: `medcare`. Where a work directory
was trained in, `--config` may be left out: it is what a stage was last trained with there.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Collection, Sequence
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
_RECIPE = "--config="


def apart(words: Sequence[str], ends: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without those about the configuration, and these.

    They are no business of argparse, which takes an option that it does not know, with a space in
    its value, for a prompt. `--config RECIPE` becomes `--config=RECIPE`.

    Args:
      words: the command line.
      ends: words that end its options: what stands behind the first of them is left as it is.
    """
    others: list[str] = []
    about: list[str] = []
    left = list(words)
    while left and left[0] not in ends:
        word = left.pop(0)
        if word == "--config" and left and not left[0].startswith("-"):
            word = _RECIPE + left.pop(0)
        (about if _is_about(word) else others).append(word)
    return others + left, about


def _is_about(word: str) -> bool:
    return word == "--config" or word.startswith((_RECIPE, _FIELD))


def load_config(arguments: Sequence[str], workdir: str | Path = "") -> ConfigDict:
    """The configuration that these command-line arguments name, locked.

    Args:
      arguments: `--config=RECIPE[:ARG]` and `--config.field=value`, and nothing else; of one that
        comes twice, the last holds.
      workdir: whose own configuration is taken where the arguments name no recipe; "" = there is
        none.

    Raises:
      UserError: no such recipe, an unknown field (with the closest known one), a value of another
        type, or an argument that is not about the configuration or has no value.
    """
    arguments = _last_of_each(arguments)
    for argument in arguments:
        if not _is_about(argument):
            raise UserError(f"unknown argument '{argument}'; see --help")
    _check_apart(arguments)
    if "--config" in arguments:
        raise UserError("--config: has no value; write --config=RECIPE")
    given = next((a.partition("=")[2] for a in arguments if a.startswith(_RECIPE)), "")
    config = _read(given, workdir)
    typed, new = [], {}
    for argument in arguments:
        name, _, text = argument.removeprefix(_FIELD).partition("=")
        if not argument.startswith(_FIELD):
            continue
        if is_new(config, name):
            new[name] = _value(text)
        else:
            with field_names(_FIELD):
                check_field(config, name)
            typed.append(_with_value(config, argument, name))
    try:
        config = _with(config, typed)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, flags.Error) as error:
        raise UserError(f"--config: {error}") from None
    for name, value in new.items():
        set_field(config, name, value)
    settle(config)
    return config


def _with_value(config: ConfigDict, argument: str, name: str) -> str:
    """The argument for a field that is there; one that is yes or no means yes without a value."""
    if "=" in argument:
        return argument
    section, _, key = name.rpartition(".")
    inner = functools.reduce(lambda one, part: one[part], section.split("."), config)
    if inner.get_type(key) is not bool:
        raise UserError(f"{argument}: has no value; write {argument}=VALUE")
    return f"{argument}=true"


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
