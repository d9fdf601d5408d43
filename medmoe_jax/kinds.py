"""Whether a decoded JSON value is of a type that is written as Python writes types."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from medmoe_jax.errors import UserError

Number = int | float  # that is finite
_DIGITS = re.compile(r"[0-9]{1,18}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: `str`, `list[int]`, `dict[str, Number] | None` and the like.

    Truth values are no numbers, and NaN and infinity are of no type.
    """
    arguments, origin = get_args(hint), get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(one, arguments[0]) for one in value)
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, dict) else ()
        known = all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in pairs)
        return isinstance(value, dict) and known
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, float | int if hint is float else hint)


def wrong_fields(fields: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """What is wrong with those of some fields that are there, a line each."""
    return [
        f"{name}: {shown(fields[name])} is not {words(hint)}"
        for name, hint in hints.items()
        if name in fields and not fits(fields[name], hint)
    ]


def check_fields(fields: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """Raise UserError, beginning with `where`, for the first field that is of another type."""
    for line in wrong_fields(fields, hints)[:1]:
        raise UserError(f"{where}: {line}")


def whole_number(text: str) -> int | None:
    """The number that a text of up to 18 of the digits 0-9 writes; None for any other text."""
    return int(text) if _DIGITS.fullmatch(text) else None


def shown(value: Any) -> str:
    """A value for a message: its beginning."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}…"


def words(hint: Any) -> str:
    """A type in words."""
    arguments, origin = get_args(hint), get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        if {int, float} <= set(arguments):
            arguments = [one for one in arguments if one is not int]
        return " or ".join(dict.fromkeys(words(one) for one in arguments))
    if origin in (list, Sequence, dict, Mapping):
        what = "a list" if origin in (list, Sequence) else "an object"
        of = "" if arguments[-1] is Any else f" of {words(arguments[-1])}"
        return what + of
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return "null" if hint in (None, type(None)) else names.get(hint, "a value")
