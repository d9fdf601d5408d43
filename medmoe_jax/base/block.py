"""One transformer block: attention, then the feed-forward network, each with its norms.

Axes: B batch, T tokens, S keys (of the batch, or cache slots), D model, H query heads, K key/value
heads, h head dimension, F = K·h, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.base import attention, rope
from medmoe_jax.base.cache import CacheSlots, append
from medmoe_jax.base.config import GROUPS, DecoderConfig
from medmoe_jax.base.decode_attention import decode_attention
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context, Params, Seam


class Tokens(NamedTuple):
    """What every layer's attention needs to know about the tokens.

    Attributes:
      segments_BxT, positions_BxT: int32, of the queries.
      k_segments_BxS, k_positions_BxS: int32, of the keys.
      slots: where their keys and values are written in the cache; None where there is none.
      rope: the tables of `rope.tables`.
      branches: how texts share the tokens of a row; None = each has its own.
      attend: runs attention without a cache, as `splash.splash_attention` does; None = masked.
      one_by_one: whether `decode_attention` reads the cache.
    """

    segments_BxT: jax.Array
    positions_BxT: jax.Array
    k_segments_BxS: jax.Array
    k_positions_BxS: jax.Array
    slots: CacheSlots | None
    rope: tuple[jax.Array, jax.Array]
    branches: attention.Branches | None
    attend: Callable | None
    one_by_one: bool


class Layer(NamedTuple):
    """What differs between layers.

    Attributes:
      weights: the base's.
      window: [] int32, tokens that attention reaches back, 0 = all.
      rope: [] int32, the row of the rotary tables that it takes.
      params: the seam's own parameters.
      context: for the seam.
    """

    weights: Params
    window: jax.Array
    rope: jax.Array
    params: Any
    context: Context


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """`x / rms(x) · (weight + offset)` in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32) + offset
    return (x32 * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def block(
    config: DecoderConfig,
    execution: Execution,
    seam: Seam,
    layer: Layer,
    x_BxTxD: jax.Array,
    tokens: Tokens,
    cache: tuple | None,
) -> tuple[jax.Array, tuple | None, dict[str, Any]]:
    """`(x_BxTxD, cache, statistics)` after one block.

    Args:
      config, execution: the decoder, and how it is run.
      seam: runs the linear work.
      layer: its weights, and what else differs between layers.
      x_BxTxD: the hidden states.
      tokens: what is known of them.
      cache: keys and values `[L, B, S, F]` of all layers, or None.
    """
    norm = functools.partial(rms_norm, eps=config.norm_eps, offset=config.norm_offset)
    w, params, context = layer.weights, layer.params, layer.context

    def before(x, name: str):
        return norm(x, w[name]) if config.pre_norms else x

    def after(y, name: str):
        y = norm(y, w[name]) if config.post_norms else y
        return y if config.residual_scale == 1.0 else y * config.residual_scale

    y, cache, stats = _attention(
        config, execution, seam, layer, before(x_BxTxD, "attn_norm"), tokens, cache
    )
    x_BxTxD += after(y, "attn_post_norm")
    sites = {f"mlp.{name}": leaf for name, leaf in w["mlp"].items()}
    y, stats_mlp = seam.mlp(before(x_BxTxD, "mlp_norm"), sites, params, context)
    x_BxTxD += after(y, "mlp_post_norm")
    return execution.constrain(x_BxTxD), cache, stats | stats_mlp


def _attention(config, execution, seam, layer: Layer, x_BxTxD, tokens: Tokens, cache):
    """One layer's attention: `(y_BxTxD, the cache's (k, v), statistics)`."""
    B, T, _ = x_BxTxD.shape
    h, w, context = config.head_dim, layer.weights["attn"], layer.context
    sites = {site: w[site.split(".")[1]] for site in GROUPS["attn.qkv"]}
    y, stats = seam.linear("attn.qkv", x_BxTxD, sites, layer.params, context)
    q = y["attn.q"].reshape(B, T, config.n_heads, h)
    k = y["attn.k"].reshape(B, T, config.n_kv_heads, h)
    v = y["attn.v"].reshape(B, T, config.n_kv_heads, h)
    if config.qk_norm:
        q, k = _head_norm(config, q, w["q_norm"]), _head_norm(config, k, w["k_norm"])
    tables = [jax.lax.dynamic_index_in_dim(x, layer.rope, keepdims=False) for x in tokens.rope]
    q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)
    if cache is not None and tokens.slots is not None:
        pairs = zip(cache, (k, v), strict=True)
        cache, (k, v) = zip(
            *(_cached(old, new, context.layer, tokens.slots) for old, new in pairs), strict=True
        )
    out = _attend(config, execution, tokens, layer, q, k, v, cache)
    out = out.reshape(B, T, config.n_heads * h)
    y, stats_out = seam.linear("attn.out", out, {"attn.o": w["o"]}, layer.params, context)
    return y["attn.o"], cache, stats | stats_out


def _cached(stack_LxBxSxF, new_RxTxKxh, layer, slots: CacheSlots):
    """One of keys and values in the cache: `(the cache, those of the rows [R, S, K, h])`."""
    R, T, K, h = new_RxTxKxh.shape
    stack, mine_RxSxF = append(stack_LxBxSxF, new_RxTxKxh.reshape(R, T, K * h), layer, slots)
    return stack, mine_RxSxF.reshape(R, -1, K, h)


def _attend(config, execution, tokens: Tokens, layer: Layer, q, k, v, cache):
    """What the queries find, `[B, T, H, h]`."""
    if tokens.attend:
        return tokens.attend(config, execution, q, k, v, tokens.segments_BxT, layer.window)
    mask = attention.visible(
        tokens.segments_BxT,
        tokens.positions_BxT,
        tokens.k_segments_BxS,
        tokens.k_positions_BxS,
        layer.window,
    )
    if tokens.one_by_one:
        return decode_attention(config, execution, q, *cache, layer.context.layer, mask)
    if tokens.branches is not None:
        mask &= attention.continued(tokens.branches.last_BxT)
    k, v = (execution.gather_tokens(x).astype(q.dtype) for x in (k, v))
    return attention.attend(config, q, k, v, mask, execution.row_shards)


def _head_norm(config: DecoderConfig, x_BxTxHxh, weight):
    """RMSNorm over each head, or over all of them at once, as the weight is long."""
    x = x_BxTxHxh.reshape(*x_BxTxHxh.shape[:2], -1, weight.shape[-1])
    x = rms_norm(x, weight, eps=config.norm_eps, offset=config.norm_offset)
    return x.reshape(x_BxTxHxh.shape)
