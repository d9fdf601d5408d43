"""How the public PyTorch code runs a mixture of LoRA experts, written in JAX.

Axes: B batch, T tokens, D input width, O output width, E experts, K picks, r rank.
Every expert's output is computed for every token and stacked, then the picked ones are gathered.
`dense_gather` goes expert by expert as the published modules do; `dense_gather_batched` is the
same idea with one batched product for all experts, which XLA runs faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from medmoe_jax.base.execution import Execution
from medmoe_jax.routing import dense
from medmoe_jax.routing.dispatch import STRATEGIES
from medmoe_jax.routing.terms import Term


def _one_by_one(x_BxTxD, a_DxExr, b_ExrxO):
    every = [(x_BxTxD @ a_DxExr[:, e]) @ b_ExrxO[e] for e in range(len(b_ExrxO))]
    return jnp.stack(every, axis=2)


def _batched(x_BxTxD, a_DxExr, b_ExrxO):
    return jnp.einsum("BTEr,ErO->BTEO", jnp.einsum("BTD,DEr->BTEr", x_BxTxD, a_DxExr), b_ExrxO)


def _one(experts: Callable, term: Term):
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


def dense_gather(terms: Mapping[str, Sequence[Term]]) -> dict[str, Any]:
    """`{site: delta_BxTxO}`, as `routing.dense.reference_lora`."""
    return {site: sum(_one(_one_by_one, term) for term in some) for site, some in terms.items()}


def dense_gather_batched(terms: Mapping[str, Sequence[Term]]) -> dict[str, Any]:
    """The same with one product for all experts."""
    return {site: sum(_one(_batched, term) for term in some) for site, some in terms.items()}


BASELINES = {"dense_gather": dense_gather, "dense_gather_batched": dense_gather_batched}


def register() -> None:
    """Let `run.dispatch` name them, in this process only."""
    for name, lora in BASELINES.items():
        made = STRATEGIES["reference"](Execution())._replace(
            linear=functools.partial(dense.linear, lora), lora=lora
        )
        STRATEGIES[name] = lambda execution, made=made: made
