"""The equations of a token router, in plain JAX; every other form of it is tested against them.

Axes: B batch, T tokens, E experts, K picks a token.

    p = softmax(z)     I = the K largest of the logits z, ties to the lower index
    w = p[I], or divided by their sum: the softmax over the kept logits

All of it is float32: a flipped near-tie changes which expert a token sees.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Gates(NamedTuple):
    """What a router decided about every token; strategies take the form they need.

    Attributes:
      dense_BxTxE: weights, zero for experts that were not picked.
      picks_BxTxK: int32, the K different experts of a token, best first; E stands for none.
      weights_BxTxK: theirs.
    """

    dense_BxTxE: jax.Array
    picks_BxTxK: jax.Array
    weights_BxTxK: jax.Array


class Choice(NamedTuple):
    """What a router chose for every token: gates, and what its statistics need.

    Attributes:
      gates: see `Gates`.
      kept_BxTxE: bool, the picked experts.
      prob_BxTxE: softmax over all experts.
      forced_BxT: bool, tokens whose last pick was overridden.
    """

    gates: Gates
    kept_BxTxE: jax.Array
    prob_BxTxE: jax.Array
    forced_BxT: jax.Array


class RouterStats(NamedTuple):
    """Sums over the valid tokens, so that they add up over devices and micro-batches.

    Attributes:
      tokens: [] number of valid tokens.
      use_E: [E] tokens that picked the expert.
      prob_E: [E] Σ softmax probability.
      entropy: [] Σ entropy of the softmax, in nats.
      z2: [] Σ logsumexp(logits)².
      forced: [] tokens whose last pick was overridden by their language's expert.
      non_finite: [] tokens with a logit that is not finite; always 0 in a healthy run.
    """

    tokens: jax.Array
    use_E: jax.Array
    prob_E: jax.Array
    entropy: jax.Array
    z2: jax.Array
    forced: jax.Array
    non_finite: jax.Array


def choose_experts(
    logits_BxTxE: jax.Array, top_k: int, *, renormalise: bool, forced_BxT: jax.Array | None = None
) -> Choice:
    """Softmax weights of the k largest logits.

    Args:
      logits_BxTxE: float32.
      top_k: experts a token keeps; ties go to the lower index.
      renormalise: whether the kept weights sum to one (equal to a softmax over the kept logits).
      forced_BxT: int32, an expert that must be among a token's picks, or -1; where it is not, it
        takes the place of the weakest pick (the hybrid routing of Apollo-MoE, arXiv 2410.10626).

    Example, one token, whose second pick is overridden:
      >>> logits_BxTxE = jnp.log(jnp.array([[[0.5, 3.0, 1.0]]]))
      >>> gates = choose_experts(logits_BxTxE, 2, renormalise=True).gates
      >>> gates.picks_BxTxK.tolist(), gates.weights_BxTxK.round(2).tolist()
      ([[[1, 2]]], [[[0.75, 0.25]]])
      >>> forced_BxT = jnp.array([[0]])
      >>> choice = choose_experts(logits_BxTxE, 2, renormalise=True, forced_BxT=forced_BxT)
      >>> choice.gates.picks_BxTxK.tolist(), choice.forced_BxT.tolist()
      ([[[1, 0]]], [[True]])
    """
    experts = logits_BxTxE.shape[-1]
    prob_BxTxE = jax.nn.softmax(logits_BxTxE, axis=-1)
    _, picks_BxTxK = jax.lax.top_k(logits_BxTxE, top_k)
    override_BxT = jnp.zeros(logits_BxTxE.shape[:2], jnp.bool_)
    if forced_BxT is not None:
        forced_BxT = known(forced_BxT, experts)
        there_BxT = jnp.any(picks_BxTxK == forced_BxT[..., None], axis=-1)
        override_BxT = (forced_BxT >= 0) & ~there_BxT
        last_BxT = jnp.where(override_BxT, forced_BxT, picks_BxTxK[..., -1])
        picks_BxTxK = picks_BxTxK.at[..., -1].set(last_BxT)
    kept_BxTxE = jnp.any(jax.nn.one_hot(picks_BxTxK, experts, dtype=jnp.bool_), axis=-2)
    if renormalise:
        dense_BxTxE = jax.nn.softmax(jnp.where(kept_BxTxE, logits_BxTxE, -jnp.inf), axis=-1)
    else:
        dense_BxTxE = jnp.where(kept_BxTxE, prob_BxTxE, 0.0)
    weights_BxTxK = jnp.take_along_axis(dense_BxTxE, picks_BxTxK, axis=-1)
    gates = Gates(dense_BxTxE, picks_BxTxK, weights_BxTxK)
    return Choice(gates, kept_BxTxE, prob_BxTxE, override_BxT)


def known(forced: jax.Array, experts: int) -> jax.Array:
    """Numbers of experts to be forced; one that is not there forces none, as -1 does."""
    return jnp.where(forced < experts, forced, -1)


def router_stats(logits_BxTxE: jax.Array, choice: Choice, valid_BxT: jax.Array) -> RouterStats:
    """Statistics over the tokens where `valid_BxT`.

    `prob_E` and `z2` can be differentiated, for the router's losses.
    """
    valid_BxTx1 = valid_BxT[..., None].astype(jnp.float32)
    log_prob_BxTxE = jax.nn.log_softmax(logits_BxTxE, axis=-1)
    z_BxTx1 = jax.nn.logsumexp(logits_BxTxE, axis=-1, keepdims=True)
    finite_BxTx1 = jnp.all(jnp.isfinite(logits_BxTxE), axis=-1, keepdims=True)
    entropy = -jnp.sum(choice.prob_BxTxE * log_prob_BxTxE * valid_BxTx1)
    return RouterStats(
        tokens=jnp.sum(valid_BxTx1),
        use_E=jnp.sum(choice.kept_BxTxE * valid_BxTx1, axis=(0, 1)),
        prob_E=jnp.sum(choice.prob_BxTxE * valid_BxTx1, axis=(0, 1)),
        entropy=jax.lax.stop_gradient(entropy),
        z2=jnp.sum(z_BxTx1**2 * valid_BxTx1),
        forced=jnp.sum(choice.forced_BxT[..., None] * valid_BxTx1),
        non_finite=jnp.sum(~finite_BxTx1 * valid_BxTx1),
    )
