"""The order of rows, epoch after epoch."""

from collections import Counter

import grain
import pytest
from scipy.stats import chisquare

from medmoe_jax.data.order import endless


def epochs(count, seed, number):
    """Rows of so many epochs, each a tuple."""
    rows = endless(grain.MapDataset.source([10 * i for i in range(count)]), seed)
    return [tuple(rows[e * count + i] for i in range(count)) for e in range(number)]


@pytest.mark.parametrize("count", [1, 2, 61, 3000])
def test_every_epoch_has_every_row_once(count):
    found = epochs(count, 3, 4)
    assert all(sorted(epoch) == [10 * i for i in range(count)] for epoch in found)
    assert found == epochs(count, 3, 4)
    if count > 2:
        assert len({*found, *epochs(count, 4, 4)}) == 8


def test_any_place_can_be_read_at_any_time():
    rows = endless(grain.MapDataset.source(list("abcdefg")), 5)
    wanted = [rows[i] for i in range(50)]
    assert [rows[i] for i in (49, 0, 8, 30, 7, 48)] == [wanted[i] for i in (49, 0, 8, 30, 7, 48)]
    assert [*rows[10:20]] == wanted[10:20]


def test_every_order_is_as_likely():
    found = Counter(epochs(4, 0, 2400))
    assert len(found) == 24 and chisquare([*found.values()]).pvalue > 1e-3
