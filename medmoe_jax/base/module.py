"""The bare decoder as a Flax NNX module, for use in other projects.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.decoder import head, hidden
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import ParameterError


def token_rows(**ids: ArrayLike) -> list[jax.Array]:
    """The arrays of one entry a token that a decoder module is given, by name.

    Raises:
      ParameterError: one that is not whole numbers `[B, T]`, with a row and a token at least.
    """
    arrays = {name: jnp.asarray(value) for name, value in ids.items()}
    shape = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        whole = not jnp.issubdtype(array.dtype, jnp.inexact)
        if array.shape != shape or array.ndim != 2 or not array.size or not whole:
            raise ParameterError(
                f"{name}: {array.dtype} {array.shape}; give whole numbers [rows, tokens], at least "
                "one row of one token, all ids of one shape"
            )
    return list(arrays.values())


class Decoder(nnx.Module):
    """`Decoder(config, params)(tokens_BxT)` returns float32 logits `[B, T, V]`.

    The parameters are the plain tree of `decoder.init` or of an importer, held as `nnx.Param`s and
    never copied.
    """

    def __init__(
        self, config: DecoderConfig, params: Params, execution: Execution = Execution()
    ) -> None:
        self.config = config
        self.execution = execution
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits; without ids, every row is one unpadded sample.

        Raises:
          ParameterError: ids that are not whole numbers `[B, T]`, with a row and a token at least.
        """
        (tokens_BxT,) = token_rows(tokens_BxT=tokens_BxT)
        if segment_ids_BxT is None:
            segment_ids_BxT = jnp.ones_like(tokens_BxT)
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(
                jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None], tokens_BxT.shape
            )
        ids = token_rows(
            tokens_BxT=tokens_BxT, segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT
        )
        params = nnx.as_pure(self.params)
        x_BxTxD, _, _ = hidden(self.config, params, *ids, execution=self.execution)
        return logits(self.config, head(params), x_BxTxD)
