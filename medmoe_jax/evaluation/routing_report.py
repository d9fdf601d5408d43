"""The analysis of routing as JSON, PNG files and one HTML page.

Axes: G languages, N layers of a router, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medmoe_jax.checkpoints.files import write_json
from medmoe_jax.evaluation import html
from medmoe_jax.evaluation.routing import Gate, Texts
from medmoe_jax.storage.places import place

_SHARE = "Share of the picks of a language's tokens; every row sums to one."
_MIX = "Size of the mixing weights, which are the same for every text; every row sums to one."
_DIVERGENCE = (
    "How differently the languages use the experts of a layer: 0 where all use them alike, 1 where "
    "they have none in common. Routing that spreads out in the end rises to the right."
)
_ENTROPY = "Entropy of a token's probabilities over its largest value, log E; 1 is undecided."
_EFFECTIVE = "Exponential of the entropy of a language's shares: 1 where one expert does it all."
_OWN = "Share of a language's tokens that pick the expert of that language."


def to_dict(texts: Sequence[Texts], gates: Sequence[Gate]) -> dict:
    """All figures, by gate, then by language, then by layer."""
    names = [one.name for one in texts]

    def by_name(values: np.ndarray) -> dict:
        return dict(zip(names, np.round(values, 6).tolist(), strict=True))

    out: dict = {"languages": {}, "gates": {}}
    for number, one in enumerate(texts):
        tokens = int(gates[0].tokens_G[number])
        out["languages"][one.name] = {"rows": len(one.rows), "tokens": tokens}
    for gate in gates:
        entry = {
            "first_layer": gate.first_layer,
            "experts": list(gate.experts),
            "share": by_name(gate.share_GxNxE),
            "entropy": by_name(gate.entropy_GxN),
            "effective_experts": by_name(gate.effective_GxN),
            "divergence": np.round(gate.divergence_N, 6).tolist(),
        }
        owned = [number for number, own in enumerate(gate.own_G) if own >= 0]
        if owned:
            entry["own"] = {names[g]: gate.experts[gate.own_G[g]] for g in owned}
            own_GxN = np.round(gate.own_GxN, 6).tolist()
            entry["own_share"] = {names[g]: own_GxN[g] for g in owned}
        out["gates"][gate.name] = entry
    return out


def pictures(
    texts: Sequence[Texts], gates: Sequence[Gate]
) -> Iterator[tuple[str, html.LinesSection | html.HeatMapsSection]]:
    """`(name of a file, picture)`: divergence and entropy by depth, then each gate's own."""
    lines = [(g.name, _layers(g), g.divergence_N) for g in gates]
    title = "Spread of the languages over the experts"
    yield "divergence", html.LinesSection(title, lines, "layer", "divergence", _DIVERGENCE)
    lines = [(g.name, _layers(g), _undecided(g)) for g in gates]
    yield "entropy", html.LinesSection("Entropy by depth", lines, "layer", "entropy", _ENTROPY)
    for gate in gates:
        yield from _of_gate(texts, gate)


def _of_gate(texts: Sequence[Texts], gate: Gate):
    names, file = [one.name for one in texts], gate.name.replace("/", ".")
    yield (
        f"share.{file}",
        html.HeatMapsSection(
            f"Experts of each language: {gate.name}",
            dict(zip(names, gate.share_GxNxE, strict=True)),
            [f"layer {layer}" for layer in _layers(gate)],
            gate.experts,
            _MIX if gate.name.endswith("/mix") else _SHARE,
        ),
    )
    if any(gate.own_G >= 0):
        lines = [
            (name, _layers(gate), values)
            for name, values, own in zip(names, gate.own_GxN, gate.own_G, strict=True)
            if own >= 0
        ]
        title = f"A language's own expert: {gate.name}"
        yield f"own.{file}", html.LinesSection(title, lines, "layer", "share of tokens", _OWN)
    lines = [(n, _layers(gate), v) for n, v in zip(names, gate.effective_GxN, strict=True)]
    title = f"Effective number of experts: {gate.name}"
    yield f"effective.{file}", html.LinesSection(title, lines, "layer", "experts", _EFFECTIVE)


def _layers(gate: Gate) -> range:
    return range(gate.first_layer, gate.first_layer + gate.use_GxNxE.shape[1])


def _undecided(gate: Gate) -> np.ndarray:
    """Entropy over log E by layer, every token weighing the same."""
    weight_Gx1 = gate.tokens_G[:, None] / gate.tokens_G.sum()
    scale = np.log(len(gate.experts)) if len(gate.experts) > 1 else 1.0
    return (gate.entropy_GxN * weight_Gx1).sum(axis=0) / scale


def save(
    folder: str | Path, texts: Sequence[Texts], gates: Sequence[Gate], title: str
) -> dict[str, Path]:
    """Write routing.json, routing.html and a PNG a picture into a folder; returns their paths.

    Raises:
      OSError: the folder cannot be written.
    """
    folder = place(folder)
    figures = to_dict(texts, gates)
    drawn = list(pictures(texts, gates))
    out = {"json": folder / "routing.json"}
    write_json(out["json"], figures)
    for name, picture in drawn:
        out[name] = html.save_png(folder / f"{name}.png", picture)
    rows = [[name, *entry.values()] for name, entry in figures["languages"].items()]
    table = html.TableSection("Texts", ("language", "rows", "tokens"), rows)
    sections = [table, *(picture for _, picture in drawn)]
    out["html"] = html.report_html(folder / "routing.html", sections, title)
    return out
