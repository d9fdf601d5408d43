"""Weights from disk onto the devices: piece by piece, straight into sharded, stacked buffers.

The host never holds the model, and a process reads only the rows and columns of its own devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from medmoe_jax.base import decoder, quantised, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.parallel.rules import fitted

_PIECE_BYTES = 2**25  # of a tensor without layers, read at once


# What reads rows and columns of a piece, as they lie on disk, and the piece's place on the leading
# axes of its leaf, such as its layer.
Reader = tuple[tuple, Callable[[tuple[slice, ...]], np.ndarray]]


def fill_all(
    config: DecoderConfig,
    parts: Iterable[tuple[families.Part, Callable]],
    dtype: DTypeLike,
    shardings: Mapping[str, Any] | None,
    quantise: str,
) -> dict[str, Any]:
    """The parameter tree of `base.decoder`.

    Args:
      config: its shapes.
      parts: all that the leaves are made of, each with what reads its rows and columns.
      dtype: of the floats.
      shardings: a tree like the parameters, of `NamedSharding`s or `SingleDeviceSharding`s; None
        puts everything on the first device.
      quantise: a key of `base.quantised.KINDS` for the kernels, each layer's as it is read; ""
        leaves them in `dtype`.
    """
    readers: dict[str, list[Reader]] = {}
    for part, read in parts:
        readers.setdefault(part.path, []).append(((part.layer,), read))
    here = SingleDeviceSharding(jax.local_devices()[0])
    leaves = []
    for path, leaf in trees.flatten(decoder.abstract(config, np.dtype(dtype))):
        sharding = trees.get(shardings, path) if shardings is not None else here
        encode = quantised.encoder(quantise, path)
        leaves.append((path, fill(path, leaf, sharding, readers[path], encode)))
    return trees.unflatten(leaves)


def fill(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    sharding: Any,
    readers: Iterable[Reader],
    encode: Callable = lambda x: x,
    start: jax.Array | None = None,
) -> Any:
    """A leaf on the devices, filled piece by piece in donated buffers.

    Args:
      path, leaf: its name, and its shape and dtype as floats.
      sharding: of what is stored: one, or one an array.
      readers: of every piece; a leaf without layers has one, whose place is not looked at.
      encode: what a piece's values are stored as (`base.quantised.encoder`).
      start: an array whose values stay where no piece goes; None = zeros.
    """
    readers = list(readers)
    if not path.startswith("layers."):
        return _by_rows(leaf, sharding, readers[0][1])
    flip = families.transposed(path)
    leading = len(readers[0][0]) if readers else 1

    shape = leaf.shape[: leading - 1 : -1] if flip else leaf.shape[leading:]
    slice_sharding = _slice_sharding(jax.tree.leaves(sharding)[0], leading, shape, flip)
    pieces = (
        (_to_devices(shape, leaf.dtype, slice_sharding, read), tuple(map(np.int32, index)))
        for index, read in readers
    )
    write = _layer_writer(encode, flip, leading, sharding)
    return _filled(jax.eval_shape(encode, leaf), sharding, write, pieces, start)


# Cached: leaves that are written alike, in this model or the next, share a compiled program.
@functools.cache
def _layer_writer(encode: Callable, flip: bool, leading: int, sharding):
    """`(stack, piece as on disk, place on the leading axes) -> stack`; the stack is donated."""

    def write(stack, x, index):
        new = encode(x.T if flip else x)

        def put(stack, piece):
            at = (*index, *(0,) * piece.ndim)
            return jax.lax.dynamic_update_slice(
                stack, piece.reshape((1,) * leading + piece.shape), at
            )

        return jax.tree.map(put, stack, new)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _by_rows(leaf, sharding: Sharding, read: Callable):
    """A leaf without layers: a piece is some rows of every shard, so that no shard moves.

    Axes: S shards of the rows, R rows of a shard.
    """
    R = sharding.shard_shape(leaf.shape)[0]
    S, rest = leaf.shape[0] // R, leaf.shape[1:]
    step = max(1, _PIECE_BYTES * R // (math.prod(leaf.shape) * leaf.dtype.itemsize))
    spread = sharding
    if isinstance(sharding, NamedSharding):
        axes = (*sharding.spec, None)
        spec = PartitionSpec(axes[0], None, *axes[1 : len(leaf.shape)])
        spread = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    def piece(start: int):
        def rows(index):
            shards, within, *columns = index
            first = (shards.start or 0) * R + start + (within.start or 0)
            return read((slice(first, first + size), *columns))[None]

        size = min(step, R - start)
        return _to_devices((S, size, *rest), leaf.dtype, spread, rows), np.int32(start)

    write = _row_writer((S, R, *rest), sharding)
    return _filled(leaf, sharding, write, map(piece, range(0, R, step)))


@functools.cache
def _row_writer(by_shard: tuple[int, ...], sharding: Sharding):
    """`(leaf, rows of every shard, the first of them) -> leaf`; the leaf is donated."""

    def write(out, x, start):
        new = jax.lax.dynamic_update_slice_in_dim(out.reshape(by_shard), x, start, axis=1)
        return new.reshape(out.shape)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _filled(stored, sharding, write: Callable, pieces, start=None):
    """An array like `stored`: zeros or `start`, with `write(buffers, *piece)` of every piece."""
    given = () if start is None else (start,)
    buffers = _buffer_maker(stored, sharding)(*given)
    for piece in pieces:
        # Waiting keeps the host from queueing a whole model of pieces ahead of the devices.
        buffers = jax.block_until_ready(write(buffers, *piece))
    return buffers


@functools.cache
def _buffer_maker(stored, sharding):
    """`(start or nothing) -> buffers` like `stored`."""

    def make(*start):
        if start:
            return start[0].astype(stored.dtype)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored)

    return jax.jit(make, out_shardings=sharding)


def _slice_sharding(sharding: Sharding, leading: int, shape, flip: bool) -> Sharding:
    """The sharding of one piece as it lies on disk, such that writing it moves nothing."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"shardings: {type(sharding).__name__} is not a NamedSharding")
    axes = (*sharding.spec, *(None,) * (leading + len(shape) - len(sharding.spec)))[leading:]
    spec = PartitionSpec(*(axes[::-1] if flip else axes))
    return fitted(NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind), shape)


def _to_devices(shape, dtype, sharding: Sharding, read: Callable) -> jax.Array:
    """An array whose shards are read one by one; a slice that several devices hold, once."""
    known: dict[str, np.ndarray] = {}

    def shard(index):
        key = str(index)
        if key not in known:
            known[key] = np.ascontiguousarray(read(index)).astype(dtype, copy=False)
        return known[key]

    return jax.make_array_from_callback(shape, sharding, shard)
