"""Keeping the A and B of a bank near orthonormal, as AdaLoRA does (arXiv 2303.10512, eq. 4).

Axes: N layers of the bank, D input width, E experts, r rank, O output width.
A matrix is one (site, layer, expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import NOT_NEGATIVE


@dataclass(frozen=True)
class Orthonormality:
    """The term `weight · mean over matrices of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F`.

    Attributes:
      bank: whose A and B it keeps near orthonormal, of every site, layer and expert.
      weight: on the mean; 0 leaves the term out and keeps its metrics.
      squared: the squares of the norms instead (the paper).
    """

    bank: str
    weight: float = 0.5
    squared: bool = False

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("weight", self.weight)

    @property
    def name(self) -> str:
        """The name that its metrics begin with."""
        return f"orthonormality/{self.bank}"

    @property
    def uses(self) -> tuple[str, ...]:
        """The banks that it reads."""
        return (self.bank,)

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """What its gradient changes, each as `(bank, part)`; a part is `factors` or `gate`."""
        return ((self.bank, "factors"),)

    def value(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """The unweighted term, float32 scalar."""
        squares = self.measure(specs, banks)
        return jnp.mean(squares if self.squared else _root(squares))

    def measure(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """`‖A Aᵀ − I‖²_F` of every matrix, then `‖Bᵀ B − I‖²_F`, float32 `[2 · matrices]`.

        Raises:
          UserError: the bank's experts have no low-rank factors.
        """
        spec = specs[self.bank]
        if spec.whole:
            raise UserError(f"orthonormality: bank '{self.bank}' has no low-rank factors")
        sites = [banks[self.bank][site] for site in spec.sites]
        a = [_from_identity("NDEr,NDEq->NErq", p["lora_a"]) for p in sites]
        b = [_from_identity("NErO,NEqO->NErq", p["lora_b"]) for p in sites]
        return jnp.concatenate(a + b)

    def figures(self, measured: np.ndarray) -> dict[str, float]:
        """The largest norm of all matrices: the mean hides a single one that ran off."""
        return {f"{self.name}/largest": float(np.sqrt(measured.max()))}


def _from_identity(equation: str, factor) -> jax.Array:
    gram_NxErxr = jnp.einsum(equation, factor, factor, precision=jax.lax.Precision.HIGHEST)
    off = gram_NxErxr - jnp.eye(gram_NxErxr.shape[-1])[None, None]
    return jnp.sum(off**2, axis=(2, 3)).ravel()


def _root(x):
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
