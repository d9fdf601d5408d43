"""The step of a bare base: what everything above it is measured against.

Axes: B rows, T tokens, D model.
Forward, loss and the gradient to the embedded tokens: all that a frozen base has to compute when
banks sit in every layer, and nothing of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.decoder import Execution
from medmoe_jax.base.loss import cross_entropy, next_token_targets


@dataclass(frozen=True)
class _Embedded:
    """Stands where the decoder looks tokens up, and gives their embeddings as they are."""

    x_BxTxD: jax.Array

    def __getitem__(self, tokens_BxT):
        return self.x_BxTxD


def frozen_step(
    config: DecoderConfig, execution: Execution, base, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`(mean loss, its gradient [B, T, D])`; the first two arguments are static under jit.

    Args:
      config, execution: the decoder, and how it is run.
      base: its parameters.
      batch: `tokens`, `loss_mask`, `segment_ids`, `positions`, each `[B, T]`.
    """
    head_VxD = decoder.head(base)
    targets, weights = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])

    def loss(x_BxTxD):
        hidden_BxTxD, _, _ = decoder.hidden(
            config,
            {**base, "embed": _Embedded(x_BxTxD)},
            batch["tokens"],
            batch["segment_ids"],
            batch["positions"],
            execution=execution,
        )
        total = cross_entropy(config, False, head_VxD, hidden_BxTxD, targets, weights, execution)
        return total / jnp.sum(weights)

    x_BxTxD = base["embed"][batch["tokens"]].astype(execution.dtype)
    return jax.value_and_grad(loss)(execution.constrain(x_BxTxD))
