"""The tokens of a batch that have a target, cut into chunks.

Axes: B batch, T tokens; P parts of a batch, one for each set of devices that holds tokens of its
own, M tokens of a part, N chunks, C tokens of a part in a chunk, K = N·C; D model, V vocabulary.

In every part the tokens that have a target come first, so that a loop over chunks may end with the
last one that holds any. Tokens stay on their devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base.execution import Execution

_ELEMENTS = 2**25  # float32 logits of a chunk on one device: 128 MiB
# A chunk is at most this share of a part's tokens, lest the last one be mostly empty, but no fewer
# than so many tokens, lest the head be read for too few.
_SHARE = 16
_TOKENS = 128


class Chunks(NamedTuple):
    """How a batch's tokens fall into parts and chunks.

    Attributes:
      rows, sequence: P = rows · sequence, the parts that the mesh cuts rows and tokens into.
      axes: the mesh axes of P.
      tokens: C, of each part in a chunk.
      count: N, enough for every token.
    """

    rows: int
    sequence: int
    axes: tuple[str, ...]
    tokens: int
    count: int


def divide(execution: Execution, rows: int, tokens: int, vocabulary: int) -> Chunks:
    """The parts and chunks of a batch `[rows, tokens]` whose logits have `vocabulary` numbers."""
    axis = execution.sequence_axis(tokens)
    S = execution.size(axis)
    whole = rows % execution.row_shards > 0
    R, axes = (1, ()) if whole else (execution.row_shards, execution.row_axes)
    M = rows * tokens // (R * S)
    limit = max(1, _ELEMENTS // vocabulary)
    C = min(M, limit, max(_TOKENS, -(-M // _SHARE)))
    return Chunks(R, S, (*axes, *([axis] if axis else [])), C, -(-M // C))


def _parted(into: Chunks, execution: Execution, x_BxT):
    """`[B, T, ...]` as `[P, M, ...]`: what each part holds."""
    B, T = x_BxT.shape[:2]
    R, S = into.rows, into.sequence
    x = x_BxT.reshape((R, B // R, S, T // S, *x_BxT.shape[2:]))
    x = jnp.moveaxis(x, 2, 1).reshape((R * S, B * T // (R * S), *x_BxT.shape[2:]))
    return on_parts(into, execution, x)


def rejoined(into: Chunks, x_PxM: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `_parted`: `[B, T, ...]` of that shape."""
    B, T = shape[:2]
    R, S = into.rows, into.sequence
    x = x_PxM.reshape((R, S, B // R, T // S, *shape[2:]))
    return jnp.moveaxis(x, 1, 2).reshape(shape)


def on_parts(into: Chunks, execution: Execution, x_PxM: jax.Array) -> jax.Array:
    """Pin an array of parts to the devices that hold them."""
    if execution.mesh is None or not into.axes:
        return x_PxM
    sharding = NamedSharding(execution.mesh, PartitionSpec(into.axes))
    return jax.lax.with_sharding_constraint(x_PxM, sharding)


class Sorted(NamedTuple):
    """The tokens of every part, those with a target first."""

    x_PxMxD: jax.Array  # as they were
    order_PxK: jax.Array  # int32, K = N·C: which token stands here; beyond M any
    targets_PxK: jax.Array
    weights_PxK: jax.Array  # 0 beyond M
    filled: jax.Array  # [] chunks that hold a target, of the part with most


def sort(
    into: Chunks,
    execution: Execution,
    x_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
) -> Sorted:
    """The tokens in the order in which a loop over chunks takes them; weight 0 is no target."""
    arrays = (x_BxTxD, targets_BxT, weights_BxT)
    x_PxMxD, targets_PxM, weights_PxM = (_parted(into, execution, a) for a in arrays)
    order_PxM = jnp.argsort(weights_PxM == 0, axis=1, stable=True)
    beyond = ((0, 0), (0, into.count * into.tokens - order_PxM.shape[1]))
    targets_PxM, weights_PxM = (
        jnp.take_along_axis(a, order_PxM, axis=1) for a in (targets_PxM, weights_PxM)
    )
    order_PxK, targets_PxK, weights_PxK = (
        jnp.pad(a, beyond) for a in (order_PxM, targets_PxM, weights_PxM)
    )
    most = jnp.max(jnp.sum(weights_PxM != 0, axis=1))
    return Sorted(x_PxMxD, order_PxK, targets_PxK, weights_PxK, -(-most // into.tokens))


def chunk(
    into: Chunks, execution: Execution, given: Sorted, n: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chunk n: `(x_PxCxD, targets_PxC, weights_PxC)`."""
    arrays = (given.order_PxK, given.targets_PxK, given.weights_PxK)
    order_PxC, targets_PxC, weights_PxC = (
        jax.lax.dynamic_slice_in_dim(a, n * into.tokens, into.tokens, axis=1) for a in arrays
    )
    x_PxCxD = jnp.take_along_axis(given.x_PxMxD, order_PxC[..., None], axis=1)
    return on_parts(into, execution, x_PxCxD), targets_PxC, weights_PxC
