"""Whether a configuration has the fields of `training.config`, and values of their types.

A recipe is Python, and a configuration that is unlocked takes anything: a misspelt field would be
ignored, and a text in the place of a number fail far from where it was written.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from medmoe_jax.errors import ParameterError
from medmoe_jax.kinds import fits, shown, words
from medmoe_jax.storage.places import check_utf8
from medmoe_jax.training import config as sections
from medmoe_jax.training.recipe import REGULARISERS


class _AnyNames(NamedTuple):
    """Fields of any names, every one of them like `of`."""

    of: Any


class _SomeFields(NamedTuple):
    """Fields of a section that may be left out, but for `needed`."""

    of: Mapping[str, Any]
    needed: tuple[str, ...] = ()


_OPEN = _AnyNames(None)  # any fields, which are judged where they are used


def check_shape(config: ConfigDict) -> None:
    """Raise UserError for the first field that is unknown, missing or of another type.

    And for a name or a text that is not UTF-8.
    """
    _check("", config, _whole())


def _whole() -> dict[str, Any]:
    whole: dict[str, Any] = {name: dict(section) for name, section in sections.recipe().items()}
    whole["base"]["decoder"] = whole["data"]["template_options"] = _OPEN
    whole["data"]["sources"] = _AnyNames({**sections.source(), "columns": _AnyNames("")})
    whole["run"]["profile"] = (0, 0)
    whole["run"]["mesh"] = _SomeFields(whole["run"]["mesh"])
    whole["stages"] = _stages
    return whole


def _stages(stages: Mapping[str, Any]) -> dict[str, Any]:
    allocator = sections.allocator("", 0)
    stage = {
        **sections.stage(),
        "banks": _AnyNames(sections.bank()),
        "stack": _AnyNames(sections.stacked(())),
        "losses": _AnyNames(_loss),
        "allocators": _AnyNames(_SomeFields(dict(allocator), ("bank", "target_rank"))),
        "states": _AnyNames(""),
        "mixture": _AnyNames(0.0),
    }
    return {**dict.fromkeys(stages, stage), "order": ()}


def _loss(loss: Mapping[str, Any]) -> Any:
    """The fields of a loss of its kind; an unknown kind is told of where losses are made."""
    kind = REGULARISERS.get(str(loss.get("kind")))
    if kind is None:
        return _OPEN
    defaults = sections.defaults(kind)
    banks = tuple(f.name for f in dataclasses.fields(kind) if f.name not in defaults)
    return _SomeFields({"kind": "", **dict.fromkeys(banks, ""), **defaults}, ("kind", *banks))


def _check(path: str, value: Any, like: Any) -> None:
    """Raise unless a value is like a default, or has a section's fields; None takes anything."""
    mapping = isinstance(value, Mapping | ConfigDict)
    for text in value if mapping else [value]:
        check_utf8(text if isinstance(text, str) else "", f"{path}: " if path else "")
    like = like(value if mapping else {}) if callable(like) else like
    if like is None:
        return
    fields = _fields(like, value if mapping else {})
    if fields is None:
        _check_value(path, value, like)
        return
    if not mapping:
        raise ParameterError(f"{path}: {shown(value)} is not a section with fields")
    inside = f"{path}." if path else ""
    for name in value:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(fields)}"
            raise ParameterError(f"{inside}{name}: there is no such field; {hint}")
    needed = like.needed if isinstance(like, _SomeFields) else fields
    for name, default in fields.items():
        if name in value:
            _check(f"{inside}{name}", value[name], default)
        elif name in needed:
            raise ParameterError(f"{inside}{name}: is missing; make sections with training.config")


def _fields(like: Any, value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What each field of a section is like; None where `like` is the default of a value."""
    if isinstance(like, _AnyNames):
        return dict.fromkeys(value, like.of)
    if isinstance(like, _SomeFields):
        return like.of
    return like if isinstance(like, Mapping | ConfigDict) else None


def _check_value(path: str, value: Any, default: Any) -> None:
    if isinstance(default, tuple):
        if isinstance(value, list | tuple):
            for number, one in enumerate(value):
                _check(f"{path}[{number}]", one, default[0] if default else "")
            return
        hint = f"; write ({value!r},)" if isinstance(value, str) else ""
        raise ParameterError(f"{path}: {shown(value)} is not a list{hint}")
    kind = type(default)
    if isinstance(value, float) and kind is float:
        return  # NaN and infinity are told of by the limits
    if not fits(value, kind):
        raise ParameterError(f"{path}: {shown(value)} is not {words(kind)}")
