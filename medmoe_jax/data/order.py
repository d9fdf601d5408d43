"""The order in which rows come: in every epoch another, by a seed alone."""

import functools

import grain
import numpy as np


def endless(rows: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Rows of random access, epoch after epoch, each epoch in an order of its own.

    Eight bytes a row are kept. Grain's own shuffle keeps none, but searches among 65,536 numbers
    for those of few rows: 2 ms for one of 8 rows, which is what a small data set leaves a shard.

    Args:
      rows: of one epoch.
      seed: of the order, not negative.
    """
    count = len(rows)

    @functools.lru_cache(maxsize=2)  # an epoch, and the next while it is read ahead
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def row(index: int, _: int):
        epoch, place = divmod(index, count)
        return rows[int(order(epoch)[place])]

    return grain.MapDataset.range(count).repeat().map_with_index(row)
