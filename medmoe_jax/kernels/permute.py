"""Rows to their experts and back: sort by expert, gather, add up.

Axes: T tokens, K picks a token, M = T·K sorted rows, E experts, D width.

A *pair* is a token and one of its picks, pair `t·K + k`. Sorting is by expert, then by pair, so
nothing depends on timing. A pick of expert E means none: its pair sorts to the end, its gathered
row is zero, and what stands there adds nothing, in value and gradient: padding costs no work.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import permute_tpu
from medmoe_jax.kernels.tiles import check_backend, check_floats

MAX_EXPERTS = permute_tpu.MAX_EXPERTS  # of the counting kernel; `"xla"` takes any number


class Order(NamedTuple):
    """The pairs sorted by expert; all int32.

    Attributes:
      position_TxK: sorted row of each pair.
      source_M: pair of each sorted row; its token is `source_M // K`.
      sizes_E: rows of each expert; rows from their sum on belong to no expert.
      offsets_E: first row of each expert.
    """

    position_TxK: jax.Array
    source_M: jax.Array
    sizes_E: jax.Array
    offsets_E: jax.Array


def sort_by_expert(picks_TxK: jax.Array, n_experts: int, *, backend: str) -> Order:
    """Stable counting sort of all picks.

    Args:
      picks_TxK: int32, 0 to `n_experts`; `n_experts` stands for no expert.
      n_experts: E.
      backend: see `medmoe_jax.kernels`.

    Raises:
      UserError: no integers, or more experts or pairs than the kernel counts.

    Example, three tokens of one pick each; 2 stands for no expert:
      >>> order = sort_by_expert(jnp.array([[1], [0], [2]]), 2, backend="xla")
      >>> order.source_M.tolist(), order.sizes_E.tolist()
      ([1, 0, 2], [1, 1])
    """
    check_backend(backend)
    if picks_TxK.ndim != 2 or not jnp.issubdtype(picks_TxK.dtype, jnp.integer):
        raise UserError(f"picks_TxK is {picks_TxK.dtype} {picks_TxK.shape}; give integers (T, K)")
    picks_M = picks_TxK.reshape(-1).astype(jnp.int32)
    pair_M = jnp.arange(picks_M.size, dtype=jnp.int32)
    if backend == "xla":
        source_M = jnp.argsort(picks_M, stable=True).astype(jnp.int32)
        position_M = jnp.zeros_like(pair_M).at[source_M].set(pair_M, unique_indices=True)
        sizes_E = jnp.bincount(picks_M, length=n_experts + 1)[:n_experts].astype(jnp.int32)
    else:
        position_M, sizes_E = permute_tpu.count(picks_M, n_experts, backend)
        source_M = jnp.zeros_like(pair_M).at[position_M].set(pair_M, unique_indices=True)
    offsets_E = jnp.cumsum(sizes_E) - sizes_E
    return Order(position_M.reshape(picks_TxK.shape), source_M, sizes_E, offsets_E)


def _token_M(order: Order):
    """The token of each sorted row, -1 on rows of no expert."""
    row_M = jnp.arange(order.source_M.size, dtype=jnp.int32)
    token_M = order.source_M // order.position_TxK.shape[1]
    return jnp.where(row_M < jnp.sum(order.sizes_E), token_M, -1)


def _row_TxK(order: Order):
    """The sorted row of each pair, -1 where the pick is no expert."""
    return jnp.where(order.position_TxK < jnp.sum(order.sizes_E), order.position_TxK, -1)


def _sum_rows(rows_NxD, index_KxM, backend: str):
    """`out[m] = Σ_k rows[index[k, m]]`, in order of k, added in float32; index -1 adds nothing."""
    if backend != "xla":
        return permute_tpu.sum_rows(rows_NxD, index_KxM, backend)
    total_MxD = jnp.zeros((index_KxM.shape[1], rows_NxD.shape[1]), jnp.float32)
    for index_M in index_KxM:
        picked_MxD = rows_NxD[jnp.maximum(index_M, 0)].astype(jnp.float32)
        total_MxD += jnp.where(index_M[:, None] >= 0, picked_MxD, 0.0)
    return total_MxD.astype(rows_NxD.dtype)


# Each is the other's transpose, so either's gradient is a call of the other.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(x_TxD, order: Order, backend: str):
    return _sum_rows(x_TxD, _token_M(order)[None], backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter_add(y_MxD, order: Order, backend: str):
    return _sum_rows(y_MxD, _row_TxK(order).T, backend)


_gather.defvjp(
    lambda x_TxD, order, backend: (_gather(x_TxD, order, backend), order),
    lambda backend, order, dx_MxD: (_scatter_add(dx_MxD, order, backend), None),
)
_scatter_add.defvjp(
    lambda y_MxD, order, backend: (_scatter_add(y_MxD, order, backend), order),
    lambda backend, order, dy_TxD: (_gather(dy_TxD, order, backend), None),
)


def _check(name: str, array, rows: int, backend: str) -> None:
    check_backend(backend)
    check_floats(**{name: array})
    if array.shape[0] != rows:
        raise UserError(f"{name} has {array.shape[0]} rows, the order is of {rows}")


def gather(x_TxD: jax.Array, order: Order, *, backend: str) -> jax.Array:
    """Each token's row, once for each of its picks, sorted by expert: `x_MxD`, of x's dtype.

    Raises:
      UserError: not the order's number of tokens, or rows too wide for the kernel.

    Example:
      >>> order = sort_by_expert(jnp.array([[1], [0], [2]]), 2, backend="xla")
      >>> gather(jnp.array([[10.0], [20.0], [30.0]]), order, backend="xla").tolist()
      [[20.0], [10.0], [0.0]]
    """
    _check("x_TxD", x_TxD, order.position_TxK.shape[0], backend)
    return _gather(x_TxD, order, backend)


def scatter_add(y_MxD: jax.Array, order: Order, *, backend: str) -> jax.Array:
    """Sum of each token's sorted rows: `y_TxD`, of y's dtype, added in float32 in order of picks.

    Args:
      y_MxD: float32 or bfloat16.
      order: from `sort_by_expert`.
      backend: see `medmoe_jax.kernels`.

    Raises:
      UserError: not the order's number of rows, or rows too wide for the kernel.

    Example, one token with two picks:
      >>> order = sort_by_expert(jnp.array([[1, 0]]), 2, backend="xla")
      >>> scatter_add(jnp.array([[1.0], [5.0]]), order, backend="xla").tolist()
      [[6.0]]
    """
    _check("y_MxD", y_MxD, order.source_M.size, backend)
    return _scatter_add(y_MxD, order, backend)
