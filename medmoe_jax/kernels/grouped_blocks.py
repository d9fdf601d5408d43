"""Products of sorted rows with their group's matrix, in plain JAX: for CPU, GPU and as reference.

Axes: M rows, K contracted width, N output width, G groups, B rows of a block.

Each group is cut into blocks of rows; a loop takes one block and its group's matrix at a time, as
many turns as there are blocks. So nothing but one block exists beside the operands and the result,
and the rows computed exceed M by less than one block a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from medmoe_jax.kernels.tiles import ceil_div


def block_rows(rows: int, groups: int) -> int:
    """Rows a block: half of what a group has on average, within 16..512."""
    return min(rows, 512, max(16, rows // (2 * groups)))


def _each_block(sizes_G, rows: int, body, init):
    """Fold `body(group, start, mine_Bx1, carry)` over the blocks of rows.

    `start` is where the block is cut and `mine_Bx1` the rows it stands for: at the end of its group
    a block reaches into the next one, and at the end of the array it is moved up.
    """
    B = block_rows(rows, sizes_G.shape[0])
    end = jnp.cumsum(sizes_G)
    count = ceil_div(sizes_G, B)
    blocks_end = jnp.cumsum(count)

    def step(block, carry):
        group = jnp.searchsorted(blocks_end, block, side="right")
        before = blocks_end[group] - count[group]
        first = end[group] - sizes_G[group] + (block - before) * B
        start = jnp.minimum(first, rows - B)
        row_Bx1 = start + jnp.arange(B, dtype=jnp.int32)[:, None]
        return body(group, start, (row_Bx1 >= first) & (row_Bx1 < end[group]), carry)

    return jax.lax.fori_loop(0, blocks_end[-1], step, init)


def product(
    x_MxK: jax.Array, w_GxKxN: jax.Array, sizes_G: jax.Array, *, transposed: bool
) -> jax.Array:
    """`x[rows of g] · w[g]`, `[M, N]` in x's dtype; w is `[G, N, K]` where `transposed`."""
    M, dtype = x_MxK.shape[0], x_MxK.dtype
    w_GxKxN = w_GxKxN.astype(dtype)

    def body(group, start, mine_Bx1, y_MxN):
        B = mine_Bx1.shape[0]
        x_BxK = jax.lax.dynamic_slice_in_dim(x_MxK, start, B)
        y_BxN = jax.lax.dot_general(
            x_BxK,
            w_GxKxN[group],
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(dtype)
        there_BxN = jax.lax.dynamic_slice_in_dim(y_MxN, start, B)
        y_BxN = jnp.where(mine_Bx1, y_BxN, there_BxN)
        return jax.lax.dynamic_update_slice_in_dim(y_MxN, y_BxN, start, 0)

    y_MxN = jnp.zeros((M, w_GxKxN.shape[1 if transposed else 2]), dtype)
    return _each_block(sizes_G, M, body, y_MxN)


def weight_gradient(
    x_MxK: jax.Array, y_MxN: jax.Array, sizes_G: jax.Array, *, dtype: DTypeLike
) -> jax.Array:
    """`x[rows of g]ᵀ · y[rows of g]`, `[G, K, N]` of `dtype`; zero for an empty group."""

    def body(group, start, mine_Bx1, w_GxKxN):
        B = mine_Bx1.shape[0]
        x_BxK = jax.lax.dynamic_slice_in_dim(x_MxK, start, B)
        y_BxN = jax.lax.dynamic_slice_in_dim(y_MxN, start, B)
        share_KxN = jax.lax.dot_general(
            jnp.where(mine_Bx1, x_BxK, jnp.zeros_like(x_BxK)),
            jnp.where(mine_Bx1, y_BxN, jnp.zeros_like(y_BxN)),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return w_GxKxN.at[group].add(share_KxN)

    shape = (sizes_G.shape[0], x_MxK.shape[1], y_MxN.shape[1])
    zeros = jnp.zeros(shape, jnp.float32)
    return _each_block(sizes_G, x_MxK.shape[0], body, zeros).astype(dtype)
