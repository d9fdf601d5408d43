"""Keeping few of a bank's mixing weights away from zero.

Axes: N layers (or 1), E experts.
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
class Sparsity:
    """The term `weight · mean |a|` on the mixing weights a of a `skill` gate.

    Attributes:
      bank: whose mixing weights.
      weight: on the mean; 0 leaves the term out and keeps its metrics.
    """

    bank: str
    weight: float = 0.05

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("weight", self.weight)

    @property
    def name(self) -> str:
        """The name that its metrics begin with."""
        return f"sparsity/{self.bank}"

    @property
    def uses(self) -> tuple[str, ...]:
        """The banks that it reads."""
        return (self.bank,)

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """What its gradient changes, each as `(bank, part)`; a part is `factors` or `gate`."""
        return ((self.bank, "gate"),)

    def value(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """The unweighted term, float32 scalar."""
        return jnp.mean(jnp.abs(self.measure(specs, banks)))

    def measure(self, specs: Mapping[str, BankSpec], banks: Mapping[str, Any]) -> jax.Array:
        """The mixing weights, float32 `[N, E]`.

        Raises:
          UserError: the bank has none, or they always sum to one.
        """
        spec = specs[self.bank]
        if spec.gate != "skill":
            raise UserError(f"sparsity: bank '{self.bank}' has gate '{spec.gate}', not 'skill'")
        if spec.mix_softmax:
            raise UserError(
                f"sparsity: the mixing weights of bank '{self.bank}' pass through a softmax and "
                "always sum to one; leave the term out, or set mix_softmax=False"
            )
        return banks[self.bank]["mix"]["weight"]

    def figures(self, measured: np.ndarray) -> dict[str, float]:
        """Each expert's mixing weight, averaged over the layers."""
        means = np.asarray(measured).mean(0)
        return {f"mix/{self.bank}/{e}": float(value) for e, value in enumerate(means)}
