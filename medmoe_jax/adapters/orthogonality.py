"""Keeping one bank's input directions orthogonal to another's (MedCare, section 3.3).

Axes: N shared layers, D input width, r and q the ranks (all experts together) of the two banks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import NOT_NEGATIVE

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Orthogonality:
    """The term `weight · Σ_{layers, sites} reduce_ij |A_of A_againstᵀ|_ij`.

    Attributes:
      of: the bank that moves away.
      against: the bank whose directions it should avoid.
      weight: λ; 0 leaves the term out and keeps its metrics.
      reduction: `sum` over the r × q entries of a site (the paper), or their `mean`.
      stop_gradient: whether `against` is treated as a constant even when it is trained.
    """

    of: str
    against: str
    weight: float = 1.0
    reduction: str = "mean"
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            known = ", ".join(REDUCTIONS)
            raise UserError(f"reduction: '{self.reduction}' is none of {known}")
        if self.of == self.against:
            raise UserError(f"against: '{self.against}' cannot be orthogonal to itself")
        NOT_NEGATIVE.check("weight", self.weight)

    @property
    def name(self) -> str:
        """The name that its metrics begin with."""
        return f"orthogonality/{self.of}-{self.against}"

    @property
    def uses(self) -> tuple[str, ...]:
        """The banks that it reads."""
        return self.of, self.against

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """What its gradient changes, each as `(bank, part)`; a part is `factors` or `gate`."""
        moved = (self.of,) if self.stop_gradient else self.uses
        return tuple((bank, "factors") for bank in moved)

    def value(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """`term` between the two banks."""
        return term(self, self._pairs(specs, banks))

    def measure(
        self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """`grams` of the two banks, for `figures`."""
        return grams(self._pairs(specs, banks))

    def figures(self, measured: Iterable[Sequence[jax.Array | np.ndarray]]) -> dict[str, float]:
        """`overlap` of the two banks."""
        prefix = f"overlap/{self.of}-{self.against}"
        return {f"{prefix}/{name}": value for name, value in overlap(measured).items()}

    def _pairs(self, specs, banks):
        return pairs(specs[self.of], specs[self.against], banks[self.of], banks[self.against])


def pairs(
    of: BankSpec, against: BankSpec, params_of: Params, params_against: Params
) -> list[tuple[jax.Array, jax.Array]]:
    """`[(A_NxDxr, A'_NxDxq), ...]`, one pair a shared site, over the shared layers.

    Raises:
      UserError: the banks share no site and layer, or one has no low-rank factors.
    """
    for spec in (of, against):
        if spec.whole:
            raise UserError(f"orthogonality: bank '{spec.name}' has whole networks, no factors")
    start, stop = max(of.start, against.start), min(of.stop, against.stop)
    sites = [site for site in of.sites if site in against.sites]
    if start >= stop or not sites:
        raise UserError(f"orthogonality: banks '{of.name}' and '{against.name}' share no site")

    def rows(spec, params, site):
        a = params[site]["lora_a"][start - spec.start : stop - spec.start]
        return a.reshape(*a.shape[:2], -1)

    return [(rows(of, params_of, s), rows(against, params_against, s)) for s in sites]


def _gram(a_NxDxr, b_NxDxq):
    return jnp.einsum("NDr,NDq->Nrq", a_NxDxr, b_NxDxq, precision=jax.lax.Precision.HIGHEST)


def term(spec: Orthogonality, aligned_pairs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The unweighted term, float32 scalar; its gradient is real on both sides unless stopped."""
    total = jnp.float32(0)
    for a_NxDxr, b_NxDxq in aligned_pairs:
        if spec.stop_gradient:
            b_NxDxq = jax.lax.stop_gradient(b_NxDxq)
        entries = jnp.abs(_gram(a_NxDxr, b_NxDxq))
        total += entries.sum() if spec.reduction == "sum" else entries.mean((1, 2)).sum()
    return total


def grams(
    aligned_pairs: Sequence[tuple[jax.Array, jax.Array]],
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """`(AᵀA, AᵀA', A'ᵀA')` of each pair, `[N, r, r]`, `[N, r, q]`, `[N, q, q]`."""
    return [(_gram(a, a), _gram(a, b), _gram(b, b)) for a, b in aligned_pairs]


def _inverse_root(gram_Nxrxr: np.ndarray) -> np.ndarray:
    """`[N, r, r]` whose columns, in the basis of A's columns, are orthonormal directions.

    Directions that A does not have (rank lost to padding or pruning) become zero columns.
    """
    values_Nxr, vectors_Nxrxr = np.linalg.eigh(gram_Nxrxr)
    held_Nxr = values_Nxr > 1e-6 * values_Nxr.max(axis=1, keepdims=True).clip(1e-30)
    scale_Nxr = np.where(held_Nxr, 1.0 / np.sqrt(np.where(held_Nxr, values_Nxr, 1.0)), 0.0)
    return vectors_Nxrxr * scale_Nxr[:, None]


def overlap(gram_triples: Iterable[Sequence[jax.Array | np.ndarray]]) -> dict[str, float]:
    """Scale-free measures of how much two banks look in the same directions.

    Works on the host in float64 from the small Gram matrices that `grams` gives.

    Returns:
      `cos`: mean |cos| between rows of the two A; `principal_cos_mean` and `principal_cos_max`:
      cosines of the principal angles between their row spaces, `principal_angle_min`: the
      smallest such angle in degrees. Means are over layers and sites.
    """
    cosines, principal = [], []
    for triple in gram_triples:
        aa, ab, bb = (np.asarray(gram, np.float64) for gram in triple)
        norms = [np.sqrt(np.diagonal(g, axis1=1, axis2=2)).clip(1e-12) for g in (aa, bb)]
        cosines.append(np.abs(ab / (norms[0][:, :, None] * norms[1][:, None, :])).mean())
        across = np.swapaxes(_inverse_root(aa), 1, 2) @ ab @ _inverse_root(bb)
        principal.append(np.linalg.svd(across, compute_uv=False).clip(0.0, 1.0))
    largest = max(float(p.max()) for p in principal)
    return {
        "cos": float(np.mean(cosines)),
        "principal_cos_mean": float(np.mean([p.mean() for p in principal])),
        "principal_cos_max": largest,
        "principal_angle_min": float(np.degrees(np.arccos(largest))),
    }
