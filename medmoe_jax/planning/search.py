"""The fastest way to run a training step on a slice: micro-batch, rematerialisation, mesh shape.

The global batch is the recipe's; what is tried is how many of its rows run at once. A candidate is
not compiled where its arguments and the activations that it must keep exceed the memory, nor where
its least work takes longer than the best so far. The others are compiled in the order of a rough
estimate that adds what the mesh makes chips exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from medmoe_jax.base.config import site_shapes
from medmoe_jax.base.execution import REMAT
from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import AXES, DATA, EXPERT, FSDP, SEQUENCE, TENSOR
from medmoe_jax.parallel.mesh import batch_shards, slice_of
from medmoe_jax.parallel.topology import Topology
from medmoe_jax.planning import programs
from medmoe_jax.planning.figures import GIB, Figures, measure
from medmoe_jax.planning.plan import floor
from medmoe_jax.planning.programs import Start, bytes_of
from medmoe_jax.planning.roofline import bound, layer_weights, lowest_layer
from medmoe_jax.screen import ScreenTable
from medmoe_jax.training.setup import Setup, base_of


class Candidate(NamedTuple):
    """One way to run the step.

    Attributes:
      mesh: sizes of the axes, in the order of AXES.
      accumulation: micro-batches.
      remat: see `base.execution.Execution`.
    """

    mesh: tuple[int, ...]
    accumulation: int
    remat: str

    @property
    def axes(self) -> str:
        """The mesh in words, axes of size 1 left out."""
        sizes = (f"{axis} {n}" for axis, n in zip(AXES, self.mesh, strict=True) if n > 1)
        return ", ".join(sizes) or "one chip"

    def __str__(self) -> str:
        return f"{self.axes}; {self.accumulation} micro-batches; remat {self.remat}"


class Estimate(NamedTuple):
    """What is known of a candidate before it is compiled.

    Attributes:
      gib: memory that it needs at least.
      least: seconds that its products and the reading of its weights take at least.
      seconds: the same with what its chips exchange, roughly.
    """

    gib: float
    least: float
    seconds: float


class Compiled(NamedTuple):
    """A candidate that was compiled."""

    candidate: Candidate
    figures: Figures


class SearchResult(NamedTuple):
    """What a search came to.

    Attributes:
      found: compiled candidates, those that fit first, the fastest on top.
      too_large, too_slow, left: how many were not compiled: they cannot fit, cannot be faster than
        the best, or came after the last that was allowed.
    """

    found: tuple[Compiled, ...]
    too_large: int
    too_slow: int
    left: int


def search(
    config: ConfigDict,
    topology: Topology,
    stage: str,
    most: int,
    report: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Compile the most promising candidates.

    Args:
      config: the recipe; its mesh's axes `expert` and `sequence` stay.
      topology: the slice.
      stage: whose step it is; "" = the first.
      most: candidates to compile.
      report: told of the number of candidates, and of each before and after it is compiled.

    Raises:
      UserError: a bad recipe, or one whose rows no mesh divides.
    """
    starts: dict[tuple[int, ...], Start] = {}  # by mesh, on which alone they depend

    def opened(candidate: Candidate) -> tuple[Setup, Start]:
        setup = programs.open_abstract(_with(config, candidate), topology)
        if candidate.mesh not in starts:
            starts[candidate.mesh] = programs.start(setup, stage)
        return setup, starts[candidate.mesh]

    limit = topology.chip.limit_gib
    known = {c: estimate(*opened(c), topology) for c in candidates(config, topology)}
    if not known:
        raise UserError(
            f"data.global_batch: {config.data.global_batch} rows divide over no mesh of "
            f"{len(topology.devices)} chips with run.mesh.{EXPERT} {_size(config, EXPERT)} and "
            f"run.mesh.{SEQUENCE} {_size(config, SEQUENCE)}"
        )
    possible = sorted((c for c in known if known[c].gib < limit), key=lambda c: known[c].seconds)
    report(f"{len(known)} candidates; {len(known) - len(possible)} need more than {limit} GiB")
    found: list[Compiled] = []
    waiting, best = possible, float("inf")
    while waiting and len(found) < most:
        candidate, *waiting = waiting
        report(f"compiling {len(found) + 1} of at most {most}: {candidate}")
        setup, at = opened(candidate)
        figures = measure(setup, topology, programs.training(setup, at))
        found.append(Compiled(candidate, figures))
        report(_in_words(figures, limit, config.data.global_batch * config.data.length))
        if figures.fits:
            best = min(best, figures.bound.seconds)
        waiting = [c for c in waiting if known[c].least < best]
    return SearchResult(
        tuple(sorted(found, key=lambda f: (not f.figures.fits, f.figures.bound.seconds))),
        too_large=len(known) - len(possible),
        too_slow=len(possible) - len(found) - len(waiting),
        left=len(waiting),
    )


def _in_words(figures: Figures, limit: float, tokens: int) -> str:
    """What was found of a candidate, in a line."""
    memory = f"{figures.hbm:.2f} of {limit:g} GiB"
    if not figures.fits:
        return f"  does not fit: {memory}"
    seconds = figures.bound.seconds
    return (
        f"  {1e3 * seconds:.2f} ms by {figures.bound.resource}, {tokens / seconds:,.0f} tokens/s, "
        f"{memory}"
    )


def flags(candidate: Candidate) -> list[str]:
    """The options of `medmoe train` that run the recipe in the candidate's way."""
    sizes = dict(zip(AXES, candidate.mesh, strict=True))
    fields: dict[str, int | str] = {f"mesh.{axis}": sizes[axis] for axis in (DATA, FSDP, TENSOR)}
    fields |= {"accumulation": candidate.accumulation, "remat": candidate.remat}
    return [f"--config.run.{name}={value}" for name, value in fields.items()]


def _with(config: ConfigDict, candidate: Candidate) -> ConfigDict:
    """The recipe run in the candidate's way."""
    config = config.copy_and_resolve_references()
    config.run.mesh = dict(zip(AXES, candidate.mesh, strict=True))
    config.run.accumulation = candidate.accumulation
    config.run.remat = candidate.remat
    return config


def _size(config: ConfigDict, axis: str) -> int:
    """The size of an axis of the recipe's mesh."""
    return config.run.mesh.get(axis, 1)


def candidates(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """Every mesh, number of micro-batches and rematerialisation that the recipe can be run with.

    A mesh divides the chips, the slices, the attention heads and the global batch.

    Raises:
      UserError: the recipe's axes `expert` and `sequence` do not divide the chips.
    """
    decoder = base_of(config.base, planned=True).config
    chips, rows = len(topology.devices), config.data.global_batch
    slices = len(set(map(slice_of, topology.devices)))
    expert, sequence = (_size(config, axis) for axis in (EXPERT, SEQUENCE))
    if min(expert, sequence) < 1 or chips % (expert * sequence):
        raise UserError(
            f"run.mesh: the search keeps expert {expert} and sequence {sequence}; they have to be "
            f"at least 1, and their product to divide the {chips} chips"
        )
    free = chips // expert // sequence
    for tensor in _divisors(free):
        if decoder.n_heads % tensor or decoder.n_kv_heads % tensor:
            continue
        for data in _divisors(free // tensor):
            mesh = (data, free // tensor // data, expert, sequence, tensor)
            shards = chips // tensor // sequence
            if data % slices or rows % shards:
                continue
            for accumulation in _divisors(rows // shards):
                for remat in REMAT:
                    yield Candidate(mesh, accumulation, remat)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def estimate(setup: Setup, at: Start, topology: Topology) -> Estimate:
    """What is known of an opened candidate without compiling it.

    A layer's input is kept for the backward pass, and unless `remat` is `full` what its products
    make, the last excepted. `full` makes all of that again. The base is read forward and backward
    of every micro-batch, and gathered over what shards it each time; over `tensor`, a layer's
    outputs are added up twice forward and twice backward.
    """
    decoder, run, mesh = setup.base.config, setup.config.run, setup.mesh.shape
    itemsize = jnp.dtype(setup.dtype).itemsize
    program = programs.training(setup, at)
    # Of a chip, at once.
    tokens = program.rows // batch_shards(setup.mesh) * program.length // mesh[SEQUENCE]
    above = decoder.n_layers - lowest_layer(at.roster, at.trainable["base"], decoder.n_layers)
    wide = sum(o for site, (_, o) in site_shapes(decoder).items() if site != "mlp.down")
    kept = decoder.d_model + (0 if run.remat == "full" else wide / mesh[TENSOR])
    gib = (bytes_of(program.arguments) + above * tokens * kept * itemsize) / GIB

    flops = floor(setup, at)
    if run.remat == "full":
        again = above * (layer_weights(decoder) - decoder.d_ff * decoder.d_model)
        flops += 2 * again * tokens * run.accumulation / mesh[TENSOR]
    spread = mesh[FSDP] * mesh[EXPERT] * mesh[SEQUENCE]
    weights = bytes_of(at.base["layers"]) * spread
    passes = run.accumulation * (1 + above / decoder.n_layers)
    gathered = weights * (1 - 1 / spread)
    added = 4 * decoder.n_layers * tokens * decoder.d_model * itemsize * (1 - 1 / mesh[TENSOR])
    chip = topology.chip
    return Estimate(
        gib,
        bound(chip, flops, passes * weights).seconds,
        bound(chip, flops, passes * weights, passes * gathered + run.accumulation * added).seconds,
    )


def table(result: SearchResult, topology: Topology, tokens: int) -> ScreenTable:
    """The compiled candidates, the fastest that fits on top.

    Args:
      result: what a search found.
      topology: the slice.
      tokens: how many a step reads.
    """
    rows = []
    for candidate, figures in result.found:
        cells = ["", "does not fit", ""]
        if figures.fits:
            seconds = figures.bound.seconds
            cells = [f"{1e3 * seconds:.2f}", figures.bound.resource, f"{tokens / seconds:,.0f}"]
        how = (candidate.axes, str(candidate.accumulation), candidate.remat)
        rows.append((*how, f"{figures.hbm:.2f}", *cells))
    return ScreenTable(
        ("mesh",),
        ("micro-batches", "remat", "GiB", "ms", "set by", "tokens/s"),
        rows,
        f"fastest on {topology.name}, by bound, in {topology.chip.limit_gib:g} GiB",
        f"not compiled: {result.too_large} too large, {result.too_slow} too slow, "
        f"{result.left} left",
    )


def as_json(result: SearchResult, tokens: int) -> dict[str, Any]:
    """The result's figures; seconds and tokens a second only of what fits."""
    rows = []
    for candidate, figures in result.found:
        mesh, accumulation, remat = candidate
        row: dict[str, Any] = {
            "mesh": dict(zip(AXES, mesh, strict=True)),
            "accumulation": accumulation,
        }
        row |= {"remat": remat, "fits": figures.fits, "hbm_gib": figures.hbm}
        row["flags"] = flags(candidate)
        if figures.fits:
            seconds = figures.bound.seconds
            row |= {"step_seconds_bound": seconds, "tokens_per_second_bound": tokens / seconds}
        rows.append(row)
    counts = {"too_large": result.too_large, "too_slow": result.too_slow, "left": result.left}
    return {"candidates": rows, "not_compiled": counts}
