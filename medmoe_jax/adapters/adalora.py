"""AdaLoRA: banks B Λ A whose ranks shrink to a common budget (arXiv 2303.10512).

Axes: N layers of the bank, D input width, E experts, r rank, O output width, M matrices.
A matrix is one (site, layer, expert); triplet i of it is (B_i, Λ_i, A_i). `t` counts updates from
1. The factor s of the bank keeps its initial rank, whatever the budget does to its triplets. The
method's regulariser is `orthonormality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE, Range

_FACTORS = ("lora_a", "lora_b", "scale")


@dataclass(frozen=True)
class Allocator:
    """How a bank's budget of triplets shrinks, and what decides which ones stay.

    Attributes:
      bank: the bank, which has a learned scale.
      target_rank: triplets a matrix keeps in the end, on average.
      t_init: updates before the budget begins to shrink.
      t_final: updates after the triplets are chosen for the rest of the stage. An evaluation's
        `best` and `patience` count these alone. A later stage that trains the bank may use all of
        its ranks again, unless it has an allocator of its own.
      every: updates between two allocations.
      beta1, beta2: smoothing of the sensitivity and of its uncertainty.
    """

    bank: str
    target_rank: int
    t_init: int = 0
    t_final: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("target_rank", "every"):
            COUNT.check_whole(name, getattr(self, name))
        for name in ("t_init", "t_final"):
            NOT_NEGATIVE.check_whole(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            Range(0, 1, above=True, below=True).check(name, getattr(self, name))

    def check(self, spec: BankSpec) -> None:
        """Raise UserError unless the bank can be allocated as this says."""
        if not spec.learned_scale or spec.whole:
            raise UserError(
                f"bank: '{spec.name}' has no Λ; give it low-rank experts with learned_scale=True"
            )
        if self.target_rank > spec.rank:
            raise UserError(
                f"target_rank: {self.target_rank} is above the rank {spec.rank} that bank "
                f"'{spec.name}' starts with"
            )


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets of a bank may stay after each update of a run of `steps` updates.

    Raises:
      UserError: t_init and t_final leave no step to allocate in, or none to judge triplets by.
    """

    allocator: Allocator
    spec: BankSpec
    steps: int

    def __post_init__(self) -> None:
        a = self.allocator
        if a.t_init + a.t_final >= self.steps:
            raise UserError(
                f"t_init: {a.t_init} + t_final {a.t_final} leave none of the run's {self.steps} "
                "steps to shrink the budget in"
            )
        if self.freeze < 2:
            raise UserError(
                f"t_final: with {a.t_final} of {self.steps} steps the triplets are chosen at "
                "update 1, before anything tells which matter; take more steps"
            )

    @property
    def freeze(self) -> int:
        """The update with which the triplets are chosen for the rest of the stage."""
        return self.steps - self.allocator.t_final

    @property
    def matrices(self) -> int:
        """Number of matrices that share the budget."""
        return len(self.spec.sites) * self.spec.layers * self.spec.experts

    def budget(self, t: int) -> int:
        """Triplets that may stay after update t: constant, then a cubic, then constant."""
        first, last = (
            rank * self.matrices for rank in (self.spec.rank, self.allocator.target_rank)
        )
        start = self.allocator.t_init
        if t <= start:
            return first
        left = 1 - (min(t, self.freeze) - start) / (self.freeze - start)
        return int((first - last) * left**3 + last)


class Allocation(NamedTuple):
    """What an allocator remembers of a bank.

    Attributes:
      sensitivity, uncertainty: Ī and U, `{site: {"lora_a", "lora_b", "scale"}}` shaped as those.
      kept: the triplets that the last allocation kept, `{site: bool [N, E, r]}`.
    """

    sensitivity: Any
    uncertainty: Any
    kept: Any


def start(spec: BankSpec, params: Params) -> Allocation:
    """The state before the first update: no importance, every triplet kept."""
    zeros = jax.tree.map(jnp.zeros_like, _factors(spec, params))
    kept = {site: jnp.ones(params[site]["scale"].shape, bool) for site in spec.sites}
    return Allocation(zeros, jax.tree.map(jnp.copy, zeros), kept)


def _factors(spec: BankSpec, params):
    return {site: {name: params[site][name] for name in _FACTORS} for site in spec.sites}


def scores(state: Allocation) -> dict[str, jax.Array]:
    """Each triplet's score, `{site: float32 [N, E, r]}`.

    With e = Ī·U of an entry: e(Λ_i) + mean_j e(A_ij) + mean_j e(B_ji).
    """
    entries = jax.tree.map(jnp.multiply, state.sensitivity, state.uncertainty)
    return {
        site: e["scale"] + e["lora_a"].mean(1) + e["lora_b"].mean(3) for site, e in entries.items()
    }


def lowest(triplet_scores: Mapping[str, jax.Array], cut: jax.Array | int) -> dict[str, jax.Array]:
    """Where the `cut` lowest scores of all sites, layers and experts together are, as `scores`.

    They are never more, as a budget that clears all equals of the last one (scores of 0, of
    experts that no token picked) may clear a whole bank. Of equals, those with the smaller place
    in their matrix go first, so that no matrix loses all of its own before others lose any.
    """
    # r comes first in the order that breaks ties.
    by_place = {site: jnp.moveaxis(s, 2, 0) for site, s in triplet_scores.items()}
    flat_rxM = jnp.concatenate([s.reshape(s.shape[0], -1) for s in by_place.values()], 1)
    order = jnp.argsort(flat_rxM.ravel(), stable=True)
    cleared_rxM = (jnp.argsort(order) < cut).reshape(flat_rxM.shape)
    ends = np.cumsum([s[0].size for s in by_place.values()])[:-1]
    pieces = jnp.split(cleared_rxM, ends, axis=1)
    return {
        site: jnp.moveaxis(piece.reshape(s.shape), 0, 2)
        for (site, s), piece in zip(by_place.items(), pieces, strict=True)
    }


def advance(
    schedule: BudgetSchedule, t: jax.Array, params: Any, gradients: Any, state: Allocation
) -> tuple[dict[str, jax.Array], Allocation]:
    """The allocation after update t.

    Importance moves until the triplets are chosen for the rest of the stage:
    I = |θ · g|, Ī = β1 Ī + (1 − β1) I, U = β2 U + (1 − β2) |I − Ī|.

    Args:
      schedule: the budget after each update.
      t: [] int32, updates made, this one included.
      params: the bank's parameters after the update.
      gradients: the whole loss's, as the update used them (accumulated, averaged, clipped).
      state: before.

    Returns:
      `(cleared, state)`: Λ is to be set to 0 where `cleared` (`{site: bool [N, E, r]}`) says so.
      Between allocations it says so nowhere, so that Λ can grow back.
    """
    a = schedule.allocator
    moving = t < schedule.freeze
    importance = jax.tree.map(
        lambda p, g: jnp.abs(p * g),
        _factors(schedule.spec, params),
        _factors(schedule.spec, gradients),
    )
    sensitivity = jax.tree.map(
        lambda old, new: jnp.where(moving, a.beta1 * old + (1 - a.beta1) * new, old),
        state.sensitivity,
        importance,
    )
    uncertainty = jax.tree.map(
        lambda old, new, mean: jnp.where(
            moving, a.beta2 * old + (1 - a.beta2) * jnp.abs(new - mean), old
        ),
        state.uncertainty,
        importance,
        sensitivity,
    )
    state = Allocation(sensitivity, uncertainty, state.kept)
    # Worked out on the host: float32 would round some budgets to their neighbour.
    budgets = jnp.asarray([schedule.budget(i) for i in range(schedule.freeze + 1)], jnp.int32)
    low = lowest(scores(state), budgets[0] - budgets[jnp.minimum(t, schedule.freeze)])
    allocates = (t == schedule.freeze) | (moving & (t > a.t_init) & (t % a.every == 0))
    kept = {site: jnp.where(allocates, ~mask, state.kept[site]) for site, mask in low.items()}
    clears = allocates | (t > schedule.freeze)
    return {site: clears & ~k for site, k in kept.items()}, state._replace(kept=kept)


def ranks(spec: BankSpec, params: Params) -> dict[str, list[list[int]]]:
    """How many triplets with Λ ≠ 0 each matrix has, `{site: [N][E]}`; the others change nothing."""
    scales = {site: np.asarray(params[site]["scale"]) for site in spec.sites}
    return {site: (scale != 0).sum(-1).tolist() for site, scale in scales.items()}
