"""One self-contained HTML page of tables, line plots and heat maps, for light and dark screens.

Its figures can be had as PNG files as well.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medmoe_jax.checkpoints.files import write_bytes, write_text
from medmoe_jax.evaluation import charts
from medmoe_jax.evaluation.report import COLUMNS, Report, percent
from medmoe_jax.storage.places import place

INK = "#010203"  # stands for the page's text colour in figures
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c2024; --soft: #6b7280;
  --edge: #e4e4e1; --bar: #3b82f6; --reach: #93b8f5; --mark: #e11d48; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e6e8eb;
  --soft: #9aa2ad; --edge: #31353d; --bar: #60a5fa; --reach: #3a5d92; --mark: #fb7185; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 0 0 .75rem }
p { margin: .25rem 0 .75rem } .note { color: var(--soft); font-size: .9rem }
nav { margin: 0 0 1.5rem; font-size: .9rem } nav a { color: var(--bar); margin-right: 1rem }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 1.1rem 1.25rem; margin: 0 0 1.25rem; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th { text-align: left; color: var(--soft); font-weight: 600 }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--edge); vertical-align: top }
tr:last-child td { border-bottom: 0 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
figure { margin: 0 } figure svg { max-width: 100%; height: auto; display: block; margin: 0 auto }
"""


@dataclass(frozen=True)
class TableSection:
    """A table; `rows` of cells, columns of numbers are set right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def body(self) -> str:
        return _table(self.columns, self.rows)


@dataclass(frozen=True)
class LinesSection:
    """A line plot; `series` of (name, steps, values).

    span: values that the axis reaches at least, so that several plots have one scale.
    """

    title: str
    series: Sequence[tuple[str, Sequence[float], Sequence[float] | np.ndarray]]
    x: str = "step"
    y: str = "loss"
    note: str = ""
    span: tuple[float, float] | None = None

    def figure(self) -> Figure:
        figure = Figure(figsize=(8.4, 3.6))
        axes = figure.add_subplot()
        for i, (name, steps, values) in enumerate(self.series):
            colour, (style, _) = charts.style_of(i)
            axes.plot(steps, values, style, color=colour, linewidth=1.6, label=name)
        if self.span:
            axes.update_datalim([(self.series[0][1][0], value) for value in self.span])
            axes.autoscale_view()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _dress(axes, self.x, self.y, len(self.series))
        return figure

    def body(self) -> str:
        return _svg(self.figure())

    def data(self) -> dict[str, Any]:
        return charts.lines(self.series, self.x, self.y, self.span)


@dataclass(frozen=True)
class IntervalsSection:
    """Values with their intervals over a few labels; `series` of (name, values).

    Each value is (value, low, high), or None where a label has none.
    """

    title: str
    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]]
    x: str = ""
    y: str = ""
    note: str = ""

    def figure(self) -> Figure:
        figure = Figure(figsize=(8.4, 3.6))
        axes = figure.add_subplot()
        for i, (name, found) in enumerate(self.series):
            colour, (style, _) = charts.style_of(i)
            places = [at for at, one in enumerate(found) if one is not None]
            value, low, high = np.asarray([found[at] for at in places]).reshape(-1, 3).T
            # A bootstrap's interval may lie beside the value.
            reach = np.maximum((value - low, high - value), 0)
            axes.errorbar(
                places, value, reach, fmt=f"o{style}", color=colour,
                label=name, linewidth=1.2, markersize=4, capsize=3,
            )  # fmt: skip
        axes.set_xticks(range(len(self.labels)), self.labels)
        axes.set_xlim(-0.5, len(self.labels) - 0.5)
        _dress(axes, self.x, self.y, len(self.series))
        return figure

    def body(self) -> str:
        return _svg(self.figure())

    def data(self) -> dict[str, Any]:
        return charts.intervals(self.labels, self.series, self.x, self.y)


@dataclass(frozen=True)
class HeatMapSection:
    """A matrix `[rows, columns]` as colours, with its numbers where they fit.

    span: the values of the first and the last colour; by default those of the matrix.
    """

    title: str
    matrix: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    x: str = ""
    y: str = ""
    note: str = ""
    span: tuple[float, float] | None = None

    def figure(self) -> Figure:
        values = np.asarray(self.matrix, np.float64)
        if values.shape != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"heat map {self.title!r}: matrix {values.shape} with {len(self.rows)} row and "
                f"{len(self.columns)} column names"
            )
        height, width = values.shape
        figure = Figure(figsize=(min(9.0, 2.4 + 0.55 * width), 1.3 + 0.3 * height))
        axes = figure.add_subplot()
        low, high = self.span or (np.nanmin(values), np.nanmax(values))
        mesh = axes.pcolormesh(values, cmap="viridis", vmin=low, vmax=high, linewidth=0)
        slanted = width > 12 or max(map(len, self.columns)) > 10
        turned: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        )
        axes.set_xticks(np.arange(width) + 0.5, self.columns, **turned)
        axes.set_yticks(np.arange(height) + 0.5, self.rows)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        if width <= 16:
            for i, j in np.ndindex(height, width):
                light = values[i, j] > low + 0.6 * (high - low)
                colour = "black" if light else "white"
                axes.text(j + 0.5, i + 0.5, f"{values[i, j]:.2f}", color=colour, **_CENTRED)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return figure

    def body(self) -> str:
        return _svg(self.figure())


@dataclass(frozen=True)
class HeatMapsSection:
    """Matrices `[rows, columns]` by name, side by side, in one scale of colours from 0 up."""

    title: str
    matrices: Mapping[str, Sequence[Sequence[float]] | np.ndarray]
    rows: Sequence[str]
    columns: Sequence[str]
    note: str = ""

    def figure(self) -> Figure:
        height, width = len(self.rows), len(self.columns)
        panel = (min(4.2, 0.9 + 0.22 * width), min(5.0, 0.8 + 0.2 * height))
        across = min(len(self.matrices), max(1, int(9.6 / panel[0])))
        down = -(-len(self.matrices) // across)
        figure = Figure(figsize=(across * panel[0], down * panel[1]), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        most = max(np.max(matrix) for matrix in self.matrices.values())
        for i, (axes, (name, matrix)) in enumerate(zip(grid, self.matrices.items(), strict=False)):
            mesh = axes.pcolormesh(np.asarray(matrix), cmap="viridis", vmin=0, vmax=most)
            axes.set_title(name, fontsize=9, color=INK)
            axes.set_xticks(np.arange(width) + 0.5, self.columns, rotation=90, fontsize=6)
            axes.set_yticks(np.arange(height) + 0.5, self.rows, fontsize=6)
            axes.tick_params(length=0, labelbottom=i >= len(self.matrices) - across)
            axes.spines[:].set_visible(False)
        axes.set_ylim(height, 0)  # the first row above; the axes are shared
        for empty in grid[len(self.matrices) :]:
            empty.remove()
        bar = figure.colorbar(mesh, ax=list(grid[: len(self.matrices)]), fraction=0.05, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=6)
        figure.draw_without_rendering()  # settles the layout, before a box is drawn around it
        return figure

    def body(self) -> str:
        return _svg(self.figure())


@dataclass(frozen=True)
class MomentsSection:
    """Matrices `[rows, columns]` of several moments in order; drawn are some, evenly spaced."""

    title: str
    matrices: Mapping[str, Sequence[Sequence[float]] | np.ndarray]
    rows: Sequence[str]
    columns: Sequence[str]
    note: str = ""

    def figure(self) -> Figure:
        some = {name: self.matrices[name] for name in charts.spread(list(self.matrices), _DRAWN)}
        return HeatMapsSection(self.title, some, self.rows, self.columns).figure()

    def body(self) -> str:
        return _svg(self.figure())

    def data(self) -> dict[str, Any]:
        return charts.moments(self.title, self.matrices, self.rows, self.columns)


@dataclass(frozen=True)
class TextSection:
    """Paragraphs of plain text, parted by blank lines."""

    title: str
    text: str
    note: str = ""

    def body(self) -> str:
        return "".join(f"<p>{html.escape(p)}</p>" for p in self.text.split("\n\n"))


@dataclass(frozen=True)
class ResultsSection:
    """An evaluation report: its table, with score, interval and majority drawn as well."""

    title: str
    report: Report
    note: str = (
        "Bar: score; pale: 95% interval; red mark: always the commonest training answer; "
        "grey mark: chance."
    )

    def body(self) -> str:
        columns = [*COLUMNS[:3], "0 … 100", *COLUMNS[3:]]
        rows: list[list[object]] = []
        for result in self.report.results:
            cells = result.cells()
            rows.append([*cells[:3], _bar(result), *cells[3:]])
            rows += [["", name, percent(value)] for name, value in result.also.items()]
        return _table(columns, rows)


Live = LinesSection | IntervalsSection | MomentsSection
Picture = Live | HeatMapSection | HeatMapsSection
Section = TableSection | TextSection | ResultsSection | Picture
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
_LEGEND = 8  # lines with more names have them beside the plot
_DRAWN = 4  # moments


# A `$` in a name is a `$`, not the beginning of mathematics.
_as_written = mpl.rc_context({"text.parse_math": False})


@_as_written
def save_png(path: str | Path, picture: Picture) -> Path:
    """Writes a section's figure, with its title, as a PNG on white; whole or absent."""
    figure = picture.figure()
    figure.suptitle(picture.title, fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    write_bytes(path, image.getvalue())
    return place(path)


def report_html(
    path: str | Path,
    sections: Sequence[Section],
    title: str = "medmoe_jax report",
    links: Mapping[str, str] | None = None,
    live: bool = False,
) -> Path:
    """Writes one HTML page that needs nothing else; see `page_html`; whole or absent."""
    write_text(path, page_html(sections, title, links, live))
    return place(path)


@_as_written
def page_html(
    sections: Sequence[Section],
    title: str,
    links: Mapping[str, str] | None = None,
    live: bool = False,
) -> str:
    """A page with figures inline as SVG, which fetches nothing.

    Args:
      sections: in order.
      title: of the page.
      links: addresses of other pages by what is said of them, relative to this one.
      live: whether its drawings answer the pointer, by a script in the page; else it has none.
    """
    parts = []
    for number, section in enumerate(sections, 1):
        note = f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
        heading = f"<h2>{html.escape(section.title)}</h2>"
        body = section.body()
        if live and isinstance(section, Live):
            body = charts.figure(body, section.data())
        parts.append(f'<section id="s{number}">{heading}{body}{note}</section>')
    addresses: dict[str, str] = {}
    for number, section in enumerate(sections, 1):
        # "align: loss" and "align: gradient norm" are found by "align".
        addresses.setdefault(section.title.split(": ")[0], f"#s{number}")
    navigation = "".join(
        f'<a href="{html.escape(address)}">{html.escape(text)}</a>'
        for text, address in [*(links or {}).items(), *addresses.items()]
    )
    script = f"<script>{charts.SCRIPT.read_text(encoding='utf-8')}</script>" if live else ""
    style = _STYLE + (charts.STYLE if live else "")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><nav>{navigation}</nav>{''.join(parts)}{script}"
        "</body></html>\n"
    )


def framed(page: str) -> str:
    """A page within another, in a frame of its own, so that neither changes the other's style."""
    style = "width: 100%; height: 40rem; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'


class _Markup(str):
    """What stands in a table as it is."""


_NUMBER = re.compile(r"[-+−]?[\d.,]+(?:e[-+]?\d+)?%?(?: ?– ?[-+−]?[\d.]+)?|")


def _table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """The table in HTML; a column whose cells are numbers stands to the right, its heading too."""
    texts = [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows]
    kinds = []
    for number in range(len(columns)):
        cells = [str(row[number]) for row in texts if number < len(row)]
        numeric = any(cells) and all(map(_NUMBER.fullmatch, cells))
        kinds.append(' class="number"' if numeric else "")

    def line(cells: Sequence[object], tag: str) -> str:
        shown = [x if isinstance(x, _Markup) else html.escape(str(x)) for x in cells]
        inner = "".join(f"<{tag}{k}>{x}</{tag}>" for k, x in zip(kinds, shown, strict=False))
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in texts)
    return f"<table><thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def _bar(result) -> _Markup:
    """Score, interval, chance and majority on a line from 0 to 100."""
    mark = ""
    for value, colour in ((result.chance, "--soft"), (result.majority, "--mark")):
        if value is not None:
            x = 100 * value - 0.6
            mark += f'<rect x="{x:.1f}" width="1.2" height="14" fill="var({colour})"/>'
    return _Markup(
        '<svg width="120" height="14" viewBox="0 0 100 14" preserveAspectRatio="none">'
        '<rect y="6" width="100" height="2" fill="var(--edge)"/>'
        f'<rect y="4" width="{100 * result.score:.1f}" height="6" fill="var(--bar)"/>'
        f'<rect x="{100 * result.low:.1f}" y="2" height="10" opacity="0.75" fill="var(--reach)" '
        f'width="{100 * (result.high - result.low):.1f}"/>{mark}</svg>'
    )


def _dress(axes: Axes, x: str, y: str, lines: int) -> None:
    """Names of the axes, a grid, and a legend of so many lines."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        many = lines > _LEGEND
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}
        columns = -(-lines // 16)
        axes.legend(frameon=False, fontsize=7 if many else 9, ncols=columns, **place)


def _svg(figure: Figure) -> str:
    """The figure as inline SVG that takes the page's text colour and fonts."""
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.patch.set_alpha(0)
        axes.spines[:].set_edgecolor(INK)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set_color(INK)
    figure.patch.set_alpha(0)
    page = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(page, format="svg", bbox_inches="tight", metadata=empty)
    svg = page.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg.replace(INK, 'currentColor')}</figure>"
