"""The step of a bare base: what everything above it is measured against.

Axes: B rows, T tokens, D model.
Forward, loss and the gradient to the embedded tokens: all that a frozen base has to compute when
banks sit in every layer, and nothing of theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import cross_entropy, next_token_targets
from medmoe_jax.base.seam import Params


@dataclass(frozen=True)
class _Embedded:
    """Stands where the decoder looks tokens up, and gives their embeddings as they are."""

    x_BxTxD: jax.Array

    def __getitem__(self, tokens_BxT):
        return self.x_BxTxD


def frozen_loss(
    config: DecoderConfig,
    execution: Execution,
    x_BxTxD: jax.Array,
    base: Params,
    batch: Mapping[str, jax.Array],
) -> jax.Array:
    """Mean loss of the bare base as a function of its embedded tokens; see `frozen_step`."""
    hidden_BxTxD, _, _ = decoder.hidden(
        config,
        {**base, "embed": _Embedded(x_BxTxD)},
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        execution=execution,
    )
    targets, weights = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    total = cross_entropy(
        config, False, decoder.head(base), hidden_BxTxD, targets, weights, execution
    )
    return total / jnp.sum(weights)


def frozen_step(
    config: DecoderConfig, execution: Execution, base: Params, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`(mean loss, its gradient [B, T, D])`; the first two arguments are static under jit.

    Args:
      config, execution: the decoder, and how it is run.
      base: its parameters.
      batch: `tokens`, `loss_mask`, `segment_ids`, `positions`, each `[B, T]`.
    """
    x_BxTxD = base["embed"][batch["tokens"]].astype(execution.dtype)
    loss = functools.partial(frozen_loss, config, execution)
    return jax.value_and_grad(loss)(execution.constrain(x_BxTxD), base, batch)
