"""What a person is told before and after a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medmoe_jax.adapters.bank import count
from medmoe_jax.base import trees
from medmoe_jax.parallel.rules import Rule, undivided
from medmoe_jax.screen import ScreenTable
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.step import TrainState
from medmoe_jax.training.terminal import console, note

WORTH_TELLING = 64 * 2**20  # bytes of a device


def print_stage(prepared: Prepared, state: TrainState) -> None:
    """The matched sites, each bank's parameters and the trainable share."""
    name, frozen, trainable = prepared.stage.name, prepared.frozen, state.trainable
    layers, banks = prepared.stage.setup.base.config.n_layers, prepared.banks(state)
    rows = [
        (
            bank,
            use,
            " ".join(spec.sites),
            f"{spec.start}-{spec.stop - 1} of {layers}",
            f"{spec.experts} x {spec.rank}",
            f"{spec.gate}, top {spec.top_k}" if spec.routed else spec.gate,
            f"{count(banks[bank]):,}",
        )
        for bank, (spec, use) in prepared.roster.items()
    ]
    for path, leaf in trees.flatten(trainable["base"]):
        rows.append(("(base)", "train", path, "", "", "", f"{leaf.size:,}"))
    words = ("bank", "state", "sites", "layers", "experts x rank", "gate")
    title = f"stage '{name}': {prepared.steps} steps"
    console.print(ScreenTable(words, ("parameters",), rows, title))
    trains = count(trainable)
    total = trains + count(frozen)
    note(f"trainable {trains:,} of {total:,} parameters ({100 * trains / total:.2f}%)")


def print_undivided(trees: Any, rules: Sequence[Rule]) -> None:
    """Tell of arrays that every device holds whole, where the mesh does not divide them and they
    are large.
    """
    held = undivided(trees, rules)
    total = sum(held.values())
    if total >= WORTH_TELLING:
        name = max(held, key=held.__getitem__)
        note(
            f"run.mesh: {total / 2**30:.2f} GiB a device are widths that its axes do not divide "
            f"and that are held whole, most of all {name}; a smaller `fsdp` beside a larger "
            "`data` may divide them"
        )


def print_languages(languages: Mapping[str, Mapping[str, int]]) -> None:
    """By source: rows that name their language, had it detected, or force no expert."""
    for source, counts in languages.items():
        parts = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        note(f"source '{source}': language of its rows: {parts}")


def print_ranks(stage: str, ranks: Mapping[str, Mapping[str, list[list[int]]]]) -> None:
    """What the allocators left: `{bank: {site: ranks [layers][experts]}}`."""
    for bank, sites in ranks.items():
        rows = []
        for site, by_layer in sites.items():
            values = [rank for layer in by_layer for rank in layer]
            layers = " ".join(",".join(map(str, layer)) for layer in by_layer)
            rows.append((site, layers, f"{sum(values) / len(values):.1f}"))
        title = f"stage '{stage}': ranks of bank '{bank}'"
        console.print(ScreenTable(("site", "by layer"), ("mean",), rows, title))


def print_counts(stage: str, counts: Mapping[str, int]) -> None:
    """What the stage read, truncated rows included."""
    note(f"stage '{stage}' read " + ", ".join(f"{v:,} {k}" for k, v in counts.items()))
