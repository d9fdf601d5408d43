"""Logits and cross-entropy, a chunk of tokens at a time.

Axes: B batch, T tokens, C tokens of a chunk, N chunks, D model, V vocabulary.
Float32 logits exist for one chunk only, `[B, C, V]`. Every chunk reads the whole head, so a chunk
is as large as a device's share of it allows: `shards` is the number of devices that share B.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from medmoe_jax.base.config import DecoderConfig

_CHUNK_ELEMENTS = 2**25  # float32 logits of a chunk on one device: 128 MiB


def logits(config: DecoderConfig, head_VxD, x_BxTxD):
    """Float32 logits `[B, T, V]`, soft-capped; padding rows of the vocabulary get -1e30."""
    z_BxTxV = jnp.einsum(
        "BTD,VD->BTV",
        x_BxTxD,
        head_VxD.astype(x_BxTxD.dtype),
        preferred_element_type=jnp.float32,
    )
    if config.final_softcap:
        z_BxTxV = config.final_softcap * jnp.tanh(z_BxTxV / config.final_softcap)
    if config.vocab_used and config.vocab_used < config.vocab_size:
        used_V = jnp.arange(config.vocab_size) < config.vocab_used
        z_BxTxV = jnp.where(used_V[None, None], z_BxTxV, -1e30)
    return z_BxTxV


def _log_probs(config, head_VxD, x_BxCxD, targets_BxC):
    z_BxCxV = logits(config, head_VxD, x_BxCxD)
    picked_BxC = jnp.take_along_axis(z_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
    return picked_BxC - jax.nn.logsumexp(z_BxCxV, axis=-1)


def _chunks(config: DecoderConfig, shards: int, shape, *arrays):
    """Split `[B, T, ...]` arrays into `[N, B, C, ...]`, C the largest divisor of T that fits."""
    B, T = shape
    limit = max(1, _CHUNK_ELEMENTS * shards // (B * config.vocab_size))
    C = max(c for c in range(1, T + 1) if T % c == 0 and c <= limit)
    return tuple(jnp.moveaxis(a.reshape((B, T // C, C, *a.shape[2:])), 1, 0) for a in arrays)


def token_log_probs(config: DecoderConfig, head_VxD, x_BxTxD, targets_BxT, shards: int = 1):
    """Log-probability of each target, float32 `[B, T]`."""
    chunks = _chunks(config, shards, targets_BxT.shape, x_BxTxD, targets_BxT)

    def one(_, chunk):
        return None, _log_probs(config, head_VxD, *chunk)

    _, out_NxBxC = jax.lax.scan(one, None, chunks)
    return jnp.moveaxis(out_NxBxC, 0, 1).reshape(targets_BxT.shape)


def _chunk_loss(config, head_VxD, x_BxCxD, targets_BxC, weights_BxC):
    return -jnp.sum(_log_probs(config, head_VxD, x_BxCxD, targets_BxC) * weights_BxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def cross_entropy(
    config: DecoderConfig,
    train_head: bool,
    head_VxD,
    x_BxTxD,
    targets_BxT,
    weights_BxT,
    shards: int = 1,
):
    """Σ weight · (−log p(target)), float32 scalar.

    The backward pass needs no second product with the head: the loss is a scalar, so the forward
    pass can keep its gradient for `x_BxTxD` (and for the head, if `train_head`) right away.

    Args:
      config: for the vocabulary and the soft-cap.
      train_head: whether a gradient for `head_VxD` is wanted; without it that gradient is zero.
      head_VxD: output matrix.
      x_BxTxD: final hidden states.
      targets_BxT: int32 ids.
      weights_BxT: float32; 0 where there is no target. No gradient flows to it.
      shards: devices that the rows are spread over (`Execution.row_shards`).
    """
    del train_head
    chunks = _chunks(config, shards, targets_BxT.shape, x_BxTxD, targets_BxT, weights_BxT)

    def one(total, chunk):
        return total + _chunk_loss(config, head_VxD, *chunk), None

    return jax.lax.scan(one, jnp.float32(0), chunks)[0]


def _forward(config, train_head, head_VxD, x_BxTxD, targets_BxT, weights_BxT, shards):
    chunks = _chunks(config, shards, targets_BxT.shape, x_BxTxD, targets_BxT, weights_BxT)
    argnums = (0, 1) if train_head else (1,)
    gradient = jax.value_and_grad(functools.partial(_chunk_loss, config), argnums=argnums)

    def one(carry, chunk):
        total, head_grad = carry
        loss, grads = gradient(head_VxD, *chunk)
        if train_head:
            head_grad += grads[0].astype(jnp.float32)
        return (total + loss, head_grad), grads[-1]

    start = jnp.zeros(head_VxD.shape if train_head else (), jnp.float32)
    (total, head_grad), dx_NxBxCxD = jax.lax.scan(one, (jnp.float32(0), start), chunks)
    dx_BxTxD = jnp.moveaxis(dx_NxBxCxD, 0, 1).reshape(x_BxTxD.shape)
    return total, (dx_BxTxD, head_grad, head_VxD, weights_BxT)


def _backward(config, train_head, shards, residuals, ct):
    del config, shards
    dx_BxTxD, head_grad, head_VxD, weights_BxT = residuals
    dx_BxTxD = (dx_BxTxD * ct).astype(dx_BxTxD.dtype)
    if train_head:
        d_head = (head_grad * ct).astype(head_VxD.dtype)
    else:
        d_head = jnp.zeros_like(head_VxD)
    return d_head, dx_BxTxD, None, jnp.zeros_like(weights_BxT)


cross_entropy.defvjp(_forward, _backward)


def next_token_targets(tokens_BxT, loss_mask_BxT, segment_ids_BxT):
    """Shift by one: position t predicts token t+1 of its own segment.

    Returns:
      `(targets_BxT int32, weights_BxT float32)`; the weight is `loss_mask[t+1]` where t and t+1
      share a segment other than padding, else 0, so a segment's first token is never a target.
    """
    shift = functools.partial(jnp.pad, pad_width=((0, 0), (0, 1)))
    targets_BxT = shift(tokens_BxT[:, 1:])
    same_BxT = shift((segment_ids_BxT[:, 1:] == segment_ids_BxT[:, :-1]).astype(jnp.float32))
    weights_BxT = same_BxT * (segment_ids_BxT > 0) * shift(loss_mask_BxT[:, 1:].astype(jnp.float32))
    return targets_BxT, weights_BxT
