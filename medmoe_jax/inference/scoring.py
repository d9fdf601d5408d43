"""The compiled programs of scoring: completions of prompts, and whole texts token by token.

Axes: B rows, T tokens, V vocabulary, A alternatives.
Padding is segment 0, which no other token sees.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.attention import Branches
from medmoe_jax.base.loss import logits, token_log_probs
from medmoe_jax.inference.branching import Packed
from medmoe_jax.inference.drawing import Drawn, told
from medmoe_jax.inference.forward import Weights, forward

_BLOCK = 32  # tokens of a row whose logits exist at once


@functools.partial(jax.jit, static_argnums=0)
def score_batch(
    config: AdaptedConfig, weights: Weights, packed: Packed
) -> tuple[jax.Array, jax.Array]:
    """What the model says of the tokens that trees are asked about, in one forward pass.

    No gate and no expert looks beyond its own token, and attention sees a token's own text alone:
    each text is read as it would be by itself.

    Args:
      config: static.
      weights: parameters; languages are those of `packed`.
      packed: the trees.

    Returns:
      `[B, T]` each, in the order of the questions: log-probabilities, float32, and whether the
      token is the likeliest there; 0 and False where nothing is asked.
    """
    head, x_BxTxD, _ = forward(
        config,
        weights._replace(language_ids_Rx1=packed.languages),
        packed.tokens,
        packed.segments,
        packed.positions,
        branches=Branches(packed.last, packed.lengths),
    )
    x_BxTxD = jnp.take_along_axis(x_BxTxD, packed.at[..., None], axis=1)
    there_BxT = packed.targets >= 0
    return token_log_probs(
        config.decoder, head, x_BxTxD, packed.targets, there_BxT, config.execution
    )


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
