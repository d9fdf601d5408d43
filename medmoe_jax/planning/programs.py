"""The programs of a recipe on a slice, by their shapes alone: nothing is loaded, nothing runs.

Axes: B rows, T tokens, P prompt slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base.chunks import divide
from medmoe_jax.errors import UserError
from medmoe_jax.inference import scoring as scoring_programs
from medmoe_jax.inference import steps
from medmoe_jax.inference.branching import Packed
from medmoe_jax.inference.drawing import Law
from medmoe_jax.inference.forward import Weights
from medmoe_jax.parallel.mesh import replicated, round_up_rows, row_sharding
from medmoe_jax.parallel.rules import placed, state_shardings
from medmoe_jax.parallel.topology import Topology
from medmoe_jax.planning.frozen import frozen_step
from medmoe_jax.ranges import COUNT
from medmoe_jax.training import transitions
from medmoe_jax.training.optimiser import make_optimiser, schedule
from medmoe_jax.training.parts import jit_step, make_objective, recomputing, split
from medmoe_jax.training.placement import abstract_batch
from medmoe_jax.training.recipe import budget_schedules
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.stage import Stage, chain, find_stage
from medmoe_jax.training.step import TrainState

# Of a stage that runs by epochs: a constant in the compiled step, which costs the same with any.
SOME_STEPS = 100_000
NEW_TOKENS = 256  # of a prompt that is answered; at most half a row


class Program(NamedTuple):
    """A function and the shapes it is compiled for.

    Attributes:
      name: for tables.
      function: jitted, or its arguments static.
      arguments: trees of `ShapeDtypeStruct` with shardings.
      rows: how many run at once, over all devices.
      length: tokens of a row.
      times: how often it runs in a step.
      turns: how often a loop that ends when the data say so turns at most; None = there is none.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple
    rows: int
    length: int
    times: int = 1
    turns: int | None = None


class Start(NamedTuple):
    """What a stage starts from, as shapes.

    Attributes:
      stage, roster: the stage, and its banks.
      frozen, trainable: see `training.step`.
      base: the base at its end, frozen leaves and trained ones.
      banks: all of them.
    """

    stage: Stage
    roster: Roster
    frozen: Any
    trainable: Any
    base: Any
    banks: Any


def open_abstract(config: ConfigDict, topology: Topology) -> Setup:
    """What a configuration stands for on a slice, without weights, tokenizer or data.

    Raises:
      UserError: naming the field that does not fit.
    """
    if not config.stages.order:
        raise UserError("stages.order is empty: the recipe trains nothing that could be planned")
    COUNT.check("data.length", config.data.length)
    setup = open_setup(config, topology.devices)
    setup.check_batch()
    return setup


def start(setup: Setup, name: str = "") -> Start:
    """What the stage of that name starts from, its arrays in their shards; "" = the first stage.

    Raises:
      UserError: the recipe has no such stage.
    """
    name = name or setup.stages[0].name
    find_stage(setup.stages, name)  # there is such a stage
    stages = chain(setup.stages, name)
    roster: Roster = {}

    def run(base):
        nonlocal roster
        banks: Mapping[str, Any] = {}
        for stage in stages:
            roster, banks, base = transitions.start(stage, roster, banks, base, setup.base.config)
        return (*split(stages[-1], roster, banks, base), base, banks)

    trees = jax.eval_shape(run, setup.base.abstract(setup.dtype))
    trees = (placed(tree, setup.shardings(tree)) for tree in trees)
    return Start(stages[-1], roster, *trees)


def training(setup: Setup, at: Start, remat: str = "") -> Program:
    """The training step that `training.train` compiles.

    Args:
      setup, at: the recipe, and what the stage starts from.
      remat: what it recomputes; "" = as `run.remat` says, the most for `auto`.
    """
    config, mesh = setup.config, setup.mesh
    steps = at.stage.config.steps or SOME_STEPS
    budgets = budget_schedules(at.stage, at.roster, steps)
    section = at.stage.config
    optimiser = make_optimiser(section, schedule(section, steps), budgets)
    moments = jax.eval_shape(optimiser.init, at.trainable)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        at.trainable,
        placed(moments, state_shardings(moments, mesh, setup.rules)),
    )
    objective = make_objective(setup, at.stage, at.roster)
    if remat:
        objective = recomputing(objective, remat)
    rows = config.data.global_batch
    return Program(
        "train",
        jit_step(setup, objective, optimiser, state),
        (state, at.frozen, _batch(setup, rows)),
        rows // config.run.accumulation,
        config.data.length,
        turns=_chunks(setup, rows // config.run.accumulation),
    )


def _chunks(setup: Setup, rows: int) -> int:
    """Turns of the loss's loop over chunks where every token is a target."""
    model = setup.model(())
    vocabulary = model.decoder.vocab_size
    return divide(model.execution, rows, setup.config.data.length, vocabulary).count


def _batch(setup: Setup, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    return abstract_batch(setup.mesh, rows, setup.config.data.length, bool(setup.languages))


def frozen(setup: Setup, at: Start, remat: str = "") -> Program:
    """The bare base's step on one micro-batch, run once for each of a training step's.

    Args: see `training`.
    """
    config = setup.config
    rows = config.data.global_batch // config.run.accumulation
    model = setup.model(())
    execution = dataclasses.replace(model.execution, remat=remat or model.execution.remat)
    step = jax.jit(functools.partial(frozen_step, model.decoder, execution))
    arguments = (at.base, _batch(setup, rows))
    length, times = config.data.length, config.run.accumulation
    return Program("frozen", step, arguments, rows, length, times, _chunks(setup, rows))


def _answering(setup: Setup, at: Start):
    """`(model, its weights, rows at once, a function that makes arrays of ids)`."""
    rows = round_up_rows(setup.mesh, setup.config.run.score_batch)

    def ids(*shape: int, axis: int = 0):
        sharding = row_sharding(setup.mesh, len(shape), axis)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    model = setup.model(lifecycle.active_banks(at.roster))
    return model, Weights(at.base, at.banks, {}, ids(rows, 1)), rows, ids


def scoring(setup: Setup, at: Start) -> Program:
    """Scoring what `run.score_batch` rows hold, where every token of a row is asked about."""
    model, weights, B, ids = _answering(setup, at)
    T = setup.config.data.length
    packed = Packed(*(ids(B, T) for _ in Packed._fields))
    return Program(
        "score",
        functools.partial(scoring_programs.score_batch, model),
        (weights, packed),
        B,
        T,
        turns=divide(model.execution, B, T, model.decoder.vocab_size).count,
    )


def decoding(setup: Setup, at: Start) -> Program:
    """Reading `run.score_batch` prompts and writing NEW_TOKENS to each."""
    model, weights, B, ids = _answering(setup, at)
    new = min(NEW_TOKENS, setup.config.data.length // 2)
    P = setup.config.data.length - new

    def now(tokens: int) -> steps.Now:
        each, rate = ids(B), ids(B).update(dtype=jnp.float32)
        law = Law(rate, rate, rate, rate, each, ids(B, 2).update(dtype=jnp.uint32))
        return steps.Now(ids(B, tokens), each, each, each, each, each, law)

    def generate(weights, prompts, rows_B, after, until):
        state = steps.new_state(model, B, P + new)
        state, _ = steps.read(model, 0, weights, state, prompts, rows_B, rows_B)
        return steps.go_on(model, new, 0, weights, state, after, until)[1]

    until = steps.Until(
        ids(B), ids(B, 1), jax.ShapeDtypeStruct((), bool, sharding=replicated(setup.mesh))
    )
    arguments = (weights, now(P), ids(B), now(1), until)
    return Program("generate", jax.jit(generate), arguments, B, P + new, turns=new)


def bytes_of(tree: Any) -> int:
    """What one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
