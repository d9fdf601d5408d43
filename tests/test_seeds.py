"""Random keys of seeds, against JAX's own where it counts all bits."""

import itertools

import jax
import numpy as np
import pytest

from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import SEED
from medmoe_jax.seeds import random_key

SINGLE = (0, 5, 2**31 - 1, 2**31, 2**32 - 1, -1, -(2**31))
LONG = (2**32, 5 + 2**32, 5 - 2**32, 5 + 2**62, -(2**31) - 1, SEED.low, SEED.high)


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("seed", SINGLE)
def test_a_seed_of_a_word_is_the_key_that_it_always_was(seed):
    """Runs that go on draw as they began."""
    assert data(random_key(seed)) == data(jax.random.key(seed))


def test_every_bit_of_a_longer_seed_counts():
    singles = {data(random_key(seed)) for seed in SINGLE}
    longs = [data(random_key(seed)) for seed in LONG]
    assert len({*longs, *singles}) == len(longs) + len(singles)
    near = [data(random_key(seed ^ 1 << bit)) for seed, bit in itertools.product(LONG, range(62))]
    assert not set(near) & set(longs)
    assert data(random_key(np.int64(LONG[1]))) == data(jax.jit(lambda: random_key(LONG[1]))())
    draws = [Sampling(1.0, seed=seed).keys([0, 1]).tolist() for seed in (5, 5 + 2**32)]
    assert draws[0] != draws[1]
