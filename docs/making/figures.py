"""The figures of the pages, as SVG: drawn from the recipes where they show what a recipe does.

python -m docs.making.figures          # writes docs/figures/*.svg; a test holds them to this
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.api.configs import config
from medmoe_jax.base.config import site_shapes
from medmoe_jax.base.presets import preset
from medmoe_jax.training import recipe
from medmoe_jax.training.transitions import roster_of

FOLDER = Path(__file__).parents[1] / "figures"
INK, GREY, PAPER = "#263238", "#90a4ae", "#ffffff"
# The states of a bank, in the order of the legend; a bank that is not there has no cell.
COLOURS = {
    "train": "#00897b",
    "gate": "#7cb342",
    "frozen": "#90caf9",
    "merged": "#ffcc80",
    "off": "#eceff1",
}
BANKS = ("#00897b", "#5c6bc0", "#f9a825")  # of banks, where a figure is of no states
WORDS = {"gate": "gate trains", "train": "trains", "merged": "in W"}


class Drawing:
    """An SVG picture that grows by shapes; lengths are in pixels, y goes down."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._shapes: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = PAPER, line: str = INK
    ) -> None:
        """A rectangle with its upper left corner at (x, y)."""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def text(
        self, x: float, y: float, words: str, size: int = 14, anchor: str = "middle",
        colour: str = INK, weight: str = "normal",
    ) -> None:  # fmt: skip
        """A line of text whose base line is at y; `anchor` says which part of it is at x."""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}" font-weight="{weight}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" '
            f'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="sans-serif">',
                f"<defs>{head}</defs>",
                f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )


def rosters(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """`(stage, {bank: state})` of every stage of a shipped recipe."""
    stages = recipe.parse(config(name), preset(name.partition(":")[2].split(",")[0]))
    for stage in stages:
        found = roster_of(stages, stage.name)
        yield stage.name, {bank: state for bank, (_, state) in found.items()}


def draw_states(
    drawing: Drawing, x: float, y: float, table: Sequence[tuple[str, Mapping[str, str]]],
    cell: tuple[float, float] = (104, 30), left: float = 104,
) -> None:  # fmt: skip
    """What becomes of the banks: a row a bank, a column a stage, with its upper left at (x, y)."""
    w, h = cell
    wide = w > 60
    names = list(dict.fromkeys(bank for _, row in table for bank in row))
    for j, (stage, _) in enumerate(table):
        words = stage if wide else str(j + 1)
        drawing.text(x + left + (j + 0.5) * w, y + 12, words, 13, weight="bold")
    for i, bank in enumerate(names):
        top = y + 20 + i * (h + 4)
        drawing.text(x + left - 8, top + h / 2 + 5, bank, 13, "end")
        for j, (_, row) in enumerate(table):
            state = row.get(bank)
            if state:
                drawing.box(x + left + j * w + 2, top, w - 4, h, COLOURS[state], PAPER)
                ink = PAPER if state == "train" else INK
                if wide:
                    centre = x + left + (j + 0.5) * w
                    drawing.text(centre, top + h / 2 + 5, WORDS.get(state, state), 13, colour=ink)


def draw_legend(drawing: Drawing, x: float, y: float, states: Sequence[str]) -> None:
    """The colours of some states, side by side."""
    for i, state in enumerate(states):
        drawing.box(x + i * 110, y - 12, 16, 16, COLOURS[state], GREY)
        drawing.text(x + i * 110 + 22, y + 1, WORDS.get(state, state), 13, "start")


def draw_site(drawing: Drawing, x: float, y: float) -> None:
    """One linear layer with two banks, 430 by 250, with its upper left at (x, y)."""
    drawing.text(x + 12, y + 118, "x", 18, weight="bold")
    lanes = [(y + 28, "", 0), (y + 113, "bank “noise”: 8 experts, a router picks 2", 8),
             (y + 198, "bank “knowledge”: 1 expert", 1)]  # fmt: skip
    for middle, title, experts in lanes:
        drawing.arrow((x + 24, y + 113), (x + 50, y + 113), (x + 50, middle), (x + 76, middle))
        if not experts:
            drawing.box(x + 80, middle - 22, 250, 44, "#cfd8dc")
            drawing.text(x + 205, middle + 5, "W  (base, frozen)")
        else:
            drawing.text(x + 205, middle - 26, title, 12)
            drawing.box(x + 80, middle - 18, 60, 36, COLOURS["train"])
            drawing.text(x + 110, middle + 6, "A", 16, colour=PAPER)
            drawing.arrow((x + 140, middle), (x + 158, middle))
            drawing.box(x + 162, middle - 18, 86, 36, "#e0f2f1")
            for e in range(experts):
                w = 78 / experts
                weight = {2: 0.7, 5: 0.3}.get(e, 0) if experts > 1 else 1
                if weight:
                    fill = COLOURS["gate"]
                    drawing.box(
                        x + 166 + e * w, middle + 14 - 28 * weight, w, 28 * weight, fill, fill
                    )
            drawing.arrow((x + 248, middle), (x + 266, middle))
            drawing.box(x + 270, middle - 18, 60, 36, COLOURS["train"])
            drawing.text(x + 300, middle + 6, "s B", 16, colour=PAPER)
        turn = (x + 398, y + 113 + (14 if middle > y + 113 else -14))
        own = middle == y + 113
        drawing.arrow(
            (x + 330, middle), *([(x + 386, middle)] if own else [(x + 398, middle), turn])
        )
    drawing.text(x + 205, y + 242, "gate(x), on the ranks", 12, colour="#558b2f")
    drawing.text(x + 398, y + 119, "Σ", 20, weight="bold")
    drawing.arrow((x + 410, y + 113), (x + 430, y + 113))
    drawing.text(x + 440, y + 118, "y", 18, weight="bold")


def overview() -> Drawing:
    """A layer with its banks, and what MedCare's two stages do with them."""
    drawing = Drawing(900, 330)
    drawing.text(225, 26, "One linear layer of the decoder", 16, weight="bold")
    draw_site(drawing, 10, 56)
    drawing.text(680, 26, "A recipe is a list of stages (MedCare)", 16, weight="bold")
    draw_states(drawing, 500, 62, list(rosters("medcare:qwen1.5-1.8b")), (132, 34))
    drawing.text(680, 250, "Between them: “attention” is merged into W,", 13)
    drawing.text(680, 268, "“noise” is dropped, “knowledge” is frozen.", 13)
    drawing.text(680, 294, "After them all folds: a plain dense model.", 13)
    return drawing


def site() -> Drawing:
    """The left half of the overview."""
    drawing = Drawing(470, 270)
    draw_site(drawing, 10, 14)
    return drawing


def gates() -> Drawing:
    """The weights that each gate gives to eight tokens: a row a token, a column an expert."""
    pairs = [(2, 5), (0, 2), (5, 7), (2, 3), (1, 6), (4, 5), (0, 7), (3, 6)]
    forced = [(0, 2), (0, 5), (0, 7), (1, 2), (1, 6), (3, 5), (3, 7), (3, 6)]
    mixed = [0.1, 0.9, 0.0, 0.4, 0.0, 0.2, 0.7, 0.05]
    panels = {
        "always": [[1.0]] * 8,
        "token": [[{a: 0.7, b: 0.3}.get(e, 0) for e in range(8)] for a, b in pairs],
        "language": [[{a: 0.6, b: 0.4}.get(e, 0) for e in range(8)] for a, b in forced],
        "skill": [mixed] * 8,
    }
    under = {
        "always": "weight 1",
        "token": "a router, top 2",
        "language": "… with the language's own",
        "skill": "the same for all tokens",
    }
    drawing = Drawing(860, 260)
    for i, (name, weights) in enumerate(panels.items()):
        x = 60 + i * 205
        drawing.text(x + 72, 24, name, 16, weight="bold")
        for t, row in enumerate(weights):
            for e, weight in enumerate(row):
                left = x + (144 - 18 * len(row)) / 2 + 18 * e
                shade = round(255 - 205 * weight)
                fill = f"#{shade:02x}{round(255 - 118 * weight):02x}{round(255 - 132 * weight):02x}"
                drawing.box(left, 40 + 20 * t, 17, 18, fill, "#cfd8dc")
        drawing.text(x + 72, 222, "experts →", 12, colour="#546e7a")
        drawing.text(x + 72, 244, under[name], 13)
    drawing.text(30, 124, "tokens", 12, colour="#546e7a")
    drawing.text(30, 140, "↓", 14, colour="#546e7a")
    return drawing


def method(name: str, note: str = "") -> Drawing:
    """What becomes of a recipe's banks from stage to stage."""
    table = list(rosters(name))
    banks = len({bank for _, row in table for bank in row})
    many = len(table) > 4
    cell, left = ((34.0, 18.0), 190.0) if many else ((150.0, 32.0), 110.0)
    height = 46 + banks * (cell[1] + 4) + 50 + (20 if many else 0)
    used = [s for s in COLOURS if any(s in row.values() for _, row in table)]
    width = max(left + len(table) * cell[0], 110 * len(used)) + 20
    drawing = Drawing(round(width), round(height))
    drawing.text(left + len(table) * cell[0] / 2, 18, note or "stage", 13, colour="#546e7a")
    draw_states(drawing, 0, 28, table, cell, left)
    draw_legend(drawing, 20, height - 14, used)
    return drawing


def places(name: str) -> Drawing:
    """Where the banks of a recipe's first stage sit: a row a layer, a column a site."""
    base = preset(name.partition(":")[2].split(",")[0])
    banks = recipe.parse(config(name), base)[0].added
    sites, colours = (
        list(site_shapes(base)),
        dict(zip((b.name for b in banks), BANKS, strict=False)),
    )
    left, w, h = 90, 66, 11
    bottom = 40 + base.n_layers * h
    drawing = Drawing(left + len(sites) * w + 20, bottom + 40 + 24 * len(banks))
    for j, site in enumerate(sites):
        drawing.text(left + (j + 0.5) * w, 24, site, 12, weight="bold")
        for layer in range(base.n_layers):
            on = [b for b in banks if site in b.sites and b.start <= layer < b.stop]
            fill = colours[on[0].name] if on else "#cfd8dc"
            drawing.box(left + j * w + 2, bottom - (layer + 1) * h, w - 4, h - 2, fill, PAPER)
    drawing.text(left - 8, bottom - 2, "layer 1", 12, "end")
    drawing.text(left - 8, 52, f"layer {base.n_layers}", 12, "end")
    told = [("#cfd8dc", "base alone")]
    told += [(colours[b.name], f"“{b.name}”: {_of(b)}") for b in banks]
    for i, (colour, words) in enumerate(told):
        drawing.box(left, bottom + 12 + 24 * i, 16, 16, colour, GREY)
        drawing.text(left + 22, bottom + 25 + 24 * i, words, 13, "start")
    return drawing


def _of(bank: BankSpec) -> str:
    """What a bank's experts are, in words."""
    many = "one LoRA" if bank.experts == 1 else f"{bank.experts} experts, top {bank.top_k}"
    return (
        f"{many}, rank {bank.rank}"
        if not bank.whole
        else f"{bank.experts} networks, top {bank.top_k}"
    )


def figures() -> dict[str, Drawing]:
    """Every figure by the name of its file."""
    return {
        "overview": overview(),
        "site": site(),
        "gates": gates(),
        "medcare": method("medcare:qwen1.5-1.8b"),
        "ming_moe": places("ming_moe:qwen1.5-1.8b"),
        "apollo_moe": places("apollo_moe:qwen2-0.5b"),
        "sa_mdkif": method("sa_mdkif:qwen1.5-1.8b", "stages 1 to 12: a skill each; 13: a task"),
    }


def main() -> int:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in figures().items():
        (FOLDER / f"{name}.svg").write_text(drawing.svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
