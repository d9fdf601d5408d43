"""Logits and cross-entropy, a chunk of tokens at a time.

Axes: B batch, T tokens, C tokens of a chunk, N chunks, D model, V vocabulary.
Float32 logits exist for one chunk only, `[B, C, V]`. Every chunk reads the whole head, so a chunk
is as large as a device's share of it allows. In training, devices share the vocabulary rather than
the rows (`Execution.logits_sharding`): a chunk's hidden states travel, not the head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution

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


def _log_probs(config, head_VxD, x_BxCxD, targets_BxC, cut: NamedSharding | None = None):
    if cut is not None:
        rows = NamedSharding(cut.mesh, PartitionSpec(*cut.spec[:2]))
        x_BxCxD = jax.lax.with_sharding_constraint(x_BxCxD, rows)
    z_BxCxV = logits(config, head_VxD, x_BxCxD)
    if cut is not None:
        z_BxCxV = jax.lax.with_sharding_constraint(z_BxCxV, cut)
    # Not a lookup: a device that holds a part of V has nothing to look up elsewhere.
    ids_1x1xV = jnp.arange(config.vocab_size, dtype=targets_BxC.dtype)[None, None]
    picked_BxC = jnp.sum(jnp.where(targets_BxC[..., None] == ids_1x1xV, z_BxCxV, 0.0), axis=-1)
    return picked_BxC - jax.nn.logsumexp(z_BxCxV, axis=-1)


def _chunks(config: DecoderConfig, execution: Execution, *arrays):
    """`(S, chunks)`: `[B, T, ...]` arrays cut into `[N, B, C, ...]`, and devices that share a row.

    Every chunk has tokens of every device: C / S each. That is the largest number that divides a
    device's share of a row, T / S, and whose float32 logits are no more than `_CHUNK_ELEMENTS`.
    """
    B, T = arrays[0].shape[:2]
    S = execution.size(execution.sequence_axis(T))
    limit = max(1, _CHUNK_ELEMENTS * execution.row_shards // (B * config.vocab_size))
    C = max(c for c in range(1, T // S + 1) if T // S % c == 0 and c <= limit)

    def split(a):
        a = a.reshape((B, S, T // S // C, C, *a.shape[2:]))
        return jnp.moveaxis(a, 2, 0).reshape((-1, B, S * C, *a.shape[4:]))

    return S, tuple(map(split, arrays))


def _joined(S: int, a_NxBxC):
    """The inverse of `_chunks`: `[B, T, ...]`."""
    N, B, C = a_NxBxC.shape[:3]
    a = a_NxBxC.reshape((N, B, S, C // S, *a_NxBxC.shape[3:]))
    return jnp.moveaxis(a, 0, 2).reshape((B, N * C, *a.shape[4:]))


def token_log_probs(
    config: DecoderConfig, head_VxD, x_BxTxD, targets_BxT, execution: Execution = Execution()
):
    """Log-probability of each target, float32 `[B, T]`."""
    S, chunks = _chunks(config, execution, x_BxTxD, targets_BxT)

    def one(_, chunk):
        return None, _log_probs(config, head_VxD, *chunk)

    _, out_NxBxC = jax.lax.scan(one, None, chunks)
    return _joined(S, out_NxBxC)


def _laid_out(config: DecoderConfig, execution: Execution, head_VxD):
    """The head where the logits' vocabulary lies, once for all chunks."""
    cut = execution.logits_sharding(config.vocab_size)
    if cut is None:
        return head_VxD
    rows = NamedSharding(cut.mesh, PartitionSpec(cut.spec[2]))
    return jax.lax.with_sharding_constraint(head_VxD, rows)


def _chunk_loss(config, execution, head_VxD, x_BxCxD, targets_BxC, weights_BxC):
    cut = execution.logits_sharding(config.vocab_size, x_BxCxD.shape[1])
    log_probs_BxC = _log_probs(config, head_VxD, execution.constrain(x_BxCxD), targets_BxC, cut)
    return -jnp.sum(log_probs_BxC * weights_BxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def cross_entropy(
    config: DecoderConfig,
    train_head: bool,
    head_VxD,
    x_BxTxD,
    targets_BxT,
    weights_BxT,
    execution: Execution = Execution(),
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
      execution: where rows and vocabulary lie.
    """
    del train_head
    _, chunks = _chunks(config, execution, x_BxTxD, targets_BxT, weights_BxT)
    head_VxD = _laid_out(config, execution, head_VxD)

    def one(total, chunk):
        return total + _chunk_loss(config, execution, head_VxD, *chunk), None

    return jax.lax.scan(one, jnp.float32(0), chunks)[0]


def _forward(config, train_head, head_VxD, x_BxTxD, targets_BxT, weights_BxT, execution):
    S, chunks = _chunks(config, execution, x_BxTxD, targets_BxT, weights_BxT)
    argnums = (0, 1) if train_head else (1,)
    loss = functools.partial(_chunk_loss, config, execution)
    gradient = jax.value_and_grad(loss, argnums=argnums)
    here_VxD = _laid_out(config, execution, head_VxD)

    def one(carry, chunk):
        total, head_grad = carry
        loss, grads = gradient(here_VxD, *chunk)
        if train_head:
            head_grad += grads[0].astype(jnp.float32)
        return (total + loss, head_grad), grads[-1]

    start = jnp.zeros(head_VxD.shape if train_head else (), jnp.float32)
    (total, head_grad), dx_NxBxCxD = jax.lax.scan(one, (jnp.float32(0), start), chunks)
    return total, (_joined(S, dx_NxBxCxD), head_grad, head_VxD, weights_BxT)


def _backward(config, train_head, execution, residuals, ct):
    del config, execution
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
