"""What a person sees before and after a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from medmoe_jax.adapters.bank import count
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.parallel.rules import Rule, undivided
from medmoe_jax.training.recipe import Stage

WORTH_TELLING = 64 * 2**20  # bytes of a device
console = Console(stderr=True)


def note(text: str) -> None:
    """One line for the person at the terminal."""
    console.print(text, markup=False, highlight=False)


def print_stage(
    stage: Stage, roster: Roster, trainable, frozen, decoder: DecoderConfig, steps: int
) -> None:
    """The matched sites, each bank's parameters and the trainable share."""
    table = Table(title=f"stage '{stage.name}': {steps} steps", title_justify="left")
    for column in ("bank", "state", "sites", "layers", "experts x rank", "gate", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    banks = trees.overlay(frozen["banks"], trainable["banks"])
    for name, (spec, state) in roster.items():
        gate = f"{spec.gate}, top {spec.top_k}" if spec.routed else spec.gate
        table.add_row(
            name,
            state,
            " ".join(spec.sites),
            f"{spec.start}-{spec.stop - 1} of {decoder.n_layers}",
            f"{spec.experts} x {spec.rank}",
            gate,
            f"{count(banks[name]):,}",
        )
    for path, leaf in trees.flatten(trainable["base"]):
        table.add_row("(base)", "train", path, "", "", "", f"{leaf.size:,}")
    console.print(table)
    trains = count(trainable)
    total = trains + count(frozen)
    note(f"trainable {trains:,} of {total:,} parameters ({100 * trains / total:.2f}%)")


def print_undivided(trees, rules: Sequence[Rule]) -> None:
    """What devices hold whole because the mesh does not divide it, where it is worth a thought."""
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


def print_ranks(stage: Stage, ranks: Mapping[str, Mapping[str, list[list[int]]]]) -> None:
    """What the allocators left: `{bank: {site: ranks [layers][experts]}}`."""
    for bank, sites in ranks.items():
        table = Table(title=f"stage '{stage.name}': ranks of bank '{bank}'", title_justify="left")
        for column in ("site", "mean", "by layer"):
            table.add_column(column)
        for site, by_layer in sites.items():
            values = [rank for layer in by_layer for rank in layer]
            layers = " ".join(",".join(map(str, layer)) for layer in by_layer)
            table.add_row(site, f"{sum(values) / len(values):.1f}", layers)
        console.print(table)


def print_counts(stage: Stage, counts: Mapping[str, int]) -> None:
    """What the stage read, truncated rows included."""
    note(f"stage '{stage.name}' read " + ", ".join(f"{v:,} {k}" for k, v in counts.items()))
