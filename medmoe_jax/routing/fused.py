"""Sites whose banks join the base's own product, in one kernel that reads x once.

Axes: B batch, T tokens, D input width, O output width, E experts, r rank, R = Σ E·r of the terms.

    y = x W + ((x A) ∘ gate) B,    the terms side by side, s and Λ inside B
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.base.decoder import Execution, add_bias
from medmoe_jax.base.quantised import Quantised
from medmoe_jax.kernels import lora_linear as kernel
from medmoe_jax.parallel.rules import row_parallel
from medmoe_jax.routing import dense, shards
from medmoe_jax.routing.terms import Term


def linear(
    execution: Execution, x_BxTxD, weights: Mapping[str, Any], terms: Mapping[str, Sequence[Term]]
) -> dict[str, Any]:
    """As `dense.linear` with `stacked_lora`; sites that the kernel can take go through it.

    It takes a float kernel whose terms all read x itself (no dropout), and rank columns that fit
    its memory.
    """
    one_pass = {
        site
        for site, weight in weights.items()
        if terms.get(site) and _fits(execution, site, x_BxTxD, weight["kernel"], terms[site])
    }
    apart = {site: weight for site, weight in weights.items() if site not in one_pass}
    theirs = {site: some for site, some in terms.items() if site in apart}
    out = dense.linear(dense.stacked_lora, x_BxTxD, apart, theirs)
    for site in one_pass:
        y_BxTxO = _product(execution, site, x_BxTxD, weights[site]["kernel"], terms[site])
        out[site] = add_bias(y_BxTxO, weights[site])
    return out


def _cut(execution: Execution, site: str, kernel_DxO) -> tuple[str | None, str | None]:
    """The mesh axes of the site's inputs and outputs; at most one of the two is cut."""
    if row_parallel(site):
        return shards.tensor(execution, kernel_DxO.shape[0]), None
    return None, shards.tensor(execution, kernel_DxO.shape[1])


def _fits(execution: Execution, site, x_BxTxD, kernel_DxO, terms: Sequence[Term]) -> bool:
    if isinstance(kernel_DxO, Quantised) or any(t.x_BxTxD is not x_BxTxD for t in terms):
        return False
    B, T, _ = x_BxTxD.shape
    D, O = (
        size // (execution.mesh.shape[axis] if axis else 1)
        for size, axis in zip(kernel_DxO.shape, _cut(execution, site, kernel_DxO), strict=True)
    )
    R = sum(t.lora_a_DxExr.shape[1] * t.lora_a_DxExr.shape[2] for t in terms)
    return kernel.fits(B * T // execution.row_shards, D, O, R, x_BxTxD.dtype.itemsize)


def _product(execution: Execution, site: str, x_BxTxD, kernel_DxO, terms: Sequence[Term]):
    on_in, on_out = _cut(execution, site, kernel_DxO)
    D, O = kernel_DxO.shape
    a_DxR = jnp.concatenate([t.lora_a_DxExr.reshape(D, -1) for t in terms], axis=1)
    b_RxO = jnp.concatenate([_scaled(t).reshape(-1, O) for t in terms], axis=0)
    gates = _gates(x_BxTxD.shape[:2], terms)
    rows, spec = shards.rows(execution), shards.spec
    # Where the inputs are cut, every device has a part of the sum. They are added outside, where
    # the gradient of a sum costs no exchange.
    run = shards.local(
        execution,
        functools.partial(_local, execution.backend),
        (spec(rows, None, on_in), spec(on_in, on_out), spec(on_in), spec(None, on_out))
        + (spec(rows),) * len(gates),
        spec(on_in, rows, None, on_out),
    )
    # Cast before it is gathered; A and B are cast by the kernel, their gradients are float32.
    y_PxBxTxO = run(x_BxTxD, kernel_DxO.astype(x_BxTxD.dtype), a_DxR, b_RxO, *gates)
    return jax.lax.reduce_sum(y_PxBxTxO, (0,))


def _local(backend: str, x_BxTxD, w_DxO, a_DxR, b_RxO, *gates):
    gate_TxR = gates[0].reshape(-1, a_DxR.shape[1]) if gates else None
    x_TxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    y_TxO = kernel.lora_linear(x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, backend=backend)
    return y_TxO.reshape(1, *x_BxTxD.shape[:2], -1)


def _scaled(term: Term):
    """`s Λ B`, float32 `[E, r, O]`."""
    b_ExrxO = term.s * term.lora_b_ExrxO
    return b_ExrxO if term.scale_Exr is None else b_ExrxO * term.scale_Exr[..., None]


def _gates(tokens: tuple[int, int], terms: Sequence[Term]) -> tuple:
    """`(gate_BxTxR,)`, each expert's weight on its rank columns; () where there is no router."""
    if all(t.gates is None for t in terms):
        return ()
    parts = []
    for t in terms:
        _, E, r = t.lora_a_DxExr.shape
        if t.gates is None:
            parts.append(jnp.ones((*tokens, E * r), jnp.float32))
        else:
            parts.append(jnp.repeat(t.gates.dense_BxTxE, r, axis=-1))
    return (jnp.concatenate(parts, axis=-1),)
