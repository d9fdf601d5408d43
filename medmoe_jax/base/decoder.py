"""The decoder: embeddings, blocks scanned by layer index over one stacked base, the last norm.

Axes: B batch, T tokens, D model, V vocabulary, L layers.

A layer's linear work is done by the `Seam` of its `LayerRange` (`base.seam`), so that adapters can
take part without the decoder knowing them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.base import attention, cudnn, decode_attention, rope, splash, trees
from medmoe_jax.base.apart import Apart, layer
from medmoe_jax.base.block import Layer, Tokens, block, rms_norm
from medmoe_jax.base.cache import Cache, CacheSlots, moved, note
from medmoe_jax.base.config import GROUPS, DecoderConfig, site_shapes
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import BareSeam, Context, LayerRange, Params, activation
from medmoe_jax.errors import ParameterError

# What turns a stack into a layer's weights. Keeping the output of any of these for the backward
# pass would copy the base; recomputing them costs nothing.
_CHEAP = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type"})


def _all_but_weights(primitive, *_, **__) -> bool:
    return primitive.name not in _CHEAP


def _checkpointed(body: Callable, remat: str, kept: tuple[str, ...]) -> Callable:
    """Rematerialise; in no policy are the sliced weights kept, which would copy the base.

    `kept` are names of values that `dots` and `full` keep for the backward pass.
    """
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*kept)
    outputs = policies.save_only_these_names(*kept, attention.OUTPUT)
    dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, outputs)
    policy = {"none": _all_but_weights, "dots": dots, "full": named}[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _run_range(
    config: DecoderConfig,
    execution: Execution,
    here: LayerRange,
    layers: Params,
    trained: Params,
    x_BxTxD,
    tokens: Tokens,
    cache,
    context: Context,
):
    """Scan the block over the layer indices of one range: `(x_BxTxD, cache, statistics)`.

    Layers that lie apart are run one after the other instead.
    """
    span = slice(here.start, here.stop)
    windows = np.array((config.windows or (0,) * config.n_layers)[span], np.int32)
    ropes = rope.which(config)[span]
    indices = np.arange(here.start, here.stop, dtype=np.int32)
    trained = jax.tree.map(lambda leaf: leaf[span], trained)
    seam = here.seam or BareSeam(activation(config))
    apart = isinstance(layers, Apart)

    def body(carry, xs):
        x_BxTxD, cache = carry
        index, window, table, params, trained_i = xs
        # Indexing the whole stack reads a layer in place; slicing a stack per range copies it.
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        own = layers[index] if apart else jax.tree.map(take, layers)
        weights = trees.overlay(own, trained_i)
        this = Layer(weights, window, table, params, context._replace(layer=index))
        x_BxTxD, cache, stats = block(config, execution, seam, this, x_BxTxD, tokens, cache)
        return (x_BxTxD, cache), stats

    xs = (indices, windows, ropes, here.params, trained)
    if apart:
        every = []
        for i in range(len(indices)):
            (x_BxTxD, cache), stats = body((x_BxTxD, cache), layer(xs, i))
            every.append(stats)
        return x_BxTxD, cache, jax.tree.map(lambda *stats: jnp.stack(stats), *every)
    kept = here.kept.get(execution.remat, ())
    run = _checkpointed(body, execution.remat, kept) if cache is None else body
    (x_BxTxD, cache), stats = jax.lax.scan(run, (x_BxTxD, cache), xs, unroll=execution.unroll)
    return x_BxTxD, cache, stats


def hidden(
    config: DecoderConfig,
    params: Params,
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array,
    positions_BxT: jax.Array,
    *,
    execution: Execution = Execution(),
    ranges: tuple[LayerRange, ...] = (),
    trained: Params | None = None,
    context: Context = Context(),
    cache: Cache | None = None,
    branches: attention.Branches | None = None,
) -> tuple[jax.Array, Cache | None, tuple[dict[str, Any], ...]]:
    """Final hidden states, after the last norm.

    Args:
      config: shapes of the decoder.
      params: the base (see `init`), in any float dtype, its kernels floats or `quantised`; where
        nothing is differentiated, its layers may lie `Apart`.
      tokens_BxT, segment_ids_BxT, positions_BxT: int32; segment 0 is padding, positions start
        again at 0 in every segment.
      execution: dtype, rematerialisation, attention.
      ranges: the layers in order, with what runs their linear work; empty = the bare base.
      trained: nested dict of base leaves that take the place of those in `params`.
      context: what the seam is told of the tokens.
      cache: earlier keys and values; the tokens given are written at `cache.slots`.
      branches: how texts share the tokens of a row, where there is no cache; None = each segment
        is a text.

    Returns:
      `(x_BxTxD, cache, statistics)`: of each range those of its seam, leaves `[layers, ...]`.
    """
    trained = trained or {}
    top = trees.overlay(
        {k: v for k, v in params.items() if k != "layers"},
        {k: v for k, v in trained.items() if k != "layers"},
    )
    x_BxTxD = top["embed"][tokens_BxT].astype(execution.dtype)
    if config.embed_scale != 1.0:
        x_BxTxD *= jnp.asarray(config.embed_scale, execution.dtype)
    x_BxTxD = execution.constrain(x_BxTxD)
    k_segments, k_positions, slots = segment_ids_BxT, positions_BxT, None
    kv, flash, one_by_one = None, None, False
    if branches is not None:
        # Flash kernels know segments, not trees: the mask is the only form that all devices have.
        lengths_BxT = branches.lengths_BxT
    elif cache is None:
        lengths_BxT = rope.text_lengths(segment_ids_BxT, positions_BxT)
        flash = flash_attention(config, execution, tokens_BxT.shape[1])
    else:
        lengths_BxT = jnp.broadcast_to(cache.lengths_R[:, None], positions_BxT.shape)
        slots, kv = cache.slots, (cache.k, cache.v)
        one_by_one = _one_by_one(execution, slots, tokens_BxT.shape[1])
        cache, k_segments, k_positions = note(cache, segment_ids_BxT, positions_BxT)
    tokens = Tokens(
        segment_ids_BxT,
        positions_BxT,
        k_segments,
        k_positions,
        slots,
        rope.tables(config, positions_BxT, lengths_BxT),
        branches,
        flash,
        one_by_one,
    )
    context = context._replace(segment_ids_BxT=segment_ids_BxT)
    layers, trained_layers = params["layers"], trained.get("layers", {})
    every = []
    for here in ranges or (LayerRange(0, config.n_layers),):
        x_BxTxD, kv, stats = _run_range(
            config, execution, here, layers, trained_layers, x_BxTxD, tokens, kv, context
        )
        every.append(stats)
    x_BxTxD = rms_norm(x_BxTxD, top["final_norm"], eps=config.norm_eps, offset=config.norm_offset)
    if config.output_scale != 1.0:
        x_BxTxD *= jnp.asarray(config.output_scale, execution.dtype)
    if cache is not None and kv is not None:
        cache = moved(cache._replace(k=kv[0], v=kv[1]), tokens_BxT.shape[1])
    return x_BxTxD, cache, tuple(every)


def flash_attention(config: DecoderConfig, execution: Execution, tokens: int) -> Callable | None:
    """The flash attention that runs rows of that many tokens, or None.

    Raises:
      ParameterError: the one that is asked for cannot run them.
    """
    chosen, platform = execution.attention, execution.platform
    if chosen == "splash" and platform != "tpu":
        raise ParameterError(
            f"attention: 'splash' needs TPUs, these devices are {platform}; use 'auto'"
        )
    if chosen == "splash" or (chosen == "auto" and platform == "tpu"):
        splash.check_row(tokens, execution.size(execution.sequence_axis(tokens)))
        return splash.splash_attention
    if chosen in ("auto", "cudnn"):
        against = cudnn.obstacle(config, execution, tokens)
        if against is None:
            return cudnn.cudnn_attention
        if chosen == "cudnn":
            raise ParameterError(f"attention: 'cudnn' cannot run this: {against}; use 'auto'")
    return None


def _one_by_one(execution: Execution, slots: CacheSlots, tokens: int) -> bool:
    """Whether every row of the cache reads one token, and the kernel for that is to run."""
    return tokens == 1 and slots.rows_R is None and decode_attention.serves(execution)


def head(params: Params, trained: Params | None = None) -> jax.Array:
    """The `[V, D]` output matrix: `head`, or the embedding when tied."""
    leaves = trees.overlay(params, trained or {})
    return leaves.get("head", leaves.get("embed"))


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of every leaf of the base."""
    L, D, V = config.n_layers, config.d_model, config.vocab_size
    biased = {site for group in GROUPS for site in GROUPS[group] if _biased(config, group)}
    out: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    if not config.tied:
        out["head"] = (V, D)
    out["final_norm"] = (D,)
    for site, (d_in, d_out) in site_shapes(config).items():
        out[f"layers.{site}.kernel"] = (L, d_in, d_out)
        if site in biased:
            out[f"layers.{site}.bias"] = (L, d_out)
    for site in ("attn.q", "attn.k") if config.qk_norm else ():
        width = site_shapes(config)[site][1] if config.qk_norm_whole else config.head_dim
        out[f"layers.{site}_norm"] = (L, width)
    norms = ["attn_norm", "mlp_norm"] if config.pre_norms else []
    norms += ["attn_post_norm", "mlp_post_norm"] if config.post_norms else []
    for name in norms:
        out[f"layers.{name}"] = (L, D)
    return out


def _biased(config: DecoderConfig, group: str) -> bool:
    wanted = {"attn.qkv": config.qkv_bias, "attn.out": config.o_bias}
    return wanted.get(group, config.mlp_bias)


def abstract(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The base as `ShapeDtypeStruct`s."""
    return trees.unflatten(
        (path, jax.ShapeDtypeStruct(shape, dtype)) for path, shape in shapes(config).items()
    )


def init(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
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
