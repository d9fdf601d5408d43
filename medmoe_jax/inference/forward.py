"""The model on tokens, whose predecessors may lie in a cache.

Axes: R rows, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.attention import Branches
from medmoe_jax.base.cache import Cache
from medmoe_jax.base.seam import Context


class Weights(NamedTuple):
    """What rows are run with.

    Attributes:
      base, banks: parameters of the decoder and of its banks.
      trained: base leaves that take the place of those in `base`.
      language_ids_Rx1: int32, the expert of each row's language, or -1 where it is unknown;
        `[R, T]` where the texts of a row differ in it.
    """

    base: Any
    banks: Any
    trained: Any
    language_ids_Rx1: Any = None


def forward(
    config: AdaptedConfig,
    weights: Weights,
    tokens_RxT: jax.Array,
    segments_RxT: jax.Array,
    positions_RxT: jax.Array,
    cache: Cache | None = None,
    branches: Branches | None = None,
) -> tuple[jax.Array, jax.Array, Cache | None]:
    """`(the head [V, D], final hidden states [R, T, D], cache)`; segment 0 is padding."""
    languages_RxT = jnp.where(segments_RxT > 0, weights.language_ids_Rx1, -1)
    x_RxTxD, cache, _ = adapted.hidden(
        config,
        weights.base,
        weights.banks,
        tokens_RxT,
        segments_RxT,
        positions_RxT,
        trained=weights.trained,
        context=Context(language_ids_BxT=languages_RxT),
        cache=cache,
        branches=branches,
    )
    return decoder.head(weights.base, weights.trained), x_RxTxD, cache
