"""The compiled programs of scoring: completions of prompts, and whole texts token by token.

Axes: B rows, P prompt slots, C completion slots, N completions a prompt, T tokens, V vocabulary,
A alternatives.
Prompts are padded on the left, completions on the right; padding is segment 0, which no other
token sees.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.cache import new_cache
from medmoe_jax.base.loss import logits, token_log_probs
from medmoe_jax.inference.drawing import Drawn, told
from medmoe_jax.inference.forward import Weights, forward

_BLOCK = 32  # tokens of a row whose logits exist at once


@functools.partial(jax.jit, static_argnums=0)
def score_batch(
    config: AdaptedConfig,
    weights: Weights,
    prompts: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    given: jax.Array,
    targets: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Log-probabilities of N completions a prompt, the prompt being read once.

    Args:
      config: static.
      weights: parameters and languages.
      prompts, segments, positions: `[B, P]` int32, prompts without their last token, padded on
        the left; segment 0 is padding.
      given, targets: `[N, B, C]`, inputs (from the last prompt token on) and what they predict.
      lengths: `[N, B]` tokens of each completion.

    Returns:
      `[N, B]` float32 sums.
    """
    B, P = prompts.shape
    C = given.shape[-1]
    start_Bx1 = jnp.sum(segments, axis=1, keepdims=True)
    whole_B = start_Bx1[:, 0] + 1 + jnp.max(lengths, axis=0)
    cache = new_cache(config.decoder, B, P + C, config.execution.dtype, whole_B)
    _, _, cache = forward(config, weights, prompts, segments, positions, cache)
    offsets_1xC = jnp.arange(C, dtype=jnp.int32)[None]

    def one(_, completion):
        given_BxC, targets_BxC, lengths_B = completion
        live_BxC = (offsets_1xC < lengths_B[:, None]).astype(jnp.int32)
        positions_BxC = (start_Bx1 + offsets_1xC) * live_BxC
        head, x, _ = forward(config, weights, given_BxC, live_BxC, positions_BxC, cache)
        log_probs_BxC = token_log_probs(config.decoder, head, x, targets_BxC, config.execution)
        return None, jnp.sum(log_probs_BxC * live_BxC, axis=1)

    return jax.lax.scan(one, None, (given, targets, lengths))[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def tell_batch(
    config: AdaptedConfig,
    alternatives: int,
    weights: Weights,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
) -> Drawn:
    """What the model says of every token of texts, by those before it.

    Args:
      config, alternatives: static.
      weights: parameters and languages.
      tokens, segments, positions: `[B, T]` int32, padded on the left.

    Returns:
      `[B, T, ...]`: at t, of the token at t + 1; the last one says nothing.
    """
    B, T = tokens.shape
    head, x_BxTxD, _ = forward(config, weights, tokens, segments, positions)
    block = _BLOCK if T % _BLOCK == 0 else T
    targets_BxT = jnp.roll(tokens, -1, axis=1)

    def one(n):
        x, targets = (
            jax.lax.dynamic_slice_in_dim(a, n * block, block, axis=1)
            for a in (x_BxTxD, targets_BxT)
        )
        z_RxV = logits(config.decoder, head, x).reshape(B * block, -1)
        return told(z_RxV, targets.reshape(-1), alternatives)

    out = jax.lax.map(one, jnp.arange(T // block))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(T // block, B, block, *x.shape[2:]), 0, 1).reshape(
            B, T, *x.shape[2:]
        ),
        out,
    )
