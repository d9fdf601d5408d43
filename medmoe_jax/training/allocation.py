"""Allocating the ranks of banks as part of an optimiser's update.

Axes: N layers of a bank, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medmoe_jax.adapters import adalora
from medmoe_jax.adapters.adalora import Allocation, BudgetSchedule


class AllocationState(NamedTuple):
    """The optimiser's state together with that of the allocators.

    Attributes:
      count: [] int32, updates made.
      banks: what each allocator remembers, by bank.
      inner: the optimiser's own state.
    """

    count: jax.Array
    banks: dict[str, Allocation]
    inner: Any


def allocating(
    inner: optax.GradientTransformation, schedules: Mapping[str, BudgetSchedule]
) -> optax.GradientTransformation:
    """An optimiser that allocates the ranks of some banks after each of its updates.

    It sees the gradients that `inner` sees, so clipping belongs before it.

    Args:
      inner: gives the updates.
      schedules: by bank; the parameters are `{"banks": {name: parameters}, ...}`.
    """

    def init(params: Any) -> AllocationState:
        banks = {
            name: adalora.start(one.spec, params["banks"][name]) for name, one in schedules.items()
        }
        return AllocationState(jnp.int32(0), banks, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AllocationState]:
        if params is None:
            raise ValueError("an allocator looks at the parameters, and they were not given")
        moves, inner_state = inner.update(updates, state.inner, params)
        moves, banks = _allocate(schedules, moves, updates, state, params)
        return moves, AllocationState(state.count + 1, banks, inner_state)

    return optax.GradientTransformation(init, update)


def _allocate(
    schedules: Mapping[str, BudgetSchedule], moves: Any, gradients, state: AllocationState, params
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The updates with Λ cleared where a bank's allocation says so, and the allocations."""
    moved, banks = dict(moves["banks"]), {}
    for name, one in schedules.items():
        before = params["banks"][name]
        after = optax.apply_updates(before, moved[name])
        cleared, banks[name] = adalora.advance(
            one, state.count + 1, after, gradients["banks"][name], state.banks[name]
        )
        moved[name] = _with_cleared(moved[name], before, cleared)
    return {**moves, "banks": moved}, banks


def _with_cleared(updates, params, cleared):
    """The updates with Λ brought to exactly 0, as x + (−x), where it is cleared."""
    out = dict(updates)
    for site, mask in cleared.items():
        scale = jnp.where(mask, -params[site]["scale"], updates[site]["scale"])
        out[site] = {**updates[site], "scale": scale}
    return out


def figures(
    schedules: Mapping[str, BudgetSchedule], banks: Mapping[str, Any], optimiser_state: Any
) -> dict[str, float]:
    """Budget, triplets kept by the last allocation, and mean |Λ| of each allocated bank."""
    out: dict[str, float] = {}
    if not schedules:
        return out
    state = optax.tree.get(optimiser_state, AllocationState.__name__)
    t = int(jax.device_get(state.count))
    for name, one in schedules.items():
        kept = jax.device_get(state.banks[name].kept)
        scales = [np.abs(jax.device_get(banks[name][site]["scale"])) for site in one.spec.sites]
        out[f"allocation/{name}/budget"] = one.budget(t)
        out[f"allocation/{name}/kept"] = int(sum(mask.sum() for mask in kept.values()))
        out[f"allocation/{name}/mean_scale"] = float(np.mean(scales))
    return out
