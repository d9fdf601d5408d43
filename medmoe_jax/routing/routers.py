"""Token routers: logits, top-k gates and the statistics of both.

Axes: B batch, T tokens, D model, E experts.
Everything here is float32: a flipped near-tie changes which expert a token sees.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.errors import UserError


class RouterStats(NamedTuple):
    """Sums over the valid tokens, so that they add up over devices and micro-batches.

    Attributes:
      tokens: [] number of valid tokens.
      use_E: [E] tokens that picked the expert.
      prob_E: [E] Σ softmax probability.
      entropy: [] Σ entropy of the softmax, in nats.
    """

    tokens: jax.Array
    use_E: jax.Array
    prob_E: jax.Array
    entropy: jax.Array


def check_top_k(where: str, top_k: int, experts: int) -> None:
    """Raise UserError unless 1 <= top_k <= experts."""
    if not 1 <= top_k <= experts:
        raise UserError(f"{where}.top_k: {top_k} of {experts} experts; give 1 to {experts}")


def router_logits(x_BxTxD, kernel_DxE, bias_E=None):
    """`x R (+ b)`, float32 `[B, T, E]`, multiplied at full precision."""
    z_BxTxE = jnp.einsum(
        "BTD,DE->BTE",
        x_BxTxD.astype(jnp.float32),
        kernel_DxE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return z_BxTxE if bias_E is None else z_BxTxE + bias_E.astype(jnp.float32)[None, None]


def top_k_gates(logits_BxTxE, top_k: int, *, renormalise: bool):
    """Softmax weights of the k largest logits, zero elsewhere.

    Args:
      logits_BxTxE: float32.
      top_k: experts a token keeps; ties go to the lower index.
      renormalise: whether the kept weights sum to one (equal to a softmax over the kept logits).

    Returns:
      `(gates_BxTxE, kept_BxTxE bool, prob_BxTxE)`.
    """
    experts = logits_BxTxE.shape[-1]
    prob_BxTxE = jax.nn.softmax(logits_BxTxE, axis=-1)
    _, picks_BxTxk = jax.lax.top_k(logits_BxTxE, top_k)
    kept_BxTxE = jnp.any(jax.nn.one_hot(picks_BxTxk, experts, dtype=jnp.bool_), axis=-2)
    if renormalise:
        gates_BxTxE = jax.nn.softmax(jnp.where(kept_BxTxE, logits_BxTxE, -jnp.inf), axis=-1)
    else:
        gates_BxTxE = jnp.where(kept_BxTxE, prob_BxTxE, 0.0)
    return gates_BxTxE, kept_BxTxE, prob_BxTxE


def router_stats(logits_BxTxE, kept_BxTxE, prob_BxTxE, valid_BxT) -> RouterStats:
    """Statistics over the tokens where `valid_BxT`; no gradient flows through them."""
    valid_BxTx1 = valid_BxT[..., None].astype(jnp.float32)
    log_prob_BxTxE = jax.nn.log_softmax(logits_BxTxE, axis=-1)
    stats = RouterStats(
        tokens=jnp.sum(valid_BxTx1),
        use_E=jnp.sum(kept_BxTxE * valid_BxTx1, axis=(0, 1)),
        prob_E=jnp.sum(prob_BxTxE * valid_BxTx1, axis=(0, 1)),
        entropy=-jnp.sum(prob_BxTxE * log_prob_BxTxE * valid_BxTx1),
    )
    return jax.lax.stop_gradient(stats)
