"""From the seed that a person gives to a random key."""

from __future__ import annotations

import operator

import jax
import numpy as np

_WORD = 2**32


def random_key(seed: int) -> jax.Array:
    """The key of a seed (`ranges.SEED`), all of whose bits count.

    `jax.random.key` itself takes the lower 32 bits of one, where JAX is not told to compute in 64.
    """
    seed = operator.index(seed)
    if -_WORD // 2 <= seed < _WORD:  # a word holds it, signed or not
        return jax.random.key(seed)
    upper, lower = divmod(seed % _WORD**2, _WORD)
    return jax.random.fold_in(jax.random.key(np.uint32(lower)), np.uint32(upper))
