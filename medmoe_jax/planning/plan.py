"""The plan of a stage on a slice: its training step first, then what else was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from medmoe_jax.parallel.rules import describe
from medmoe_jax.parallel.topology import Topology
from medmoe_jax.planning import programs
from medmoe_jax.planning.figures import Figures, measure
from medmoe_jax.planning.programs import Start
from medmoe_jax.planning.roofline import floor_flops, lowest_layer
from medmoe_jax.screen import ScreenTable, plain
from medmoe_jax.training.setup import Setup


@dataclass(frozen=True, repr=False)
class Plan:
    """What a stage takes on a slice; shown as its table.

    Attributes:
      topology: the slice.
      stage: its name.
      mesh: sizes of the axes.
      rows, length, accumulation: a step's rows (of all micro-batches), their tokens, and its
        micro-batches.
      remat: what the training step recomputes.
      steps: how many the stage has; 0 = they depend on the data.
      floor: FLOPs of a chip and step that a frozen base cannot do without.
      train: the training step.
      others: frozen step, scoring, generation.
    """

    topology: Topology
    stage: str
    mesh: Mapping[str, int]
    rows: int
    length: int
    accumulation: int
    remat: str
    steps: int
    floor: float
    train: Figures
    others: tuple[Figures, ...] = ()

    def __repr__(self) -> str:
        return plain(table(self), 80)

    @property
    def mfu(self) -> float:
        """The share of the chip's peak that the floor's work can reach, 0 if it does not fit."""
        seconds = self.train.bound.seconds
        return self.floor / (1e12 * self.topology.chip.bf16_tflops * seconds) if seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens that all chips read in a second at the bound; 0 if it does not fit."""
        seconds = self.train.bound.seconds
        return self.rows * self.length / seconds if seconds else 0.0

    @property
    def chip_hours(self) -> float | None:
        """Chip-hours of the whole stage at the bound; None where its steps are not known."""
        seconds = self.steps * self.train.bound.seconds
        return self.topology.chips * seconds / 3600 if seconds else None


def floor(setup: Setup, at: Start) -> float:
    """FLOPs of a chip and training step that a frozen base cannot do without."""
    decoder, data = setup.base.config, setup.config.data
    trained = at.trainable["base"]
    lowest = lowest_layer(at.roster, trained, decoder.n_layers)
    tokens = data.global_batch * data.length
    return floor_flops(decoder, tokens, data.length, lowest, trained) / setup.mesh.size


def make_plan(setup: Setup, topology: Topology, at: Start, everything: bool = False) -> Plan:
    """Compile a stage's training step; with `everything` the bare base's, scoring and generation.

    With `run.remat=auto` the step recomputes the least with which it fits of itself.
    """
    for remat in setup.remats:
        train = measure(setup, topology, programs.training(setup, at, remat))
        if train.fits and not train.recomputed:
            break
    made = []
    if everything:
        made += [programs.frozen(setup, at, remat)]
        made += [make(setup, at) for make in (programs.scoring, programs.decoding)]
    others = [measure(setup, topology, program) for program in made]
    config = setup.config
    return Plan(
        topology=topology,
        stage=at.stage.name,
        mesh=dict(setup.mesh.shape),
        rows=config.data.global_batch,
        length=config.data.length,
        accumulation=config.run.accumulation,
        remat=remat,
        steps=at.stage.config.steps,
        floor=floor(setup, at),
        train=train,
        others=tuple(others),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """A device's figures (v7x has two a chip) and a step's, those of the training step on top."""
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "devices": len(plan.topology.devices),
        "stage": plan.stage,
        "mesh": dict(plan.mesh),
        "rows": plan.rows,
        "length": plan.length,
        "accumulation": plan.accumulation,
        "remat": plan.remat,
        **_figures(plan, plan.train),
        "floor_flops_per_chip": plan.floor,
        "flops_over_floor": plan.train.flops / plan.floor if plan.train.fits else None,
        "tokens_per_second_bound": plan.tokens_per_second or None,
        "mfu_bound": plan.mfu or None,
        "steps": plan.steps or None,
        "chip_hours": plan.chip_hours,
        "others": {one.name: _figures(plan, one) for one in plan.others},
    }


def _figures(plan: Plan, one: Figures) -> dict[str, Any]:
    memory = {
        "fits": one.fits,
        "hbm_gib": one.hbm,
        "hbm_limit_gib": plan.topology.chip.limit_gib,
        "arguments_gib": one.arguments,
        "compile_seconds": one.compile_seconds,
    }
    if not one.fits:
        return memory
    return memory | {
        "temporaries_gib": one.temporaries,
        "flops_per_chip": one.flops,
        "bytes_per_chip": one.bytes,
        "collectives": {
            kind: {"count": t.count, "ici_bytes": t.ici, "dcn_bytes": t.dcn}
            for kind, t in one.collectives.items()
        },
        "step_seconds_bound": one.bound.seconds,
        "bound_by": one.bound.resource,
        "seconds": one.bound._asdict(),
        "unknown_kernels": list(one.unknown),
        "compiler_recomputes": one.recomputed,
    }


def table(plan: Plan) -> ScreenTable:
    """The plan for a person: a column a program, everything a device's, which is mostly a chip."""
    devices, chips = len(plan.topology.devices), plan.topology.chips
    unit = "chip" if devices == chips else "device"
    size = "1 chip" if chips == 1 else f"{chips} chips"
    size += "" if devices == chips else f", {devices} devices"
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    every = (plan.train, *plan.others)
    rows = [(label, *map(cell, every)) for label, cell in _lines(plan)]
    return ScreenTable(
        ("",),
        [one.name for one in every],
        [row for row in rows if any(row[1:])],
        f"stage '{plan.stage}' on {plan.topology.name}: {size} ({mesh}), {plan.rows} rows of "
        f"{plan.length} tokens a step, {plan.accumulation} micro-batches",
        f"a {unit}'s figures; the bound is the busiest resource's time",
    )


def _lines(plan: Plan):
    """`(label, function of Figures that gives the cell)` of every line."""
    chip = plan.topology.chip
    frozen = next((one for one in plan.others if one.name == "frozen" and one.fits), None)

    def known(cell):
        return lambda one: cell(one) if one.fits else ""

    def training(cell):
        return lambda one: cell() if one is plan.train and one.fits else ""

    def over_frozen(what: str):
        def cell(one: Figures) -> str:
            if one is not plan.train or not one.fits or frozen is None:
                return ""
            return f"{getattr(one, what) / getattr(frozen, what):.3f}"

        return cell

    yield "recomputes (run.remat)", lambda one: plan.remat if one is plan.train else ""
    if any(one.recomputed for one in (plan.train, *plan.others)):
        yield "so does the compiler", lambda one: "yes" if one.recomputed else ""
    yield "arguments, GiB", lambda one: f"{one.arguments:.2f}"
    yield "temporaries, GiB", known(lambda one: f"{one.temporaries:.2f}")
    yield f"memory of {chip.limit_gib:g} GiB", lambda one: f"{one.hbm:.2f}"
    yield "fits", lambda one: "yes" if one.fits else "NO"
    yield "TFLOPs", known(lambda one: f"{one.flops / 1e12:.3f}")
    yield "FLOPs over the floor", training(lambda: f"{plan.train.flops / plan.floor:.3f}")
    yield "FLOPs over the frozen step", over_frozen("flops")
    yield "HBM traffic, GB", known(lambda one: f"{one.bytes / 1e9:.2f}")
    yield "HBM traffic over the frozen step", over_frozen("bytes")
    for kind in sorted({kind for one in (plan.train, *plan.others) for kind in one.collectives}):
        yield f"{kind}, times: ICI + DCN GB", lambda one, kind=kind: _traffic(one, kind)
    yield "bound, ms", known(lambda one: f"{1e3 * one.bound.seconds:.2f}")
    yield "set by", known(lambda one: one.bound.resource)
    yield "tokens a second, all chips", training(lambda: f"{plan.tokens_per_second:,.0f}")
    yield "MFU bound", training(lambda: f"{100 * plan.mfu:.1f}%")
    yield "chip-hours", training(lambda: _chip_hours(plan))
    yield "kernels of unknown FLOPs", lambda one: ", ".join(one.unknown)
    yield "compiled in, s", lambda one: f"{one.compile_seconds:.0f}"


def _traffic(one: Figures, kind: str) -> str:
    if kind not in one.collectives:
        return ""
    t = one.collectives[kind]
    return f"{t.count:.0f}: {t.ici / 1e9:.3f} + {t.dcn / 1e9:.3f}"


def _chip_hours(plan: Plan) -> str:
    if plan.chip_hours is None:
        return f"set stages.{plan.stage}.steps"
    return f"{plan.chip_hours:.1f} ({plan.steps:,} steps)"


def shardings_table(setup: Setup, at: Start) -> ScreenTable:
    """Every leaf of the training step's arguments with its shape and how it is spread."""
    rows = []
    state, frozen, batch = programs.training(setup, at).arguments
    named = {"frozen": frozen, "trainable": state.trainable, "optimiser": state.optimiser}
    for owner, tree in {**named, "batch": batch}.items():
        for path, shape, spec in describe(tree, jax.tree.map(lambda leaf: leaf.sharding, tree)):
            rows.append((f"{owner}.{path}", " x ".join(map(str, shape)), spec))
    return ScreenTable(("parameter", "shape", "axes"), (), rows, "shardings")
