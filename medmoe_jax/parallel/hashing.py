"""Hashes of arrays: the same values give the same hash on any mesh and any machine.

An array is hashed where it lies, shard by shard and slice by slice: each element's bits are mixed
with its position in the whole array, and the results are added modulo 2**32. So neither sharding
nor order matters, nothing is gathered, and temporaries stay below a few slices. It guards against
accidents, not against an adversary.

Axes: R rows (all axes but the last, flattened), C columns (the last axis), N lanes.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.parallel.processes import gather

LANES_Nx3 = ((0x9E3779B1, 0x85EBCA77, 0x165667B1), (0xC2B2AE3D, 0x27D4EB2F, 0xD3A2646C))
SLICE_ELEMENTS = 2**21


def array_hashes(leaves: Iterable[Any]) -> list[list[int]]:
    """A hash of every array: N integers of 32 bits.

    Leaves are numpy arrays, typed random keys or jax arrays under any sharding. Where arrays span
    several processes, all of them must call this, and all get the same answer.
    """
    parts = [_leaf_sums(leaf) for leaf in leaves]  # dispatched one after another, read once
    sums = np.stack([_add(part) for part in jax.device_get(parts)] or [_add([])])
    sums = np.array(gather(sums.tolist()), np.uint32).sum(axis=0, dtype=np.uint32)
    return sums.tolist()[: len(parts)]


def _add(parts: list[np.ndarray]) -> np.ndarray:
    return np.reshape(parts, (-1, len(LANES_Nx3))).sum(axis=0, dtype=np.uint32)


def _leaf_sums(leaf: Any) -> list[jax.Array]:
    """Parts, each uint32[N], whose sum over all processes modulo 2**32 is the leaf's hash."""
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        return _host_sums(leaf, [0] * leaf.ndim, leaf.shape) if jax.process_index() == 0 else []
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_addressable and jax.process_index() > 0:
        return []  # every process holds it all: the first one counts it
    sums = []
    for shard in leaf.addressable_shards:
        starts = [part.start or 0 for part in shard.index]
        if shard.replica_id == 0 and shard.device.platform == "cpu":
            sums += _host_sums(np.asarray(shard.data), starts, leaf.shape)  # a view, not a copy
        elif shard.replica_id == 0:
            sums.append(_hash(shard.data, starts, leaf.shape))
    return sums


def _host_sums(shard: np.ndarray, starts: list[int], shape: tuple[int, ...]) -> list[jax.Array]:
    """The sums of an array in host memory, read in pieces along its first axis.

    Floats are viewed as integers here: XLA's CPU backend would widen a whole bfloat16 array.
    """
    if shard.dtype.itemsize == 8:
        shard = np.ascontiguousarray(shard).reshape(*shard.shape, 1).view(np.uint32)
        starts, shape = [*starts, 0], (*shape, 2)
    elif not jnp.issubdtype(shard.dtype, jnp.integer) and shard.dtype != np.bool_:
        shard = shard.view(f"u{shard.dtype.itemsize}")
    if not shard.ndim or not shard.size:
        return [_hash(shard, starts, shape)]
    step = max(1, SLICE_ELEMENTS * len(shard) // shard.size)
    return [
        _hash(shard[first : first + step], [starts[0] + first, *starts[1:]], shape)
        for first in range(0, len(shard), step)
    ]


def _hash(shard: jax.Array | np.ndarray, starts: list[int], shape: tuple[int, ...]) -> jax.Array:
    """uint32[N] of a shard that begins at `starts` within an array of `shape`."""
    if len(shape) < 2:  # rows can be cut into slices, columns cannot: one column
        shard, starts, shape = shard.reshape(-1, 1), [*starts, 0, 0][:2], (*shape, 1, 1)[:2]
    return _hash_rows(shard, np.array(starts, np.uint32), shape[:-1])


@functools.partial(jax.jit, static_argnums=2)
def _hash_rows(shard: jax.Array, starts: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    """Sums over slices of rows; a row's number is that within the whole array."""
    if not shard.size:
        return jnp.zeros(len(LANES_Nx3), jnp.uint32)
    x_RxC = shard.reshape(-1, shard.shape[-1])
    columns_C = starts[-1] + jnp.arange(x_RxC.shape[1], dtype=jnp.uint32)
    size = max(1, min(x_RxC.shape[0], SLICE_ELEMENTS // x_RxC.shape[1]))

    def slice_sums(first, count):
        local = jnp.unravel_index(first + jnp.arange(count), shard.shape[:-1])
        rows_R = jnp.zeros(count, jnp.uint32)
        for index, start, length in zip(local, starts[:-1], leading, strict=True):
            rows_R = rows_R * np.uint32(length) + index.astype(jnp.uint32) + start
        return _sums(_bits(jax.lax.dynamic_slice_in_dim(x_RxC, first, count)), rows_R, columns_C)

    whole, rest = divmod(x_RxC.shape[0], size)
    total_N = jax.lax.fori_loop(
        0,
        whole,
        lambda i, total: total + slice_sums(i * size, size),
        jnp.zeros(len(LANES_Nx3), jnp.uint32),
    )
    return total_N + slice_sums(whole * size, rest) if rest else total_N


def _sums(bits_RxC: jax.Array, rows_R: jax.Array, columns_C: jax.Array) -> jax.Array:
    """uint32[N] from the bits of a slice of rows."""
    sums = []
    for row, column, salt in LANES_Nx3:
        place_RxC = rows_R[:, None] * np.uint32(row) + columns_C[None, :] * np.uint32(column)
        mixed_RxC = mix(mix(bits_RxC ^ np.uint32(salt)) + place_RxC)
        sums.append(jnp.sum(mixed_RxC, dtype=jnp.uint32))
    return jnp.stack(sums)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return x.astype(jnp.uint32)


def mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit changes every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
