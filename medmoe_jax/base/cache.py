"""Keys and values of tokens that were read before, for decoding token by token.

Axes: B rows of the cache, R rows given, S cache slots, T tokens, L layers, F = K·h width of all
key/value heads K of dimension h: side by side, whole tiles of a TPU are full whatever K is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from medmoe_jax.base.config import DecoderConfig


class CacheSlots(NamedTuple):
    """Where the tokens given are written.

    Attributes:
      written_R: int32, slots of each row that were written before; its tokens go to those after
        them, for which there must be room.
      rows_R: int32, the row of the cache that each row given is, those beyond the last are not
        kept; None = all rows, in order.
      sources_R: int32, beside `rows_R`: the row of the cache whose first `written_R` slots come
        before the tokens, and are copied.
    """

    written_R: jax.Array
    rows_R: jax.Array | None = None
    sources_R: jax.Array | None = None


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; slots not yet written are seen by no token.

    `lengths_R` counts a row's whole text, what is still to come included (`rope.tables`).
    """

    k: jax.Array  # [L, B, S, F]
    v: jax.Array  # [L, B, S, F]
    segments: jax.Array  # [B, S] int32
    positions: jax.Array  # [B, S] int32
    slots: CacheSlots
    lengths_R: jax.Array  # [R] int32


def new_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    lengths_B: jax.Array | None = None,
) -> Cache:
    """An empty cache for `slots` tokens a row; `lengths_B` of `Cache`, None = they fill it."""
    shape = (config.n_layers, batch, slots, config.kv_width)
    ids = jnp.zeros((batch, slots), jnp.int32)
    k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    lengths_B = jnp.full(batch, slots, jnp.int32) if lengths_B is None else lengths_B
    return Cache(k, v, ids, ids, CacheSlots(jnp.zeros(batch, jnp.int32)), lengths_B)


def append(
    stack_LxBxS: jax.Array, new_RxT: jax.Array, layer: jax.Array | int, slots: CacheSlots
) -> tuple[jax.Array, jax.Array]:
    """Write tokens into one layer of a cache: `(the cache, the rows' own slots [R, S, ...])`.

    Args:
      stack_LxBxS: `[L, B, S, ...]`.
      new_RxT: `[R, T, ...]`.
      layer: which.
      slots: where.
    """
    new_RxT = new_RxT.astype(stack_LxBxS.dtype)
    if slots.rows_R is None:
        stack_LxBxS = _written(stack_LxBxS, new_RxT, layer, slots.written_R)
        return stack_LxBxS, jax.lax.dynamic_index_in_dim(stack_LxBxS, layer, keepdims=False)
    mine_1xRxS = stack_LxBxS[layer, slots.sources_R][None]
    mine_RxS = _written(mine_1xRxS, new_RxT, 0, slots.written_R)[0]
    return stack_LxBxS.at[layer, slots.rows_R].set(mine_RxS, mode="drop"), mine_RxS


def _written(
    stack_LxRxS: jax.Array, new_RxT: jax.Array, layer: jax.Array | int, slots_R: jax.Array
) -> jax.Array:
    """The stack with every row's tokens in one layer, from the row's own slot on.

    One scatter, whose batch dimension is the stack's second: `vmap` would make it the first, and
    the whole stack be copied into that order and back for every layer.
    """
    layer_R = jnp.full_like(slots_R, layer)
    window = tuple(range(1, new_RxT.ndim))  # T and what a token has
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=window,
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        stack_LxRxS,
        jnp.stack([layer_R, slots_R], axis=1),
        new_RxT,
        numbers,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )


def note(
    cache: Cache, segments_RxT: jax.Array, positions_RxT: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Write what is known of tokens: `(cache, segments [R, S], positions [R, S] of the slots)`.

    The cache's slots are still those of the tokens given; `moved` is for those after them.
    """
    segments, k_segments_RxS = append(cache.segments[None], segments_RxT, 0, cache.slots)
    positions, k_positions_RxS = append(cache.positions[None], positions_RxT, 0, cache.slots)
    end_Rx1 = cache.slots.written_R[:, None] + segments_RxT.shape[1]
    written_RxS = jnp.arange(cache.segments.shape[1])[None] < end_Rx1
    cache = cache._replace(segments=segments[0], positions=positions[0])
    return cache, jnp.where(written_RxS, k_segments_RxS, 0), k_positions_RxS


def moved(cache: Cache, tokens: int) -> Cache:
    """The cache after so many tokens of each row were written."""
    slots = cache.slots._replace(written_R=cache.slots.written_R + tokens)
    return cache._replace(slots=slots)
