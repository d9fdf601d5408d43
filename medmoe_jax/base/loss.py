"""Logits and cross-entropy, a chunk of tokens at a time.

Axes: B batch, T tokens, D model, V vocabulary; P, M, N, C, K as in `base.chunks`.
Float32 logits exist for one chunk only. Every chunk reads the whole head, so a chunk is as large as
a device's share of it allows. In training, devices share the vocabulary rather than the rows
(`Execution.logits_sharding`): a chunk's hidden states travel, not the head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base import chunks
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution


def logits(config: DecoderConfig, head_VxD: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
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


def _chunk_logits(config, cut: NamedSharding | None, head_VxD, x_PxCxD):
    if cut is not None:
        rows = NamedSharding(cut.mesh, PartitionSpec(*cut.spec[:2]))
        x_PxCxD = jax.lax.with_sharding_constraint(x_PxCxD, rows)
    z_PxCxV = logits(config, head_VxD, x_PxCxD)
    if cut is not None:
        z_PxCxV = jax.lax.with_sharding_constraint(z_PxCxV, cut)
    return z_PxCxV


def _log_probs(z_PxCxV, targets_PxC):
    # Not a lookup: a device that holds a part of V has nothing to look up elsewhere.
    picked_PxC = jnp.sum(jnp.where(targets_PxC[..., None] == _ids(z_PxCxV), z_PxCxV, 0.0), axis=-1)
    return picked_PxC - jax.nn.logsumexp(z_PxCxV, axis=-1)


def _likeliest(z_PxCxV):
    """The token of the largest logit, of equals the first; no lookup either."""
    most_PxCx1 = jnp.max(z_PxCxV, axis=-1, keepdims=True)
    V = z_PxCxV.shape[-1]
    return jnp.min(jnp.where(z_PxCxV == most_PxCx1, _ids(z_PxCxV), V), axis=-1)


def _ids(z_PxCxV):
    return jnp.arange(z_PxCxV.shape[-1], dtype=jnp.int32)[None, None]


def token_log_probs(
    config: DecoderConfig,
    head_VxD: jax.Array,
    x_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    execution: Execution = Execution(),
) -> tuple[jax.Array, jax.Array]:
    """What the model says of each target; tokens of weight 0 cost nothing.

    Args:
      config, head_VxD, x_BxTxD, targets_BxT, execution: as in `cross_entropy`.
      weights_BxT: 0 where there is no target.

    Returns:
      `[B, T]` each: log-probabilities, float32, and whether no other token is as likely, of equals
      the first counting as the likelier; 0 and False where there is no target.
    """
    into = chunks.divide(execution, *targets_BxT.shape, config.vocab_size)
    given = chunks.sort(into, execution, x_BxTxD, targets_BxT, weights_BxT)
    head_VxD = _laid_out(config, execution, head_VxD)
    cut = execution.logits_sharding(config.vocab_size, into.axes)

    def one(n, out):
        x_PxCxD, targets_PxC, weights_PxC = chunks.chunk(into, execution, given, n)
        z_PxCxV = _chunk_logits(config, cut, head_VxD, x_PxCxD)
        there_PxC = weights_PxC != 0
        found = (
            jnp.where(there_PxC, _log_probs(z_PxCxV, targets_PxC), 0.0),
            there_PxC & (_likeliest(z_PxCxV) == targets_PxC),
        )
        write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(0, n * into.tokens))
        return jax.tree.map(write, out, found)

    shape = given.targets_PxK.shape
    start = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    start = jax.tree.map(functools.partial(chunks.on_parts, into, execution), start)
    log_probs_PxK, likeliest_PxK = jax.lax.fori_loop(0, given.filled, one, start)
    M = given.x_PxMxD.shape[1]
    place_PxM = jnp.argsort(given.order_PxK[:, :M], axis=1)

    def in_rows(x_PxK):
        x_PxM = jnp.take_along_axis(x_PxK, place_PxM, axis=1)
        return chunks.rejoined(into, x_PxM, targets_BxT.shape)

    return in_rows(log_probs_PxK), in_rows(likeliest_PxK)


def _laid_out(config: DecoderConfig, execution: Execution, head_VxD):
    """The head where the logits' vocabulary lies, once for all chunks."""
    cut = execution.logits_sharding(config.vocab_size)
    if cut is None:
        return head_VxD
    rows = NamedSharding(cut.mesh, PartitionSpec(cut.spec[2]))
    return jax.lax.with_sharding_constraint(head_VxD, rows)


def _chunk_loss(config, cut, head_VxD, x_PxCxD, targets_PxC, weights_PxC):
    log_probs_PxC = _log_probs(_chunk_logits(config, cut, head_VxD, x_PxCxD), targets_PxC)
    return -jnp.sum(log_probs_PxC * weights_PxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def cross_entropy(
    config: DecoderConfig,
    train_head: bool,
    head_VxD: jax.Array,
    x_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    execution: Execution = Execution(),
) -> jax.Array:
    """Σ weight · (−log p(target)), float32 scalar; tokens of weight 0 cost nothing.

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
    into = chunks.divide(execution, *targets_BxT.shape, config.vocab_size)
    given = chunks.sort(into, execution, x_BxTxD, targets_BxT, weights_BxT)
    head_VxD = _laid_out(config, execution, head_VxD)
    cut = execution.logits_sharding(config.vocab_size, into.axes)

    def add(n, total):
        return total + _chunk_loss(config, cut, head_VxD, *chunks.chunk(into, execution, given, n))

    return jax.lax.fori_loop(0, given.filled, add, jnp.float32(0))


def _forward(config, train_head, head_VxD, x_BxTxD, targets_BxT, weights_BxT, execution):
    into = chunks.divide(execution, *targets_BxT.shape, config.vocab_size)
    given = chunks.sort(into, execution, x_BxTxD, targets_BxT, weights_BxT)
    argnums = (0, 1) if train_head else (1,)
    cut = execution.logits_sharding(config.vocab_size, into.axes)
    gradient = jax.value_and_grad(functools.partial(_chunk_loss, config, cut), argnums=argnums)
    here_VxD = _laid_out(config, execution, head_VxD)

    def add(n, carry):
        total, head_grad, dx_PxKxD = carry
        loss, grads = gradient(here_VxD, *chunks.chunk(into, execution, given, n))
        if train_head:
            head_grad += grads[0].astype(jnp.float32)
        at = (0, n * into.tokens, 0)
        return total + loss, head_grad, jax.lax.dynamic_update_slice(dx_PxKxD, grads[-1], at)

    P, _, D = given.x_PxMxD.shape
    dx_PxKxD = jnp.zeros((P, into.count * into.tokens, D), x_BxTxD.dtype)
    head_grad = jnp.zeros(head_VxD.shape if train_head else (), jnp.float32)
    start = (jnp.float32(0), head_grad, chunks.on_parts(into, execution, dx_PxKxD))
    total, head_grad, dx_PxKxD = jax.lax.fori_loop(0, given.filled, add, start)
    M = given.x_PxMxD.shape[1]
    place_PxM = jnp.argsort(given.order_PxK[:, :M], axis=1)
    dx_PxMxD = jnp.take_along_axis(dx_PxKxD, place_PxM[..., None], axis=1)
    dx_BxTxD = execution.constrain(chunks.rejoined(into, dx_PxMxD, x_BxTxD.shape))
    return total, (dx_BxTxD, head_grad, head_VxD, weights_BxT)


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


def next_token_targets(
    tokens_BxT: jax.Array, loss_mask_BxT: jax.Array, segment_ids_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
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
