"""Which source a row is of: the shares of steps and of data shards."""

import numpy as np
import pytest

from medmoe_jax.data.mixing import source_of

ROUNDS = 600
WEIGHTS = {
    "one of each": [1, 1],
    "two for one": [2, 1],
    "apollo": [16, 2],
    "rare": [99, 1],
    "three": [1, 1, 1],
    "twelve": [1] * 12,
    "counts of rows": [12345, 6789, 333],
    "fractions": [0.31, 0.004, 1.7, 0.56],
}


@pytest.fixture(params=[1, 3, 8, 32, 50, 64])
def shards(request):
    return request.param


@pytest.fixture(params=WEIGHTS.values(), ids=WEIGHTS)
def weights(request):
    return request.param


@pytest.fixture
def is_of(shards, weights):
    """Whether the shards' rows, of S at a time, are of each source, [rounds, S, sources]."""
    sources = [[source_of(row, s, shards, weights) for s in range(shards)] for row in range(ROUNDS)]
    return np.asarray(sources)[:, :, None] == np.arange(len(weights))


def farthest(counts_RxN, wanted_N):
    """How far the count of any run of rows is from what is wanted of so many."""
    off = np.cumsum(counts_RxN - wanted_N, axis=0)
    off = np.concatenate([np.zeros_like(off[:1]), off])
    return np.ptp(off, axis=0).max()


def test_a_step_has_each_share(is_of, shards, weights):
    """A step of one row a shard has it rounded; of so many rows as you like, within four rows."""
    wanted = shards * np.asarray(weights) / sum(weights)
    counts = is_of.sum(1)
    assert np.abs(counts - wanted).max() < 1
    assert farthest(counts, wanted) < 4


def test_a_shard_has_each_share(is_of, shards, weights):
    wanted = np.asarray(weights) / sum(weights)
    assert max(farthest(is_of[:, shard], wanted) for shard in range(shards)) < 8


def test_only_relations_of_weights_matter(shards, weights):
    rows = [(row, shard) for row in range(50) for shard in range(shards)]
    for scale in (1e-6, 8, 1e9):
        scaled = [weight * scale for weight in weights]
        assert all(
            source_of(*row, shards, scaled) == source_of(*row, shards, weights) for row in rows
        )


@pytest.mark.parametrize("weights,often", [([1e-9, 1.0], 1), ([1.0, 1e-9], 0)])
def test_a_source_of_hardly_any_weight_has_no_row(shards, weights, often):
    assert {source_of(row, s, shards, weights) for row in range(500) for s in range(shards)} == {
        often
    }
