"""Attention by the splash kernels of JAX, on TPUs.

Axes: B batch, T queries, S keys, H query heads, K key/value heads, h head dimension.

Three kernels run: forward, and backward for keys and values and for queries. Each keeps one block
in VMEM, of queries (of keys and values in the second), while blocks of the other kind pass by; what
a mask hides is passed over. What passes is fetched again for every block that is kept, so HBM
traffic falls as kept blocks grow; what is computed in vain along the mask's edges grows.

The kernel of keys and values has computed all that the gradient of queries needs. Where a row has
few blocks of keys, it makes that gradient too, a part of it for each of them, and two of seven
products are saved; for many blocks the parts would take too much memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base.attention import LANES, OUTPUT, by_window, windows
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError

_PASSING = 512  # a product of 512 tokens keeps the MXU busy; scores are [kept, passing]
_KEPT = 1024
_PARTS = 4
_VMEM = 14 * 2**20  # bytes, of the 16 MiB that the compiler gives a kernel on the smallest chip


class Blocks(NamedTuple):
    """Tokens of the block that a kernel keeps, and of those that pass by.

    Attributes:
      kept, passing: of the kernels that make one thing each.
      keys: that the kernel of all three gradients keeps; 0 = queries have a kernel of their own.
    """

    kept: int
    passing: int
    keys: int


def block_sizes(tokens: int, shards: int, window: int, head_dim: int, itemsize: int) -> Blocks:
    """The blocks for a row: as long as VMEM allows, but for what the mask's edges would waste.

    Args:
      tokens: of the row; a multiple of 128 times `shards`, or no kernel takes it.
      shards: devices that share its queries.
      window: keys that a query sees at most; 0 = all before it.
      head_dim: h.
      itemsize: bytes of a number.
    """
    here = max(tokens // shards // LANES, 1)

    def dividing(most: int):
        """Blocks that divide the device's part of the row, the longest first."""
        return (LANES * d for d in range(most // LANES, 0, -1) if here % d == 0)

    passing = next(dividing(_PASSING))
    # With an eighth of what a query sees, an eighth of the scores is computed in vain; the MXU
    # wants 512 tokens all the same.
    seen = min(window or tokens, tokens)
    most = max(min(seen // 8, _KEPT), _PASSING)
    fitting = (b for b in dividing(most) if _vmem(b, passing, head_dim, itemsize) <= _VMEM)
    kept = next(fitting, LANES)
    parts = (n for n in range(_PARTS, 0, -1) if tokens % (n * passing) == 0)
    whole = (tokens // n for n in parts if tokens // n <= _KEPT)
    keys = next((k for k in whole if _vmem_whole(k, passing, head_dim, itemsize) <= _VMEM), 0)
    return Blocks(kept, passing, keys)


def _vmem(kept: int, passing: int, head_dim: int, itemsize: int) -> int:
    """About the bytes of a kernel: of the queries' gradient, which the others resemble.

    Two copies of blocks of queries, their gradient and the output's, of their ids and order (int32,
    128 lanes), and of keys and values; the sum; and four arrays of scores.
    """
    queries = kept * (3 * head_dim * itemsize + 2 * LANES * 4)
    keys = 2 * passing * head_dim * itemsize
    return 2 * (queries + keys) + 4 * kept * head_dim + 4 * 4 * kept * passing


def _vmem_whole(keys: int, passing: int, head_dim: int, itemsize: int) -> int:
    """The same of the kernel of all gradients.

    Two copies of blocks of keys, values and their gradients, of their ids, and of queries, their
    gradient and the output's; three sums; and five arrays of scores, of the keys that are computed
    with at a time, as many as pass by.
    """
    of_keys = keys * (4 * head_dim * itemsize + LANES * 4)
    of_queries = 3 * passing * head_dim * itemsize
    sums = 4 * head_dim * (2 * keys + passing)
    return 2 * (of_keys + of_queries) + sums + 5 * 4 * passing * passing


def splash_attention(
    config: DecoderConfig,
    execution: Execution,
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    segments_BxT: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Causal attention within packed segments: `[B, T, H, h]`.

    Within a packed row, segments are contiguous, so order in the row is order in the segment.
    On a mesh, each device runs it on its own rows, on its own queries where the axis `sequence`
    cuts them (keys and values of the whole row are gathered), and, where they divide, on its own
    heads of the axis `tensor`.

    Raises:
      ParameterError: a device's part of a row is not a multiple of 128 tokens.
    """
    _, T, H, h = q_BxTxHxh.shape
    sequence, tensor = execution.sequence_axis(T), execution.tensor_axis(k_BxTxKxh.shape[2])
    heads, shards = H // execution.size(tensor), execution.size(sequence)
    itemsize = q_BxTxHxh.dtype.itemsize
    kernels = {
        size: _kernel(heads, T, size, config.attn_softcap, shards, h, itemsize)
        for size in windows(config)
    }
    run = functools.partial(_local, config, sequence)
    if execution.mesh is not None:
        tokens, by_head = execution.spec(T), execution.spec(T, tensor, None)
        masks = NamedSharding(execution.mesh, PartitionSpec(None, sequence))
        here = {size: kernel.manual_sharding_spec(masks) for size, kernel in kernels.items()}
        inputs = (here, by_head, by_head, by_head, tokens, PartitionSpec())
        run = execution.per_device(run, inputs, by_head)
    return run(kernels, q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, segments_BxT, window)


def check_row(tokens: int, shards: int) -> None:
    """Raise ParameterError for rows that the kernels do not take; see `block_sizes`."""
    if tokens % (shards * LANES):
        cut = f" over {shards} devices" if shards > 1 else ""
        raise ParameterError(
            f"attention: splash takes a multiple of {LANES} tokens of a row on each device, which "
            f"{tokens}{cut} is not; change the rows' length, or take 'xla', which runs any"
        )


def _kernel(
    heads: int, tokens: int, window: int, softcap: float, shards: int, head_dim: int, itemsize: int
):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    check_row(tokens, shards)
    kept, passing, keys = block_sizes(tokens, shards, window, head_dim, itemsize)
    shape = (tokens, tokens)
    one = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    return splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(
            block_q=kept,
            block_kv=passing,
            block_q_dkv=passing,
            block_kv_dkv=keys or kept,
            block_kv_dkv_compute=passing if keys else kept,
            block_q_dq=None if keys else kept,
            block_kv_dq=None if keys else passing,
            use_fused_bwd_kernel=bool(keys),
        ),
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=OUTPUT,
    )


def _local(
    config: DecoderConfig,
    sequence: str | None,
    kernels,
    q_BxTxHxh,
    k_BxTxKxh,
    v_BxTxKxh,
    segments_BxT,
    window,
):
    """What one device runs; a group of query heads shares its key/value head in the kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    def whole(x):
        return jax.lax.all_gather(x, sequence, axis=1, tiled=True) if sequence else x

    k_BxSxKxh, v_BxSxKxh, segments_BxS = map(whole, (k_BxTxKxh, v_BxTxKxh, segments_BxT))
    scaled_BxTxHxh = q_BxTxHxh * jnp.asarray(config.scale, q_BxTxHxh.dtype)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (scaled_BxTxHxh, k_BxSxKxh, v_BxSxKxh))
    q_BxHxTxh, k_BxKxSxh, v_BxKxSxh = by_head
    ids = splash.SegmentIds(segments_BxT, segments_BxS)

    def run(size: int):
        return jax.vmap(kernels[size])(q_BxHxTxh, k_BxKxSxh, v_BxKxSxh, segment_ids=ids)

    return jnp.swapaxes(by_window(config, window, run), 1, 2)
