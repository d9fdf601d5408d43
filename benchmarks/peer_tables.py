"""The tables of docs/comparison.md in Markdown, from the figures of peers.py alone.

Figures are `{device: {"recipes": {recipe: {who: {"parameters", how: {"seconds", "first",
"peak_gib"}}}}, ...}}`; who is not there has `{"missing": why}`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import markdown
from benchmarks.peer_task import LORA, MEDCARE, MING, OURS

PART = "figures"  # of the page
NAMES = {
    OURS: OURS,
    "peft": "PEFT, transformers",
    "tunix": "tunix, qwix",
    "naive": "written plainly, PyTorch",
}
TITLES = {
    LORA: "LoRA of rank 16 on every linear layer",
    MING: "MING-MOE",
    MEDCARE: "MedCare, stage 1",
}
DEVICES = {"cpu": "processor", "gpu": "GPU"}
Sides = Mapping[str, Mapping[str, Any]]


def tables(results: Mapping[str, Any]) -> str:
    """A part a device; what one of them was not measured on is not there."""
    there = [device for device in DEVICES if device in results]
    return "\n\n".join(_device(DEVICES[d], results[d]) for d in there)


def _device(title: str, run: Mapping[str, Any]) -> str:
    parts = [f"### On a {title}", _conditions(run)]
    for recipe, sides in run["recipes"].items():
        count = sides[OURS]["parameters"]
        parts.append(f"**{TITLES[recipe]}**: {count:,} trained parameters")
        parts.append(table(sides, run["rows"] * run["tokens"]))
        parts += [line for line in (absent(sides), lost(sides)) if line]
    return "\n\n".join(parts)


def _conditions(run: Mapping[str, Any]) -> str:
    """What was measured, when and on what, with all versions."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = ", ".join(filter(None, (run["device"], machine["processor"])))
    steps = run["rounds"] * run["steps"]
    return (
        f"{run['date']}, {where}, {machine['cores']} cores. {run['base']}, {run['dtype']}, "
        f"{run['rows']} x {run['tokens']} tokens, {run['targets']:,} of them targets; "
        f"{'one step' if steps == 1 else f'medians of {steps} steps'}. "
        f"Python {machine['python']}, {OURS} {run['version']}, {versions}."
    )


def hows(sides: Sides) -> list[str]:
    """The ways that there are figures of: the one to compare by, then as users have it."""
    return [how for how in ("tuned", "heap", "installed") if how in sides[OURS]]


def seconds(side: Mapping[str, Any], how: str) -> float:
    """The median of a contender's steps."""
    return statistics.median(side[how]["seconds"])


def table(sides: Sides, tokens: int) -> str:
    """A row a contender: speed in each way; first step and memory in the last of them."""
    header = [""]
    for how in hows(sides):
        suffix = "" if len(hows(sides)) == 1 else f", {_how(how)}"
        header += [f"tokens/s{suffix}", "s a step", f"time over {OURS}"]
    header += ["first step, s", "peak GiB"]
    lines = [[NAMES[who], *_cells(sides, side, tokens)] for who, side in sides.items()]
    return markdown(header, lines)


def _cells(sides: Sides, side: Mapping[str, Any], tokens: int) -> list[str]:
    if "missing" in side:
        return ["–"] * (3 * len(hows(sides)) + 2)
    out = []
    for how in hows(sides):
        s = seconds(side, how)
        out += [f"{tokens / s:,.0f}", f"{s:.3g}", f"{s / seconds(sides[OURS], how):.2f}"]
    last = side[hows(sides)[-1]]
    return [*out, f"{last['first']:.1f}", f"{last['peak_gib']:.2f}"]


def absent(sides: Sides) -> str:
    """A sentence on who is not there, or ""."""
    reasons = [f"{NAMES[who]}: {one['missing']}." for who, one in sides.items() if "missing" in one]
    return " ".join(reasons)


def lost(sides: Sides) -> str:
    """A sentence on where another takes less than we, as the table shows it."""
    places = []
    for who, side in sides.items():
        if who == OURS or "missing" in side:
            continue
        for what, theirs, ours in _compared(sides, side):
            if theirs < ours:
                places.append(f"{what} of {NAMES[who]} is {theirs / ours:.2f} of ours")
    return f"Where {OURS} loses: {'; '.join(places)}." if places else f"{OURS} loses nowhere here."


def _compared(sides: Sides, side: Mapping[str, Any]) -> Sequence[tuple[str, float, float]]:
    """Name, theirs and ours, of all that a table compares."""
    ours = sides[OURS]
    found = [
        (f"the step{_suffix(sides, how)}", seconds(side, how), seconds(ours, how))
        for how in hows(sides)
    ]
    for name, what in (("first", "the first step"), ("peak_gib", "the memory")):
        found.append((what, side[hows(sides)[-1]][name], ours[hows(sides)[-1]][name]))
    return found


def _how(how: str) -> str:
    return {"installed": "as installed", "heap": "heap kept"}.get(how, how)


def _suffix(sides: Sides, how: str) -> str:
    """Which way, where there are several."""
    return f", {_how(how)}," if len(hows(sides)) > 1 else ""
