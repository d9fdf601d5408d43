"""Sites whose banks join the base's own product, in one kernel that reads x once.

Axes: B batch, T tokens, D input width, O output width, E experts, r rank, R = Σ E·r of the terms.

    y = x W + ((drop(x) A) ∘ gate) B,    the terms side by side, s and Λ inside B
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import add_bias
from medmoe_jax.kernels import lora_linear as kernel
from medmoe_jax.kernels.dropout import Counter, Dropout
from medmoe_jax.kernels.quantised import storage_of
from medmoe_jax.kernels.tiles import SMALLEST, KernelMemory, kernel_memory
from medmoe_jax.parallel.rules import RULES, row_parallel, spec_for
from medmoe_jax.parallel.topology import CHIPS
from medmoe_jax.routing import dense
from medmoe_jax.routing.terms import LoraTerm, Terms

_MEMORIES = {chip.kind: kernel_memory(chip.cores, chip.vmem_mib) for chip in CHIPS.values()}


def memory(device: jax.Device) -> KernelMemory:
    """What the kernel may take of a device; what suits every chip where it is not a known one."""
    return _MEMORIES.get(device.device_kind, SMALLEST)


def linear(
    execution: Execution, x_BxTxD: jax.Array, weights: Mapping[str, Any], terms: Terms
) -> dict[str, Any]:
    """`{site: x W (+ b) + its terms}`; sites that the kernel can take go through it.

    It takes a site whose terms all read x itself, or all read it after the same draw of dropout,
    and whose rank columns fit its memory. A quantised weight travels as it is stored.
    """
    # In the order of the weights: every process of a run has to compile the same program.
    one_pass = [
        site
        for site, weight in weights.items()
        if terms.get(site) and _fits(execution, site, x_BxTxD, weight["kernel"], terms[site])
    ]
    apart = {site: weight for site, weight in weights.items() if site not in one_pass}
    theirs = {site: some for site, some in terms.items() if site in apart}
    out = dense.add(dense.base_products(x_BxTxD, apart), dense.stacked_lora(theirs))
    for site in one_pass:
        y_BxTxO = _product(execution, site, x_BxTxD, weights[site]["kernel"], terms[site])
        out[site] = add_bias(y_BxTxO, weights[site])
    return out


def _cut(execution: Execution, site: str, kernel_DxO) -> tuple[str | None, str | None]:
    """The mesh axes of the site's inputs and outputs; at most one of the two is cut."""
    if row_parallel(site):
        return execution.tensor_axis(kernel_DxO.shape[0]), None
    return None, execution.tensor_axis(kernel_DxO.shape[1])


def _fits(execution: Execution, site, x_BxTxD, kernel_DxO, terms: Sequence[LoraTerm]) -> bool:
    if any(t.dropout is not terms[0].dropout for t in terms):
        return False
    B, T, _ = x_BxTxD.shape
    D, O = (
        size // execution.size(axis)
        for size, axis in zip(kernel_DxO.shape, _cut(execution, site, kernel_DxO), strict=True)
    )
    R = sum(t.lora_a_DxExr.shape[1] * t.lora_a_DxExr.shape[2] for t in terms)
    tokens, dtype = execution.local_tokens(B, T), x_BxTxD.dtype
    return kernel.fits(tokens, D, O, R, dtype, kernel_DxO, memory(execution.device))


def _product(execution: Execution, site: str, x_BxTxD, kernel_DxO, terms: Sequence[LoraTerm]):
    on_in, on_out = _cut(execution, site, kernel_DxO)
    T, spec = x_BxTxD.shape[1], PartitionSpec
    dropout = terms[0].dropout
    rate = 0.0 if dropout is None else dropout.rate
    # Where the inputs are cut, every device has a part of the sum. They are added outside, where
    # the gradient of a sum costs no exchange.
    run = execution.per_device(
        functools.partial(
            _local, execution.backend, memory(execution.device), row_parallel(site), rate
        ),
        (
            execution.spec(T, on_in),
            _weight_spec(kernel_DxO, on_in, on_out),
            spec(on_in),
            spec(None, on_out),
            execution.spec(T),
            # A draw's counter: the words of this device's tokens and columns make the mask here
            # that they make anywhere.
            None if dropout is None else Counter(execution.spec(T), spec(on_in)),
        ),
        spec(on_in, *execution.spec(T, on_out)),
    )
    y_PxBxTxO = run(
        x_BxTxD,
        # Cast before it is gathered; A and B are cast by the kernel, their gradients are float32.
        kernel_DxO if storage_of(kernel_DxO) else kernel_DxO.astype(x_BxTxD.dtype),
        *zip(*(_flat(execution, site, t) for t in terms), strict=True),
        [None if t.gates is None else t.gates.dense_BxTxE for t in terms],
        None if dropout is None else dropout.counter,
    )
    return jax.lax.reduce_sum(y_PxBxTxO, (0,))


def _weight_spec(kernel_DxO, on_in: str | None, on_out: str | None):
    """Where a weight lies, array by array; the one row of an array that has but one is not cut."""
    return jax.tree.map(
        lambda leaf: PartitionSpec(on_in if leaf.shape[0] > 1 else None, on_out), kernel_DxO
    )


def _flat(execution: Execution, site: str, term: LoraTerm):
    """`A [D, E·r]` and `s Λ B [E·r, O]` in their shards, and so their gradients.

    Whole they are inside the kernel only. Flat, because a rank of its own dimension would be filled
    up to a tile.
    """
    D, E, r = term.lora_a_DxExr.shape
    b_ExrxO = term.s * term.lora_b_ExrxO
    if term.scale_Exr is not None:
        b_ExrxO = b_ExrxO * term.scale_Exr[..., None]
    a_DxR, b_RxO = term.lora_a_DxExr.reshape(D, E * r), b_ExrxO.reshape(E * r, -1)
    if execution.mesh is None:
        return a_DxR, b_RxO
    shapes = (1, D, E, r), (1, E, r, b_RxO.shape[1])
    names = (f".{site}.lora_a", f".{site}.lora_b")
    on_a, on_b = (spec_for(n, s, execution.mesh, RULES) for n, s in zip(names, shapes, strict=True))
    put = jax.lax.with_sharding_constraint
    return (
        put(a_DxR, NamedSharding(execution.mesh, PartitionSpec(on_a[1], None))),
        put(b_RxO, NamedSharding(execution.mesh, PartitionSpec(None, on_b[3]))),
    )


def _local(
    backend: str,
    memory: KernelMemory,
    last: bool,
    rate: float,
    x_BxTxD,
    w_DxO,
    lora_a,
    lora_b,
    dense_gates,
    counter,
):
    """One device's `[1, B, T, O]`; A, B and gates have an entry a term.

    `last` says that y goes to a residual sum alone. Then the backward pass needs x·A, but not y.
    """
    D, O = w_DxO.shape
    x_TxD = x_BxTxD.reshape(-1, D)
    gate_TxR = None
    if any(dense_BxTxE is not None for dense_BxTxE in dense_gates):
        parts = zip(lora_a, dense_gates, strict=True)
        gate_TxR = jnp.concatenate([_gate(x_TxD.shape[0], *part) for part in parts], axis=1)
    a_DxR, b_RxO = jnp.concatenate(lora_a, axis=1), jnp.concatenate(lora_b, axis=0)
    columns = kernel.LAST_RANK_COLUMNS if last else kernel.RANK_COLUMNS
    dropout = None
    if counter is not None:
        dropout = Dropout(Counter(counter.token.reshape(-1), counter.column_D), rate)
    y_TxO = kernel.lora_linear(
        x_TxD,
        w_DxO,
        a_DxR,
        gate_TxR,
        b_RxO,
        backend=backend,
        columns=columns,
        dropout=dropout,
        memory=memory,
    )
    return y_TxO.reshape(1, *x_BxTxD.shape[:2], O)


def _gate(tokens: int, a_DxR, dense_BxTxE):
    """Each expert's weight on its rank columns, float32 `[B·T, E·r]`; one without a router."""
    R = a_DxR.shape[1]
    if dense_BxTxE is None:
        return jnp.ones((tokens, R), jnp.float32)
    E = dense_BxTxE.shape[-1]
    return jnp.repeat(dense_BxTxE.reshape(-1, E), R // E, axis=1)
