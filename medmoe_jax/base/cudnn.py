"""Attention by cuDNN's flash kernels, on NVIDIA GPUs.

Axes: B batch, T tokens, H query heads, K key/value heads, h head dimension.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from medmoe_jax.base.attention import OUTPUT, by_window
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution

_SEGMENTS = 32  # of a packed row; the kernel's room grows with them


def obstacle(config: DecoderConfig, execution: Execution, tokens: int) -> str | None:
    """What keeps cuDNN from running a decoder's attention, or None; `tokens` is T."""
    device = execution.device
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"it needs NVIDIA GPUs, these devices are {device.platform}"
    if jnp.dtype(execution.dtype).itemsize != 2:
        return f"it runs in bfloat16, not {jnp.dtype(execution.dtype).name}"
    if config.attn_softcap:
        return "it has no soft-cap on the scores"
    # Hopper is the first generation whose kernels take heads of 256.
    widest = 256 if float(device.compute_capability) >= 9.0 else 128
    if config.head_dim % 8 or config.head_dim > widest:
        return f"its heads are multiples of 8 up to {widest}, not {config.head_dim}"
    if tokens % 2:
        return f"it takes an even number of tokens, not {tokens}"
    if execution.sequence_axis(tokens):
        return "it takes whole rows, and the mesh cuts them along 'sequence'"
    return None


def cudnn_attention(
    config: DecoderConfig,
    execution: Execution,
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    segments_BxT: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Causal attention within packed segments, as `splash.splash_attention` is on TPU.

    Causality and windows leave blocks out. On a mesh, each device runs it on its own rows and,
    where they divide, on its own heads.
    """
    T, dtype = q_BxTxHxh.shape[1], q_BxTxHxh.dtype
    by_head = execution.spec(T, execution.tensor_axis(k_BxTxKxh.shape[2]), None)
    inputs = (by_head, by_head, by_head, execution.spec(T), PartitionSpec())
    run = execution.per_device(functools.partial(_attention, config), inputs, by_head)
    out = run(q_BxTxHxh, k_BxTxKxh.astype(dtype), v_BxTxKxh.astype(dtype), segments_BxT, window)
    return checkpoint_name(out, OUTPUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: DecoderConfig, q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, segments_BxT, window):
    """Runs the kernel that the batch's segments allow; see `_kernels`.

    The choice is made while it runs. The backward pass repeats the forward one: it would have to
    keep what each of the kernels keeps.
    """
    branches = [functools.partial(kernel, config) for kernel in _kernels]
    arrays = (q_BxTxHxh, k_BxTxKxh, v_BxTxKxh)
    return jax.lax.switch(_which(segments_BxT), branches, arrays, segments_BxT, window)


def _attention_forward(config, q, k, v, segments, window):
    return _attention(config, q, k, v, segments, window), (q, k, v, segments, window)


def _attention_backward(config, residuals, d_out_BxTxHxh):
    *arrays, segments_BxT, window = residuals

    def gradients(kernel, arrays, segments_BxT, window, d_out_BxTxHxh):
        _, pull = jax.vjp(lambda x: kernel(config, x, segments_BxT, window), arrays)
        return pull(d_out_BxTxHxh)[0]

    branches = [functools.partial(gradients, kernel) for kernel in _kernels]
    operands = (tuple(arrays), segments_BxT, window, d_out_BxTxHxh)
    return *jax.lax.switch(_which(segments_BxT), branches, *operands), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _begins_BxT(segments_BxT):
    """True at the first token of every segment, padding included."""
    differs_BxT = segments_BxT[:, 1:] != segments_BxT[:, :-1]
    return jnp.pad(differs_BxT, ((0, 0), (1, 0)), constant_values=True)


def _which(segments_BxT):
    """The index of the fastest kernel of `_kernels` that is right for these segments."""
    single = ~jnp.any(segments_BxT[:, 1:] > segments_BxT[:, :-1])
    few = jnp.max(jnp.sum(_begins_BxT(segments_BxT), axis=1)) <= _SEGMENTS
    return jnp.where(single, 0, jnp.where(few, 1, 2))


def _single(config: DecoderConfig, arrays, segments_BxT, window):
    """No segment begins after a row's first token: no token before it could see padding."""
    return _run(config, arrays, window)


def _packed(config: DecoderConfig, arrays, segments_BxT, window):
    """At most `_SEGMENTS` segments a row, of which cuDNN computes nothing but the diagonal."""
    T = segments_BxT.shape[1]

    def starts(begins_T):
        return jnp.nonzero(begins_T, size=_SEGMENTS + 1, fill_value=T)[0]

    start_BxM = jax.vmap(starts)(_begins_BxT(segments_BxT)).astype(jnp.int32)
    length_BxM = jnp.diff(start_BxM, axis=1)
    # cuDNN's wrapper leaves out what is negative.
    length_BxM = jnp.where(length_BxM > 0, length_BxM, -1)
    start_BxM = jnp.where(start_BxM < T, start_BxM, -1)
    return _run(config, arrays, window, lengths_BxM=length_BxM, starts_BxM=start_BxM)


def _masked(config: DecoderConfig, arrays, segments_BxT, window):
    """Any segments: a mask that the kernel reads, at twice the time."""
    same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    return _run(config, arrays, window, mask_Bx1xTxT=same_BxTxT[:, None])


_kernels = (_single, _packed, _masked)


def _run(config, arrays, window, *, mask_Bx1xTxT=None, lengths_BxM=None, starts_BxM=None):
    """The kernel for the layer's window; `arrays` are queries, keys and values."""
    # jax.nn.dot_product_attention is the public form of it, but knows no packed rows.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    packed = lengths_BxM is not None

    def one(size: int):
        return dot_product_attention(
            *arrays,
            mask=mask_Bx1xTxT,
            q_seqlen=lengths_BxM,
            kv_seqlen=lengths_BxM,
            q_offsets=starts_BxM,
            kv_offsets=starts_BxM,
            scale=config.scale,
            mask_type=MaskType.PADDING_CAUSAL if packed else MaskType.CAUSAL,
            sliding_window_length=size or None,
        )

    return by_window(config, window, one)
