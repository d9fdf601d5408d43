"""Dropout by counting: whether an element is kept depends on a seed and on where it stands.

Axes: B batch, T tokens, D width.

    kept[t, d] = mix(token[t] ^ column[d]) >= rate · 2³²

`token` and `column` are themselves hashes, of a seed with the token's number in the whole batch and
of another seed with the column's number. So a kernel that holds a block of an array needs the parts
of these two vectors that belong to it, and makes the same mask as plain JAX makes, on any mesh and
as often as it is asked: no array of random bits exists. Words are int32, which TPU kernels multiply
and compare; products wrap, shifts are logical.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Word = TypeVar("Word", jax.Array, PartitionSpec)


class Counter(NamedTuple, Generic[Word]):
    """What tells the elements of an array `[..., D]` apart, int32 words; or where these lie.

    Attributes:
      token: `[...]`, of each token: `[B, T]`, or flat where the array is.
      column_D: of each column.
    """

    token: Word
    column_D: Word


class Dropout(NamedTuple):
    """A draw of dropout on an array.

    Attributes:
      counter: of its elements.
      rate: the probability that an element is dropped, static, in [0, 1).
    """

    counter: Counter[jax.Array]
    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """The array after it."""
        column = self.counter.column_D.reshape((1,) * (x.ndim - 1) + (-1,))
        return dropped(x, self.counter.token[..., None], column, self.rate)


def counter(key: jax.Array, shape: tuple[int, ...]) -> Counter[jax.Array]:
    """The counter of an array of that shape; every key gives another.

    Args:
      key: a typed random key.
      shape: `(B, T, D)` of the whole array, over all devices.
    """
    B, T, D = shape
    seed_2 = jax.lax.bitcast_convert_type(jax.random.bits(key, (2,), jnp.uint32), jnp.int32)
    row_BxT, token_BxT = (jax.lax.broadcasted_iota(jnp.int32, (B, T), axis) for axis in (0, 1))
    place_BxT = row_BxT * T + token_BxT
    return Counter(
        _spread(place_BxT, seed_2[0]), _spread(jnp.arange(D, dtype=jnp.int32), seed_2[1])
    )


def _word(value: int) -> np.int32:
    return np.uint32(value).astype(np.int32)


def _folded(x, shift: int):
    return x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, shift))


def _spread(place, seed):
    """Neighbouring places, far apart: the finaliser of MurmurHash3 over a Weyl sequence."""
    x = place * _word(0x9E3779B9) + seed
    x = _folded(x, 16) * _word(0x85EBCA6B)
    return _folded(_folded(x, 13) * _word(0xC2B2AE35), 16)


def kept(token: jax.Array, column: jax.Array, rate: float) -> jax.Array:
    """Where an element stays, bool, of the shape to which both words broadcast; see `Counter`."""
    x = _folded((token ^ column) * _word(0x7FEB352D), 15) * _word(0x846CA68B)
    # The best mixed bits are the top ones; without a sign, as many as int32 compares.
    top = jax.lax.shift_right_logical(x, jnp.full_like(x, 1))
    return top >= np.int32(round(rate * 2**31))


def dropped(x: jax.Array, token: jax.Array, column: jax.Array, rate: float) -> jax.Array:
    """`x / (1 − rate)` where it is kept, 0 elsewhere, in x's dtype; words that broadcast to x."""
    scale = jnp.asarray(1.0 / (1.0 - rate), x.dtype)
    return jnp.where(kept(token, column, rate), x * scale, jnp.zeros_like(x))
