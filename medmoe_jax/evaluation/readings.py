"""Letters as the code of published methods reads them in text: tables/readings.toml."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medmoe_jax.errors import UserError

READINGS: dict[str, dict] = tomllib.loads(
    (Path(__file__).with_name("tables") / "readings.toml").read_text(encoding="utf-8")
)


def find(name: str) -> str:
    """The reading of a name or an alias. Raises UserError for another, with the closest."""
    names = {alias: key for key, entry in READINGS.items() for alias in (key, *entry["aliases"])}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"compat: {name!r} is none of {', '.join(names)}{hint}")
    return names[name]


def read(name: str, text: str, choices: Sequence[str]) -> str | None:
    """The letter that a reading finds in a text, or None; it may be no choice of the item's."""
    entry = READINGS[name]
    span = _span(entry, text)
    if span in entry.get("words", {}):
        return entry["words"][span]
    for pattern in entry["patterns"]:
        found = [match.group(match.lastindex or 0).upper() for match in re.finditer(pattern, span)]
        if found:
            return _take(entry["take"], found)
    return None


def _span(entry: dict, text: str) -> str:
    if entry["span"] == "line":
        return next((line for line in text.split("\n") if line), "")
    if entry["span"] == "tail":
        last = text.rstrip("\n").rpartition("\n")[2]
        start = re.search(entry["after"], last)
        return last[start.end() :] if start else ""
    return text


def _take(how: str, found: list[str]) -> str | None:
    if how == "commonest":
        return Counter(found).most_common(1)[0][0]
    if how == "all":
        return found[0] if len(set(found)) == 1 else None
    return found[0] if how == "first" else found[-1]
