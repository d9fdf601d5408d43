"""The parts of a training step: objective, trainable tree, first state, compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base.seam import Params
from medmoe_jax.parallel.mesh import replicated
from medmoe_jax.parallel.rules import shardings, state_shardings
from medmoe_jax.training.leaves import split_base
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.step import Objective, TrainState, train_step


def make_objective(setup: Setup, stage: Stage, roster: Roster) -> Objective:
    """What the stage minimises."""
    return Objective(
        model=setup.model(lifecycle.active_banks(roster)),
        regularisers=stage.regularisers,
        specs=tuple(spec for spec, _ in roster.values()),
        accumulation=setup.config.run.accumulation,
        seed=stage.config.seed,
    )


def recomputing(objective: Objective, remat: str) -> Objective:
    """The same objective, whose backward pass recomputes what `remat` says (`base.execution`)."""
    model = objective.model
    execution = dataclasses.replace(model.execution, remat=remat)
    return dataclasses.replace(objective, model=dataclasses.replace(model, execution=execution))


def split(
    stage: Stage, roster: Roster, banks: Mapping[str, Any], base: Params
) -> tuple[dict, dict]:
    """`(frozen, trainable)` trees of a stage; a bank may lie in both, its gate in the second."""
    frozen_base, trained_base = split_base(base, stage.train_base)
    frozen_banks, trained_banks = lifecycle.split(roster, banks)
    return (
        {"base": frozen_base, "banks": frozen_banks},
        {"base": trained_base, "banks": trained_banks},
    )


def first_state(
    setup: Setup, optimiser: optax.GradientTransformation, trainable: Params, frozen: Params
) -> tuple[TrainState, dict]:
    """The state before the first step and the frozen tree, both in their shards on the mesh.

    The optimiser's moments are made there: they never lie on one device.
    """
    put = functools.partial(jax.tree.map, jax.device_put)
    trainable = put(trainable, shardings(trainable, setup.mesh, setup.rules))
    frozen = put(frozen, shardings(frozen, setup.mesh, setup.rules))
    abstract = jax.eval_shape(optimiser.init, trainable)
    moments = state_shardings(abstract, setup.mesh, setup.rules)
    opt_state = jax.jit(optimiser.init, out_shardings=moments)(trainable)
    step = jax.device_put(jnp.int32(0), replicated(setup.mesh))
    return TrainState(step, trainable, opt_state), frozen


def jit_step(
    setup: Setup, objective: Objective, optimiser: optax.GradientTransformation, state: TrainState
) -> jax.stages.Wrapped:
    """`train_step` for the mesh: `(state, frozen, batch) -> (state, metrics)`.

    The memory of the state is used again. The new state is spread as the old one was, and every
    device has all of the metrics.

    Args:
      setup, objective, optimiser: of the stage.
      state: the state, or its shapes with their shardings.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        functools.partial(train_step, objective, optimiser),
        donate_argnums=0,
        out_shardings=(layout, replicated(setup.mesh)),
    )
