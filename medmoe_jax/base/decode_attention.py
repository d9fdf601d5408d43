"""Attention of one new token a row over a cache, on TPU: keys that are seen are read once.

Axes: L layers, B rows, S cache slots, H query heads, K key/value heads, G = H/K, h head dimension,
F = K·h.

The kernel walks over the blocks of slots that hold a key which the row sees, in the layer's part of
the cache where it lies, and keeps the softmax as it goes: with scores s of a block,

    m' = max(m, max s),  l' = l·e^(m−m') + Σ e^(s−m'),  o' = o·e^(m−m') + e^(s−m')·V.

All heads share one product a block. A query stands in the columns of its own key/value head and
zeros in the others, `[H, F]`; of the result, `[H, F]` too, those columns are taken. The MXU would
otherwise be fed G rows at a time, and decoding waits for memory, not for products.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from medmoe_jax.base.attention import LANES
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution

# Bytes of a block of keys: on v5e its journey takes twice as long as a step of the grid costs.
_BLOCK_BYTES = 2**19
_VMEM_LIMIT = 48 * 2**20  # of the smallest chip's 64 MiB
_UNSEEN = -1e30


def serves(execution: Execution) -> bool:
    """Whether the kernel runs what is decoded token by token."""
    return execution.attention != "xla" and execution.backend != "xla"


def decode_attention(
    config: DecoderConfig,
    execution: Execution,
    q_Bx1xHxh: jax.Array,
    k_LxBxSxF: jax.Array,
    v_LxBxSxF: jax.Array,
    layer: jax.Array | int,
    mask_Bx1xS: jax.Array,
) -> jax.Array:
    """`[B, 1, H, h]` in q's dtype, as `attention.attend` gives it for the layer's keys and values.

    On a mesh, each device runs its own rows and, where they divide, its own heads.

    Args:
      config, execution: the decoder, and how it is run.
      q_Bx1xHxh: the queries.
      k_LxBxSxF, v_LxBxSxF: keys and values of all layers; slots that no row sees must be finite.
      layer: which.
      mask_Bx1xS: True where a key is visible.
    """
    tensor = execution.tensor_axis(config.n_kv_heads)
    rows, by_head = execution.row_axes, execution.spec(1, tensor, None)
    stack = PartitionSpec(None, rows, None, tensor)
    inputs = (by_head, stack, stack, PartitionSpec(), PartitionSpec(rows, None, None))
    interpret = execution.backend == "interpret"
    run = functools.partial(_local, config.scale, config.attn_softcap, interpret)
    layer_1 = jnp.full(1, layer, jnp.int32)
    k_LxBxSxF, v_LxBxSxF = (x.astype(q_Bx1xHxh.dtype) for x in (k_LxBxSxF, v_LxBxSxF))
    run = execution.per_device(run, inputs, by_head)
    return run(q_Bx1xHxh, k_LxBxSxF, v_LxBxSxF, layer_1, mask_Bx1xS)


def _block_slots(slots: int, width: int, itemsize: int) -> int:
    """Slots of a block: all, or a multiple of 128."""
    block = max(_BLOCK_BYTES // (width * itemsize) // LANES, 1) * LANES
    return min(block, slots)


def _local(scale: float, softcap: float, interpret: bool, q_Bx1xHxh, k_LxBxSxF, v, layer_1, mask):
    """What one device runs."""
    (B, _, H, h), (S, F) = q_Bx1xHxh.shape, k_LxBxSxF.shape[2:]
    K, dtype = F // h, q_Bx1xHxh.dtype
    own_KxK = jnp.eye(K, dtype=bool)[None, :, None, :, None]
    q_BxKxGx1xh = q_Bx1xHxh.reshape(B, K, H // K, 1, h)
    q_BxHxF = jnp.where(own_KxK, q_BxKxGx1xh, jnp.zeros((), dtype)).reshape(B, H, F)
    block = _block_slots(S, F, dtype.itemsize)
    blocks = pl.cdiv(S, block)
    mask_Bx1xS = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, 0), (0, blocks * block - S)))
    seen_BxN = jnp.any(mask_Bx1xS.reshape(B, blocks, block) > 0, axis=-1)
    # A row that sees nothing has its first block, so that its softmax stays finite.
    first_B = jnp.argmax(seen_BxN, axis=1).astype(jnp.int32)
    last_B = blocks - 1 - jnp.argmax(seen_BxN[:, ::-1], axis=1).astype(jnp.int32)
    last_B = jnp.where(jnp.any(seen_BxN, axis=1), last_B, first_B)

    def nth(b, n, first_B, last_B):
        # A block that stays the same from one step to the next is not fetched again.
        return jnp.minimum(first_B[b] + n, last_B[b])

    of_row = pl.BlockSpec((None, H, F), lambda b, n, *_: (b, 0, 0))
    of_cache = pl.BlockSpec(
        (None, None, block, F), lambda b, n, layer, *ends: (layer[0], b, nth(b, n, *ends), 0)
    )
    out_BxHxF = pl.pallas_call(
        functools.partial(_kernel, scale=scale, softcap=softcap, slots=S),
        out_shape=jax.ShapeDtypeStruct((B, H, F), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, blocks),
            in_specs=[
                pl.BlockSpec((None, 1, block), lambda b, n, _, *ends: (b, 0, nth(b, n, *ends))),
                of_row,
                of_cache,
                of_cache,
            ],
            out_specs=of_row,
            scratch_shapes=[
                pltpu.VMEM((H, 1), jnp.float32),
                pltpu.VMEM((H, 1), jnp.float32),
                pltpu.VMEM((H, F), jnp.float32),
            ],
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * S * F,
            transcendentals=B * H * S,
            bytes_accessed=2 * B * (S + H) * F * dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="decode_attention",
    )(layer_1, first_B, last_B, mask_Bx1xS, q_BxHxF, k_LxBxSxF, v)
    out_BxKxGxKxh = out_BxHxF.reshape(B, K, H // K, K, h)
    out_BxKxGxh = jnp.sum(jnp.where(own_KxK, out_BxKxGxKxh, jnp.zeros((), dtype)), axis=3)
    return out_BxKxGxh.reshape(B, 1, H, h)


def _kernel(
    layer_1, first_B, last_B, mask_ref, q_ref, k_ref, v_ref, out_ref, max_ref, sum_ref, mix_ref,
    *, scale: float, softcap: float, slots: int,
):  # fmt: skip
    del layer_1
    b, n = pl.program_id(0), pl.program_id(1)
    block = first_B[b] + n

    @pl.when(n == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, _UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mix_ref[...] = jnp.zeros_like(mix_ref)

    @pl.when(block <= last_B[b])
    def _():
        v_SxF = v_ref[...]
        if slots % v_SxF.shape[0]:
            # What lies behind the cache may be NaN, which no weight of 0 would take away.
            slot_SxF = jax.lax.broadcasted_iota(jnp.int32, v_SxF.shape, 0)
            there_SxF = slot_SxF < slots - block * v_SxF.shape[0]
            v_SxF = jnp.where(there_SxF, v_SxF, jnp.zeros_like(v_SxF))
        score_HxS = _product(q_ref[...], k_ref[...], 1) * scale
        if softcap:
            score_HxS = softcap * jnp.tanh(score_HxS / softcap)
        score_HxS = jnp.where(mask_ref[...] > 0, score_HxS, _UNSEEN)
        old_Hx1 = max_ref[...]
        max_Hx1 = jnp.maximum(old_Hx1, jnp.max(score_HxS, axis=1, keepdims=True))
        weight_HxS, left_Hx1 = jnp.exp(score_HxS - max_Hx1), jnp.exp(old_Hx1 - max_Hx1)
        max_ref[...] = max_Hx1
        sum_ref[...] = left_Hx1 * sum_ref[...] + jnp.sum(weight_HxS, axis=1, keepdims=True)
        mix_HxF = _product(weight_HxS.astype(v_SxF.dtype), v_SxF, 0)
        mix_ref[...] = left_Hx1 * mix_ref[...] + mix_HxF

    @pl.when(n == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = (mix_ref[...] / sum_ref[...]).astype(out_ref.dtype)


def _product(x, y, over: int):
    dims = (((1,), (over,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
