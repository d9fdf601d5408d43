"""Calls of functions in what a chat template wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def left_out(calls: Sequence[Mapping[str, Any]], markup: str) -> Any:
    """The first name, key or value of some calls that a template did not write, or None.

    Args:
      calls: with their arguments as objects. Texts in these are not looked for, and null is not, as
        templates may leave it out.
      markup: what stands where the calls should, without the texts of people, which may hold a
        name by chance.
    """
    at = 0
    for call in calls:
        name = call["function"]["name"]
        found = markup.find(name, at)
        if found < 0:
            return name
        at = found + len(name)
        for part in _parts(call["function"].get("arguments", {})):
            if str(part) not in markup and escaped(part) not in markup:
                return part
    return None


def escaped(value: Any) -> str:
    """A value as it stands in JSON; a text without the quotes around it."""
    written = json.dumps(value, ensure_ascii=False)
    return written[1:-1] if isinstance(value, str) else written


def _parts(value: Any) -> Iterator[Any]:
    """The keys in a JSON value, and the values in it that are neither text nor null."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _parts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item)
    elif value is not None and not isinstance(value, str):
        yield value
