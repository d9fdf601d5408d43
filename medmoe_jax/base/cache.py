"""Keys and values of tokens that were read before, for decoding token by token.

Axes: B batch, S cache slots, L layers, K key/value heads, h head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from medmoe_jax.base.config import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; slots not yet written belong to segment 0.

    `lengths` counts a row's whole text, what is still to come included (`rope.tables`).
    """

    k: jax.Array  # [L, B, S, K, h]
    v: jax.Array  # [L, B, S, K, h]
    segments: jax.Array  # [B, S] int32
    positions: jax.Array  # [B, S] int32
    length: jax.Array  # [] int32, slots written
    lengths: jax.Array  # [B] int32


def new_cache(
    config: DecoderConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    lengths_B: jax.Array | None = None,
) -> Cache:
    """An empty cache for `slots` tokens a row; `lengths_B` of `Cache`, None = they fill it."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    ids = jnp.zeros((batch, slots), jnp.int32)
    k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    lengths_B = jnp.full(batch, slots, jnp.int32) if lengths_B is None else lengths_B
    return Cache(k, v, ids, ids, jnp.int32(0), lengths_B)
