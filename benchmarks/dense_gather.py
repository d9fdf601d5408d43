"""How the public PyTorch code runs a mixture of LoRA experts, written in JAX.

Axes: B batch, T tokens, D input width, O output width, E experts, K picks, r rank.
Every expert's output is computed for every token and stacked, then the picked ones are gathered.
`dense_gather` goes expert by expert as the published modules do; `dense_gather_batched` is the
same idea with one batched product for all experts, which XLA runs faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from medmoe_jax.routing.dispatch import STRATEGIES, Reference
from medmoe_jax.routing.terms import LoraTerm, Terms


def _one_by_one(x_BxTxD, a_DxExr, b_ExrxO):
    every = [(x_BxTxD @ a_DxExr[:, e]) @ b_ExrxO[e] for e in range(len(b_ExrxO))]
    return jnp.stack(every, axis=2)


def _batched(x_BxTxD, a_DxExr, b_ExrxO):
    return jnp.einsum("BTEr,ErO->BTEO", jnp.einsum("BTD,DEr->BTEr", x_BxTxD, a_DxExr), b_ExrxO)


def _one(experts: Callable, term: LoraTerm):
    x_BxTxD, dtype = term.x_BxTxD, term.x_BxTxD.dtype
    lora_a, lora_b = (w.astype(dtype) for w in (term.lora_a_DxExr, term.lora_b_ExrxO))
    if term.scale_Exr is not None:
        lora_a = lora_a * term.scale_Exr.astype(dtype)[None]
    all_BxTxExO = experts(x_BxTxD, lora_a, lora_b)
    if term.gates is None:
        return term.s * all_BxTxExO.sum(axis=2)
    # Tokens without an expert have the pick E and the weight 0.
    picks_BxTxKx1 = jnp.minimum(term.gates.picks_BxTxK, all_BxTxExO.shape[2] - 1)[..., None]
    picked_BxTxKxO = jnp.take_along_axis(all_BxTxExO, picks_BxTxKx1, axis=2)
    weights_BxTxKx1 = term.gates.weights_BxTxK[..., None].astype(dtype)
    return term.s * jnp.sum(picked_BxTxKxO * weights_BxTxKx1, axis=2)


@dataclass(frozen=True)
class DenseGather(Reference):
    """As the published modules: every expert's output, one after another, then the picked ones."""

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `routing.dispatch.Strategy`."""
        return {site: sum(_one(_one_by_one, term) for term in some) for site, some in terms.items()}


@dataclass(frozen=True)
class DenseGatherBatched(Reference):
    """The same with one product for all experts."""

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `routing.dispatch.Strategy`."""
        return {site: sum(_one(_batched, term) for term in some) for site, some in terms.items()}


BASELINES = {"dense_gather": DenseGather, "dense_gather_batched": DenseGatherBatched}


def register() -> None:
    """Let `run.dispatch` name them, in this process only."""
    STRATEGIES.update(BASELINES)
