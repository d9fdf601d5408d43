"""The decoder: one block function, scanned by layer index over one stacked base.

Axes: B batch, T tokens, S cache slots, D model, H query heads, K key/value heads, h head
dimension, F feed-forward, V vocabulary, L layers.

The block asks two functions for its linear work, so that adapters can take part without the
decoder knowing them (the seam):

    linear(group, x_BxTxD, weights, extra, context) -> ({site: y}, aux)
    mlp(x_BxTxD, weights, extra, context, linear)   -> (y_BxTxD, aux)

`group` names sites that share an input, `weights` holds `{site: {"kernel", "bias"?}}`, `extra` is
the layer's slice of the segment's own parameters, `context` what the caller passed plus the layer
index, and `aux` any pytree of statistics, which comes back stacked over layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from medmoe_jax.base import attention, quantised, rope, trees
from medmoe_jax.base.config import GROUPS, DecoderConfig, site_shapes
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.quantised import Quantised

Params = Mapping[str, Any]


def base_linear(group, x_BxTxD, weights, extra, context):
    """The bare base's sites: `x W + b`."""
    del group, extra, context
    return {site: project(x_BxTxD, w) for site, w in weights.items()}, {}


def project(x_BxTxD, weight: Params):
    """`x W (+ b)` in the dtype of x."""
    kernel = weight["kernel"]
    if isinstance(kernel, Quantised):
        y = quantised.matmul(x_BxTxD, kernel)
    else:
        y = x_BxTxD @ kernel.astype(x_BxTxD.dtype)
    return add_bias(y, weight)


def add_bias(y_BxTxO, weight: Params):
    """`y (+ b)` in the dtype of y."""
    if "bias" not in weight:
        return y_BxTxO
    return y_BxTxO + weight["bias"].astype(y_BxTxO.dtype)[None, None]


def base_mlp(activation: Callable, x_BxTxD, weights, extra, context, linear):
    """The gated feed-forward network `W_down (act(W_gate x) ∘ W_up x)`."""
    inner = {site: weights[site] for site in GROUPS["mlp.in"]}
    y, aux_in = linear("mlp.in", x_BxTxD, inner, extra, context)
    h_BxTxF = activation(y["mlp.gate"]) * y["mlp.up"]
    outer = {"mlp.down": weights["mlp.down"]}
    y, aux_out = linear("mlp.out", h_BxTxF, outer, extra, context)
    return y["mlp.down"], aux_in | aux_out


@dataclass(frozen=True)
class Segment:
    """Layers `start..stop-1` with the functions of the seam and their stacked parameters.

    Attributes:
      extra: pytree with leading axis `stop - start`, handed to the seam layer by layer.
      linear, mlp: the seam; None means the bare base.
    """

    start: int
    stop: int
    extra: Any = None
    linear: Callable = base_linear
    mlp: Callable | None = None


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; slots not yet written belong to segment 0."""

    k: jax.Array  # [L, B, S, K, h]
    v: jax.Array  # [L, B, S, K, h]
    segments: jax.Array  # [B, S] int32
    positions: jax.Array  # [B, S] int32
    length: jax.Array  # [] int32, slots written


def new_cache(config: DecoderConfig, batch: int, slots: int, dtype) -> Cache:
    """An empty cache for `slots` tokens a row."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    ids = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), ids, ids, jnp.int32(0))


def rms_norm(x, weight, *, eps: float, offset: float):
    """`x / rms(x) · (weight + offset)` in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32) + offset
    return (x32 * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def activation(config: DecoderConfig) -> Callable:
    """The gate's nonlinearity in the feed-forward network."""
    return {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}[
        config.activation
    ]


def _attention(config, execution, w, x_BxTxD, ids, cache, step, linear):
    """One layer's attention: returns `(y_BxTxD, cache's (k, v), aux)`."""
    B, T, _ = x_BxTxD.shape
    h = config.head_dim
    sites = {site: w["attn"][site.split(".")[1]] for site in GROUPS["attn.qkv"]}
    y, aux = linear("attn.qkv", x_BxTxD, sites, step.extra, step.context)
    q = y["attn.q"].reshape(B, T, config.n_heads, h)
    k = y["attn.k"].reshape(B, T, config.n_kv_heads, h)
    v = y["attn.v"].reshape(B, T, config.n_kv_heads, h)
    if config.qk_norm:
        norm = functools.partial(rms_norm, eps=config.norm_eps, offset=config.norm_offset)
        q, k = norm(q, w["attn"]["q_norm"]), norm(k, w["attn"]["k_norm"])
    q, k = rope.rotate(q, *ids.rope), rope.rotate(k, *ids.rope)
    if cache is not None:
        at = (step.layer, 0, ids.length, 0, 0)
        cache = tuple(
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
            for old, new in zip(cache, (k, v), strict=True)
        )
        k, v = (jax.lax.dynamic_index_in_dim(c, step.layer, keepdims=False) for c in cache)
    if ids.splash:
        out = attention.splash_attention(config, execution, q, k, v, ids.segments, step.window)
    else:
        k, v = execution.gather_tokens(k), execution.gather_tokens(v)
        mask = attention.visible(
            ids.segments, ids.positions, ids.k_segments, ids.k_positions, step.window
        )
        out = attention.attend(
            config, q, k.astype(q.dtype), v.astype(q.dtype), mask, execution.row_shards
        )
    out = out.reshape(B, T, config.n_heads * h)
    y, aux_out = linear("attn.out", out, {"attn.o": w["attn"]["o"]}, step.extra, step.context)
    return y["attn.o"], cache, aux | aux_out


class _Ids(NamedTuple):
    """What every layer's attention needs to know about the tokens."""

    segments: jax.Array
    positions: jax.Array
    k_segments: jax.Array
    k_positions: jax.Array
    length: jax.Array
    rope: tuple[jax.Array, jax.Array]
    splash: bool


class _Step(NamedTuple):
    """What differs between layers beside the base's weights."""

    layer: jax.Array
    window: jax.Array
    extra: Any
    context: Mapping[str, Any]


def _block(config, execution, segment: Segment, w, x_BxTxD, ids: _Ids, cache, step: _Step):
    """One transformer block: `(x, cache) -> (x, cache, aux)`."""
    norm = functools.partial(rms_norm, eps=config.norm_eps, offset=config.norm_offset)
    mlp = segment.mlp or functools.partial(base_mlp, activation(config))
    y, cache, aux = _attention(
        config, execution, w, norm(x_BxTxD, w["attn_norm"]), ids, cache, step, segment.linear
    )
    x_BxTxD += norm(y, w["attn_post_norm"]) if config.post_norms else y
    sites = {f"mlp.{name}": leaf for name, leaf in w["mlp"].items()}
    y, aux_mlp = mlp(norm(x_BxTxD, w["mlp_norm"]), sites, step.extra, step.context, segment.linear)
    x_BxTxD += norm(y, w["mlp_post_norm"]) if config.post_norms else y
    return execution.constrain(x_BxTxD), cache, aux | aux_mlp


# What turns a stack into a layer's weights. Keeping the output of any of these for the backward
# pass would copy the base; recomputing them costs nothing.
_CHEAP = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type"})


def _all_but_weights(primitive, *_, **__) -> bool:
    return primitive.name not in _CHEAP


def _checkpointed(body: Callable, remat: str) -> Callable:
    """Rematerialise; in no policy are the sliced weights kept, which would copy the base."""
    policies = jax.checkpoint_policies
    known = {
        "none": _all_but_weights,
        # Kernels name what they make.
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names("product", "rank_columns", "last_rank_columns"),
        ),
        # Few columns: without them a layer's last product would be made again for their sake.
        "full": policies.save_only_these_names("last_rank_columns"),
    }
    return jax.checkpoint(body, policy=known[remat], prevent_cse=False)


def _run_segment(config, execution, segment, layers, trained, x_BxTxD, ids, cache, context):
    """Scan the block over one segment's layer indices."""
    span = slice(segment.start, segment.stop)
    windows = jnp.asarray((config.windows or (0,) * config.n_layers)[span], jnp.int32)
    indices = jnp.arange(segment.start, segment.stop, dtype=jnp.int32)
    trained = jax.tree.map(lambda leaf: leaf[span], trained)

    def body(carry, xs):
        x_BxTxD, cache = carry
        layer, window, extra, trained_i = xs
        # Indexing the whole stack reads a layer in place; slicing a stack per segment copies it.
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        w = jax.tree.map(take, layers)
        step = _Step(layer, window, extra, {**context, "layer": layer})
        w = trees.overlay(w, trained_i)
        x_BxTxD, cache, aux = _block(config, execution, segment, w, x_BxTxD, ids, cache, step)
        return (x_BxTxD, cache), aux

    if cache is None:
        body = _checkpointed(body, execution.remat)
    xs = (indices, windows, segment.extra, trained)
    (x_BxTxD, cache), aux = jax.lax.scan(body, (x_BxTxD, cache), xs, unroll=execution.unroll)
    return x_BxTxD, cache, aux


def hidden(
    config: DecoderConfig,
    params: Params,
    tokens_BxT,
    segment_ids_BxT,
    positions_BxT,
    *,
    execution: Execution = Execution(),
    segments: tuple[Segment, ...] = (),
    trained: Params | None = None,
    context: Mapping[str, Any] | None = None,
    cache: Cache | None = None,
):
    """Final hidden states, after the last norm.

    Args:
      config: shapes of the decoder.
      params: the base (see `init`), in any float dtype, its kernels floats or `quantised`.
      tokens_BxT, segment_ids_BxT, positions_BxT: int32; segment 0 is padding, positions start
        again at 0 in every segment.
      execution: dtype, rematerialisation, attention.
      segments: layer ranges with their seam; empty = the bare base.
      trained: nested dict of base leaves that take the place of those in `params`.
      context: passed through to the seam.
      cache: earlier keys and values; the tokens given are appended at `cache.length`.

    Returns:
      `(x_BxTxD, cache, aux)`, `aux` a tuple with one pytree a segment, leaves `[layers, ...]`.
    """
    trained = trained or {}
    segments = segments or (Segment(0, config.n_layers),)
    top = trees.overlay(
        {k: v for k, v in params.items() if k != "layers"},
        {k: v for k, v in trained.items() if k != "layers"},
    )
    x_BxTxD = top["embed"][tokens_BxT].astype(execution.dtype)
    if config.embed_scale != 1.0:
        x_BxTxD *= jnp.asarray(config.embed_scale, execution.dtype)
    x_BxTxD = execution.constrain(x_BxTxD)
    k_segments, k_positions, length = segment_ids_BxT, positions_BxT, jnp.int32(0)
    kv = None
    if cache is not None:
        length, kv = cache.length, (cache.k, cache.v)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=1)
        k_segments = write(cache.segments, segment_ids_BxT)
        k_positions = write(cache.positions, positions_BxT)
    ids = _Ids(
        segment_ids_BxT,
        positions_BxT,
        k_segments,
        k_positions,
        length,
        rope.tables(config, positions_BxT),
        execution.splash and cache is None,
    )
    context = {**(context or {}), "segment_ids": segment_ids_BxT}
    auxes = []
    for segment in segments:
        x_BxTxD, kv, aux = _run_segment(
            config,
            execution,
            segment,
            params["layers"],
            trained.get("layers", {}),
            x_BxTxD,
            ids,
            kv,
            context,
        )
        auxes.append(aux)
    x_BxTxD = rms_norm(x_BxTxD, top["final_norm"], eps=config.norm_eps, offset=config.norm_offset)
    if cache is not None:
        cache = Cache(*kv, k_segments, k_positions, length + tokens_BxT.shape[1])
    return x_BxTxD, cache, tuple(auxes)


def head(params: Params, trained: Params | None = None):
    """The `[V, D]` output matrix: `head`, or the embedding when tied."""
    leaves = trees.overlay(params, trained or {})
    return leaves.get("head", leaves.get("embed"))


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of every leaf of the base."""
    L, D, V, h = config.n_layers, config.d_model, config.vocab_size, config.head_dim
    out: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    if not config.tied:
        out["head"] = (V, D)
    out["final_norm"] = (D,)
    for site, (d_in, d_out) in site_shapes(config).items():
        out[f"layers.{site}.kernel"] = (L, d_in, d_out)
        if config.qkv_bias and site in GROUPS["attn.qkv"]:
            out[f"layers.{site}.bias"] = (L, d_out)
    if config.qk_norm:
        out["layers.attn.q_norm"] = out["layers.attn.k_norm"] = (L, h)
    norms = ["attn_norm", "mlp_norm"]
    norms += ["attn_post_norm", "mlp_post_norm"] if config.post_norms else []
    for name in norms:
        out[f"layers.{name}"] = (L, D)
    return out


def abstract(config: DecoderConfig, dtype=jnp.float32):
    """The base as `ShapeDtypeStruct`s."""
    return trees.unflatten(
        (path, jax.ShapeDtypeStruct(shape, dtype)) for path, shape in shapes(config).items()
    )


def init(config: DecoderConfig, key: jax.Array, dtype=jnp.float32) -> dict[str, Any]:
    """A random base: matrices N(0, 1/D_in) (output projections / sqrt(2L)), norms 1, biases 0."""
    leaves = []
    for i, (path, shape) in enumerate(shapes(config).items()):
        if path.endswith("norm"):
            leaf = jnp.full(shape, 1.0 - config.norm_offset, dtype)
        elif path.endswith("bias"):
            leaf = jnp.zeros(shape, dtype)
        else:
            fan_in = shape[1]  # of [V, D] and of [L, D_in, D_out] alike
            narrow = path.endswith(("o.kernel", "down.kernel"))
            scale = (fan_in * (2 * config.n_layers if narrow else 1)) ** -0.5
            noise = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            leaf = (scale * noise).astype(dtype)
        leaves.append((path, leaf))
    return trees.unflatten(leaves)


class Decoder(nnx.Module):
    """The decoder as an NNX module, for use in other Flax projects.

    `Decoder(config, params)(tokens_BxT)` returns float32 logits `[B, T, V]`. The parameters are
    the plain tree of `init` or of an importer, held as `nnx.Param`s and never copied.
    """

    def __init__(self, config: DecoderConfig, params: Params, execution: Execution = Execution()):
        self.config = config
        self.execution = execution
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, tokens_BxT, segment_ids_BxT=None, positions_BxT=None):
        """Logits; without ids, every row is one unpadded sample."""
        from medmoe_jax.base.loss import logits

        if segment_ids_BxT is None:
            segment_ids_BxT = jnp.ones_like(tokens_BxT)
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(
                jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None], tokens_BxT.shape
            )
        params = nnx.as_pure(self.params)
        x_BxTxD, _, _ = hidden(
            self.config,
            params,
            tokens_BxT,
            segment_ids_BxT,
            positions_BxT,
            execution=self.execution,
        )
        return logits(self.config, head(params), x_BxTxD)
