"""Drawings that answer the pointer: numbers beside a drawing, and one script that makes it live."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LINE_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#8b5cf6", "#ca8a04", "#0891b2")
DASHES = (("-", ""), ("--", "6 4"), (":", "2 3"))  # of matplotlib, and of SVG
SCRIPT = Path(__file__).with_name("chart.js")
STYLE = """
.chart .legend { display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin: 0 0 .5rem }
.chart button { font: inherit; font-size: .8rem; color: var(--ink); background: none;
  border: 1px solid var(--edge); border-radius: 6px; padding: .1rem .5rem; cursor: pointer }
.chart button[aria-pressed=false] { opacity: .45 }
.chart i { display: inline-block; width: .65rem; height: .65rem; border-radius: 2px;
  margin-right: .35rem }
.chart label { font-size: .85rem; color: var(--soft) } .chart input { vertical-align: middle }
.drawing { position: relative } .drawing text { font-size: 12px; fill: var(--soft) }
.drawing .grid { stroke: var(--edge) } .drawing .rule { stroke: var(--soft); display: none }
.drawing .line { fill: none; stroke-width: 1.8 } .drawing .span { stroke-width: 1.4 }
.tip { position: absolute; pointer-events: none; background: var(--card); color: var(--ink);
  border: 1px solid var(--edge); border-radius: 6px; padding: .3rem .5rem; font-size: .8rem;
  white-space: nowrap; z-index: 1 }
"""
_POINTS = 1000  # of a line on a page; of more, each is the mean of some
_MOMENTS = 60  # of a router on a page


def style_of(number: int) -> tuple[str, tuple[str, str]]:
    """Colour and dash of a line by its number."""
    dash = DASHES[number // len(LINE_COLOURS) % len(DASHES)]
    return LINE_COLOURS[number % len(LINE_COLOURS)], dash


def lines(
    series: Sequence[tuple[str, Sequence[float], Sequence[float] | np.ndarray]],
    x: str,
    y: str,
    span: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """What the script needs of a line plot: `series` of (name, steps, values), names of axes.

    `span`: values that the axis reaches at least.
    """
    out = []
    for number, (name, steps, values) in enumerate(series):
        colour, (_, dash) = style_of(number)
        at, means = _thinned(np.asarray(steps, np.float64), np.asarray(values, np.float64))
        out.append({"name": name, "colour": colour, "dash": dash, "x": at, "y": means})
    reach = _plain(np.asarray(span or (), np.float64))
    return {"kind": "lines", "x": x, "y": y, "series": out, "span": reach}


def intervals(
    labels: Sequence[str], series: Sequence[tuple[str, Sequence[tuple | None]]], x: str, y: str
) -> dict[str, Any]:
    """What the script needs of `series` of (name, (value, low, high) or None for each label)."""
    out = []
    for number, (name, found) in enumerate(series):
        colour, (_, dash) = style_of(number)
        places = [i for i, one in enumerate(found) if one is not None]
        values = np.asarray([found[i] for i in places], np.float64).reshape(-1, 3)
        one = {"name": name, "colour": colour, "dash": dash, "x": places}
        out.append(one | dict(zip(("y", "low", "high"), map(_plain, values.T), strict=True)))
    return {"kind": "lines", "x": x, "y": y, "labels": list(labels), "series": out}


def moments(
    title: str,
    matrices: Mapping[str, Sequence[Sequence[float]] | np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
) -> dict[str, Any]:
    """What the script needs of matrices by the names of their moments, in order."""
    chosen = spread(list(matrices), _MOMENTS)
    values = {name: np.asarray(matrices[name], np.float64) for name in chosen}
    return {
        "kind": "moments",
        "title": title,
        "rows": list(rows),
        "columns": list(columns),
        "most": max(float(np.max(one)) for one in values.values()),
        "moments": [
            {"name": name, "values": [_plain(row) for row in one]} for name, one in values.items()
        ],
    }


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)]


def figure(drawing: str, data: Mapping[str, Any]) -> str:
    """A drawing, as HTML, with its numbers; no name in them can end the block that holds them."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    numbers = f'<script type="application/json">{text}</script>'
    return drawing.replace("<figure>", '<figure class="chart">', 1).replace(
        "</figure>", f"{numbers}</figure>"
    )


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[list, list]:
    """Points of a line, each the mean of as many as it takes to have few."""
    size = -(-len(values) // _POINTS) or 1
    if size > 1:
        cuts = np.arange(size, len(values), size)
        steps = np.array([part[-1] for part in np.split(steps, cuts)])
        values = np.array([part.mean() for part in np.split(values, cuts)])
    return _plain(steps), _plain(values)


def _plain(values: np.ndarray) -> list[float | None]:
    """Numbers of six digits for JSON, which has none that is not finite."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
