"""Which experts spoke, as bars on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.text import Text

from medmoe_jax.evaluation.routing import Gate
from medmoe_jax.routing import telemetry

_WIDTH = 40
_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of experts, where there is no colour
_COLOURS = ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_blue", "bright_green",
            "bright_yellow", "bright_magenta", "bright_cyan", "bright_red")  # fmt: skip


def bars(gates: Sequence[Gate]) -> Group:
    """A block of lines for each bank, a bar a layer: the experts' shares over all its sites."""
    banks: dict[str, list[Gate]] = {}
    for gate in gates:
        banks.setdefault(gate.name.partition("/")[0], []).append(gate)
    return Group(*(line for name, own in banks.items() for line in _bank(name, own)))


def _bank(name: str, gates: Sequence[Gate]) -> list[Text]:
    """Title, one bar a layer, and what the signs stand for."""
    first = gates[0]
    mixed = first.name.endswith("/mix")
    what = "the same for every token" if mixed else f"{int(first.tokens_G[0])} tokens"
    share_NxE = telemetry.shares(np.sum([gate.use_GxNxE[0] for gate in gates], axis=0))
    lines = [Text(f"{name}: {what}", style="bold")]
    for number, share_E in enumerate(share_NxE):
        order = np.argsort(-share_E, kind="stable")[:3]
        most = ", ".join(f"{first.experts[e]} {share_E[e]:.0%}" for e in order if share_E[e] > 0)
        line = Text(f"  layer {first.first_layer + number:>3} ")
        for expert, cells in enumerate(_cells(share_E)):
            line.append(_sign(expert) * cells, style=_colour(expert))
        lines.append(line.append(f" {most}"))
    legend = Text("  experts   ")
    for expert, shown in enumerate(first.experts):
        legend.append(_sign(expert), style=_colour(expert))
        legend.append("  " if shown == _sign(expert) else f" {shown}  ")
    return [*lines, legend]


def _cells(share_E: np.ndarray) -> np.ndarray:
    """Cells of a bar of full width that each expert gets; the largest remainders are rounded up."""
    exact_E = share_E * _WIDTH
    cells_E = np.floor(exact_E).astype(int)
    left = round(exact_E.sum()) - cells_E.sum()
    cells_E[np.argsort(cells_E - exact_E, kind="stable")[:left]] += 1
    return cells_E


def _sign(expert: int) -> str:
    return _SIGNS[expert % len(_SIGNS)]


def _colour(expert: int) -> str:
    """White on the colour: the sign stays readable, and stays alone where there is no colour."""
    return f"bold white on {_COLOURS[expert % len(_COLOURS)]}"
