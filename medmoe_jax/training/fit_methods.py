"""Ways to search for mixing weights: by gradient, and by evolution.

Axes: P candidates, K weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from medmoe_jax.base import trees
from medmoe_jax.base.seam import Params
from medmoe_jax.parallel.mesh import replicated
from medmoe_jax.training.parts import jit_step
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.step import Objective, TrainState, micro_batches, nll

SPREAD = 0.5  # standard deviation of the first candidates of CMA-ES around the starting weights


class Problem(NamedTuple):
    """What is to be minimised, and from where.

    Attributes:
      prepared: the stage, with the objective of the fit.
      state: where the search starts.
      batch: all rows.
      loss: of `(trainable, frozen, batch)`: `mean_loss` of the objective, compiled.
    """

    prepared: Prepared
    state: TrainState
    batch: Mapping[str, jax.Array]
    loss: Callable[[Any, Any, Any], jax.Array]


# A method yields, step by step, the losses that it has seen and the trainable tree of the lowest
# of them, whose memory the next step may use again.
Steps = Iterator[tuple[np.ndarray, Any]]


def mean_loss(
    objective: Objective, trainable: Params, frozen: Params, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """What `step.gradients` differentiates, float32 scalar, without dropout and router losses."""

    def micro(sums, one):
        loss, (weight, _) = nll(objective.model, trainable, frozen, one)
        return (sums[0] + loss, sums[1] + weight), None

    zeros = (jnp.float32(0), jnp.float32(0))
    (loss, weight), _ = jax.lax.scan(micro, zeros, micro_batches(batch, objective.accumulation))
    specs = {spec.name: spec for spec in objective.specs}
    banks = trees.overlay(frozen["banks"], trainable["banks"])
    extra = sum(one.weight * one.value(specs, banks) for one in objective.regularisers)
    return loss / jnp.maximum(weight, 1.0) + extra


def by_gradient(problem: Problem, seed: int) -> Steps:
    """The stage's own optimiser and schedule; nothing is drawn.

    A step's own loss is not yielded: it is that of the weights before the update, with a router's
    noise and forced picks.
    """
    del seed
    prepared, state = problem.prepared, problem.state
    update = jit_step(prepared.stage.setup, prepared.objective, prepared.optimiser, state)
    for _ in range(prepared.steps):
        state, _ = update(state, prepared.frozen, problem.batch)
        value = problem.loss(state.trainable, prepared.frozen, problem.batch)
        yield np.atleast_1d(value), state.trainable


def by_evolution(problem: Problem, seed: int) -> Steps:
    """CMA-ES: a generation's losses from one compiled call, and no gradient."""
    import cma  # loads SciPy: a third of a second

    prepared, trainable = problem.prepared, problem.state.trainable
    start_K, tree_of = ravel_pytree(trainable)

    @functools.partial(jax.jit, out_shardings=replicated(prepared.stage.setup.mesh))
    def losses(candidates_PxK, frozen, batch):
        one = functools.partial(mean_loss, prepared.objective)
        return jax.lax.map(lambda w_K: one(tree_of(w_K), frozen, batch), candidates_PxK)

    layout = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    rng = np.random.default_rng(seed)
    options = {
        "maxiter": prepared.steps,
        "verbose": -9,
        # Left to itself it draws from numpy's global state.
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": math.nan,
    }
    search = cma.CMAEvolutionStrategy(np.asarray(start_K, np.float64), SPREAD, options)
    while not search.stop():
        candidates = search.ask()
        candidates_PxK = np.asarray(candidates, np.float32)
        values_P = np.asarray(losses(candidates_PxK, prepared.frozen, problem.batch))
        search.tell(candidates, values_P.tolist())
        found = jax.device_get(tree_of(jnp.asarray(candidates_PxK[np.argmin(values_P)])))
        yield values_P, jax.device_put(found, layout)


METHODS: Mapping[str, Callable[[Problem, int], Steps]] = {
    "gradient": by_gradient,
    "cma": by_evolution,
}
