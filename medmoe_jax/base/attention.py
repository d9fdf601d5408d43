"""Causal attention within packed segments.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, G = H/K, h head dimension.
A key is visible when it belongs to the query's segment, does not come after it and lies within
the layer's window. Segment 0 is padding and sees only itself, so that its softmax stays finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.base.config import DecoderConfig

LANES = 128  # tokens: what blocks of the TPU's kernels are multiples of
OUTPUT = "attention"  # what flash kernels call their output, which `dots` keeps
_CHUNK_SCORES = 2**20  # float32 attention scores of a chunk on one device: 4 MiB


class Branches(NamedTuple):
    """Texts that begin alike, as a tree in a row: what they begin with stands there once.

    A token is followed by all that continues it, branch after branch; positions are those of the
    whole texts.

    Attributes:
      last_BxT: int32, the last slot of the row that continues the token; its own where none does.
      lengths_BxT: int32, tokens of the texts that the token belongs to (`rope.tables`).
    """

    last_BxT: jax.Array
    lengths_BxT: jax.Array


def row_slots(tokens: int, shards: int, limit: int | None) -> int:
    """The number of slots for a row of that many tokens: a multiple that every attention takes.

    Args:
      tokens: the length of the longest row.
      shards: the number of devices that share a row.
      limit: slots that a row has at most; None = as many as it takes.
    """
    block = shards * LANES
    slots = -(-tokens // block) * block
    return slots if limit is None else min(slots, limit)


def visible(
    q_segments_BxT: jax.Array,
    q_positions_BxT: jax.Array,
    k_segments_BxS: jax.Array,
    k_positions_BxS: jax.Array,
    window: jax.Array | int,
) -> jax.Array:
    """Boolean mask `[B, T, S]`; `window` is a (traced) number of tokens, 0 = unlimited."""
    distance_BxTxS = q_positions_BxT[:, :, None] - k_positions_BxS[:, None, :]
    same_BxTxS = q_segments_BxT[:, :, None] == k_segments_BxS[:, None, :]
    near_BxTxS = (window == 0) | (distance_BxTxS < window)
    return same_BxTxS & (distance_BxTxS >= 0) & near_BxTxS


def continued(last_BxT: jax.Array) -> jax.Array:
    """Boolean mask `[B, T, T]`: a token of a tree continues the key, or is it (`Branches`)."""
    slot_T = jnp.arange(last_BxT.shape[1], dtype=jnp.int32)
    after_TxT = slot_T[:, None] >= slot_T[None]
    return after_TxT[None] & (slot_T[None, :, None] <= last_BxT[:, None])


def _by_head(q_BxTxHxh, K: int):
    """`[B, K, X, h]` with X = T·G: the queries that share a key/value head, token by token."""
    B, T, H, h = q_BxTxHxh.shape
    q_BxTxKxGxh = q_BxTxHxh.reshape(B, T, K, H // K, h)
    return jnp.moveaxis(q_BxTxKxGxh, 2, 1).reshape(B, K, T * (H // K), h)


def _by_token(x_BxKxXxh, T: int):
    """The inverse of `_by_head`: `[B, T, H, h]`."""
    B, K, X, h = x_BxKxXxh.shape
    x_BxTxKxGxh = jnp.moveaxis(x_BxKxXxh.reshape(B, K, T, X // T, h), 1, 2)
    return x_BxTxKxGxh.reshape(B, T, -1, h)


def _product(x, y, over: tuple[int, int]):
    """A product a row and head over one axis of each, in float32."""
    dims = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _weights(scale: float, softcap: float, q_BxKxXxh, k_BxKxSxh, mask_BxTxS):
    """Float32 softmax `[B, K, X, S]` and d(capped score)/d(score), 1 without a soft-cap."""
    score_BxKxXxS = _product(q_BxKxXxh, k_BxKxSxh, (3, 3)) * scale
    slope_BxKxXxS = 1.0
    if softcap:
        tanh_BxKxXxS = jnp.tanh(score_BxKxXxS / softcap)
        score_BxKxXxS, slope_BxKxXxS = softcap * tanh_BxKxXxS, 1.0 - tanh_BxKxXxS**2
    B, K, X, S = score_BxKxXxS.shape
    score_BxKxTxGxS = score_BxKxXxS.reshape(B, K, mask_BxTxS.shape[1], -1, S)
    score_BxKxTxGxS = jnp.where(mask_BxTxS[:, None, :, None], score_BxKxTxGxS, -1e30)
    return jax.nn.softmax(score_BxKxTxGxS.reshape(B, K, X, S), axis=-1), slope_BxKxXxS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def einsum_attention(
    scale: float,
    softcap: float,
    q_BxTxHxh: jax.Array,
    k_BxSxKxh: jax.Array,
    v_BxSxKxh: jax.Array,
    mask_BxTxS: jax.Array,
) -> jax.Array:
    """Attention with a float32 softmax and, unless it is 0, a soft-cap on the scores.

    The backward pass makes the scores anew, and keeps them where they lie: of two factors it has
    the compiler transpose the narrow one, not the scores.
    """
    q_BxKxXxh = _by_head(q_BxTxHxh, k_BxSxKxh.shape[2])
    k_BxKxSxh, v_BxKxSxh = (jnp.moveaxis(x, 2, 1) for x in (k_BxSxKxh, v_BxSxKxh))
    weight_BxKxXxS, _ = _weights(scale, softcap, q_BxKxXxh, k_BxKxSxh, mask_BxTxS)
    out_BxKxXxh = _product(weight_BxKxXxS.astype(v_BxSxKxh.dtype), v_BxKxSxh, (3, 2))
    return _by_token(out_BxKxXxh.astype(q_BxTxHxh.dtype), q_BxTxHxh.shape[1])


def _attention_forward(scale, softcap, q, k, v, mask):
    return einsum_attention(scale, softcap, q, k, v, mask), (q, k, v, mask)


def _attention_backward(scale, softcap, residuals, d_out_BxTxHxh):
    """Gradients, with P the weights:

    dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − Σ P ∘ dO Vᵀ), dQ = dS K, dK = dSᵀ Q.
    """
    q_BxTxHxh, k_BxSxKxh, v_BxSxKxh, mask_BxTxS = residuals
    dtype, T, K = q_BxTxHxh.dtype, q_BxTxHxh.shape[1], k_BxSxKxh.shape[2]
    q_BxKxXxh, d_out_BxKxXxh = _by_head(q_BxTxHxh, K), _by_head(d_out_BxTxHxh, K)
    k_BxKxSxh, v_BxKxSxh = (jnp.moveaxis(x, 2, 1) for x in (k_BxSxKxh, v_BxSxKxh))
    weight_BxKxXxS, slope = _weights(scale, softcap, q_BxKxXxh, k_BxKxSxh, mask_BxTxS)
    dv_BxKxhxS = _product(d_out_BxKxXxh, weight_BxKxXxS.astype(dtype), (2, 2))
    d_weight_BxKxXxS = _product(d_out_BxKxXxh, v_BxKxSxh, (3, 3)) * weight_BxKxXxS
    mean_BxKxXx1 = jnp.sum(d_weight_BxKxXxS, axis=-1, keepdims=True)
    d_score_BxKxXxS = (d_weight_BxKxXxS - weight_BxKxXxS * mean_BxKxXx1) * slope * scale
    d_score_BxKxXxS = d_score_BxKxXxS.astype(dtype)
    dq_BxKxXxh = _product(d_score_BxKxXxS, k_BxKxSxh, (3, 2))
    dk_BxKxhxS = _product(q_BxKxXxh, d_score_BxKxXxS, (2, 2))
    dk_BxSxKxh, dv_BxSxKxh = (
        jnp.moveaxis(jax.lax.optimization_barrier(x), 3, 1).astype(dtype)
        for x in (dk_BxKxhxS, dv_BxKxhxS)
    )
    return _by_token(dq_BxKxXxh.astype(dtype), T), dk_BxSxKxh, dv_BxSxKxh, None


einsum_attention.defvjp(_attention_forward, _attention_backward)


def windows(config: DecoderConfig) -> list[int]:
    """The layers' different windows, 0 = unlimited."""
    return sorted(set(config.windows)) or [0]


def by_window(
    config: DecoderConfig, window: jax.Array, run: Callable[[int], jax.Array]
) -> jax.Array:
    """`run(size)` for the layer's window: layers of all kinds share one compiled loop."""
    sizes = windows(config)
    if len(sizes) == 1:
        return run(sizes[0])
    which = jnp.searchsorted(jnp.asarray(sizes), window)
    return jax.lax.switch(which, [functools.partial(run, size) for size in sizes])


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most` (at least 1)."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def attend(
    config: DecoderConfig,
    q_BxTxHxh: jax.Array,
    k_BxSxKxh: jax.Array,
    v_BxSxKxh: jax.Array,
    mask_BxTxS: jax.Array,
    shards: int = 1,
) -> jax.Array:
    """Masked attention off TPU and in cached decoding: `[B, T, H, h]` in q's dtype.

    Scores exist for a few rows at a time and are made anew in the backward pass: they then stay in
    the processor's cache, which is several times faster there than a `[B, H, T, S]` array.

    Args:
      config: scale and soft-cap.
      q_BxTxHxh, k_BxSxKxh, v_BxSxKxh: queries, keys and values.
      mask_BxTxS: True where a key is visible.
      shards: devices that the rows are spread over; every chunk has rows of each.
    """
    B, T, H, _ = q_BxTxHxh.shape
    rows = B // shards
    row_scores = H * T * mask_BxTxS.shape[-1]
    chunk = _divisor(rows, _CHUNK_SCORES // row_scores)
    one = functools.partial(einsum_attention, config.scale, config.attn_softcap)
    arrays = (q_BxTxHxh, k_BxSxKxh, v_BxSxKxh, mask_BxTxS)
    if chunk == rows:
        return one(*arrays)

    def split(x):
        """`[B, ...]` to `[chunks, shards * chunk, ...]`, each chunk spread like the whole."""
        x = x.reshape(shards, rows // chunk, chunk, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(rows // chunk, shards * chunk, *x.shape[3:])

    out = jax.lax.map(lambda chunked: one(*chunked), tuple(map(split, arrays)))
    out = out.reshape(rows // chunk, shards, chunk, *out.shape[2:])
    return jnp.moveaxis(out, 0, 1).reshape(q_BxTxHxh.shape)
