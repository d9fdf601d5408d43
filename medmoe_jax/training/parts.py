"""The parts of a stage's run: optimiser, objective, and the trees on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.adalora import BudgetSchedule
from medmoe_jax.adapters.bank import split_gate
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.parallel.mesh import replicated
from medmoe_jax.parallel.rules import shardings, state_shardings
from medmoe_jax.training import allocation
from medmoe_jax.training.recipe import Stage
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.step import Objective, TrainState, split_base, train_step


def make_optimiser(
    stage: Stage, rate, plans: Mapping[str, BudgetSchedule] | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW and the allocation of ranks, on the trainable tree."""
    c = stage.config
    update = optax.adamw(rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
    if plans:
        update = allocation.allocating(update, plans)
    return optax.chain(optax.clip_by_global_norm(c.clip), update) if c.clip else update


def make_objective(setup: Setup, stage: Stage, roster: Roster) -> Objective:
    """What the stage minimises."""
    return Objective(
        model=setup.model(lifecycle.active_banks(roster)),
        terms=stage.terms,
        specs=tuple(spec for spec, _ in roster.values()),
        accumulation=setup.config.run.accumulation,
        seed=stage.config.seed,
    )


def split(stage: Stage, roster: Roster, banks, base) -> tuple[dict, dict]:
    """`(frozen, trainable)` trees of a stage; a bank may lie in both, its gate in the second."""
    frozen_base, trained_base = split_base(base, stage.train_base)
    frozen: dict = {"base": frozen_base, "banks": {}}
    trainable: dict = {"base": trained_base, "banks": {}}
    for name, params in banks.items():
        state = roster[name][1]
        gate, rest = split_gate(params) if state == "gate" else ({}, params)
        (trainable if state == "train" else frozen)["banks"][name] = rest
        if gate:
            trainable["banks"][name] = gate
    return frozen, trainable


def place(setup: Setup, optimiser, trainable, frozen) -> tuple[TrainState, dict]:
    """The state and the frozen tree on the mesh, the optimiser's moments made in their shards."""
    put = functools.partial(jax.tree.map, jax.device_put)
    trainable = put(trainable, shardings(trainable, setup.mesh, setup.rules))
    frozen = put(frozen, shardings(frozen, setup.mesh, setup.rules))
    abstract = jax.eval_shape(optimiser.init, trainable)
    moments = state_shardings(abstract, setup.mesh, setup.rules)
    opt_state = jax.jit(optimiser.init, out_shardings=moments)(trainable)
    step = jax.device_put(jnp.int32(0), replicated(setup.mesh))
    return TrainState(step, trainable, opt_state), frozen


def jit_step(setup: Setup, objective: Objective, optimiser, state: TrainState):
    """`train_step` with the state given up and laid out again as it was, and the metrics whole.

    Args:
      state: the state, or its shapes with their shardings.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        functools.partial(train_step, objective, optimiser),
        donate_argnums=0,
        out_shardings=(layout, replicated(setup.mesh)),
    )


def make_probe(
    setup: Setup, objective: Objective, plans: Mapping[str, BudgetSchedule], frozen
) -> Callable[[TrainState], dict[str, float]]:
    """Figures of the terms on parameters and of the allocated banks."""
    specs = {spec.name: spec for spec in objective.specs}

    @functools.partial(jax.jit, out_shardings=replicated(setup.mesh))
    def measure(trainable, frozen_banks):
        banks = trees.overlay(frozen_banks, trainable["banks"])
        return [term.measure(specs, banks) for term in objective.terms]

    def probe(state: TrainState) -> dict[str, float]:
        measured = jax.device_get(measure(state.trainable, frozen["banks"]))
        out = allocation.figures(plans, state.trainable["banks"], state.optimiser)
        for term, values in zip(objective.terms, measured, strict=True):
            out |= term.figures(values)
        return out

    return probe
