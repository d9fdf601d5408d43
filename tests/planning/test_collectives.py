"""Bytes over links, against counts by hand."""

import pytest

from medmoe_jax.planning.collectives import groups, received

ONE, TWO = [0] * 8, [0] * 4 + [1] * 4
ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"
B = 8 * 24


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ("channel_id=1, replica_groups={{0,2},{1,3}}, x={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={1}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        # A [2, 3, 2] grid, its middle axis moved to the end.
        ("replica_groups=[4,3]<=[2,3,2]T(0,2,1)", [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x={0}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        # The outer and the inner half of an axis of four; devices in another order.
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", [[3, 0], [1, 2]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups={}, x={0}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups(attributes, want):
    assert groups(attributes, 4) == want


@pytest.mark.parametrize(
    ("kind", "slices", "want"),
    [
        # Seven other devices' eighths of the result.
        ("all-gather", ONE, (7 * 24, 0)),
        ("reduce-scatter", ONE, (7 * 24, 0)),
        ("all-reduce", ONE, (2 * 7 * 24, 0)),
        ("all-to-all", ONE, (7 * 24, 0)),
        # The eighth of the device in its place in the other slice; then three quarters of all.
        ("all-gather", TWO, (6 * 24, 24)),
        ("reduce-scatter", TWO, (6 * 24, 24)),
        ("all-reduce", TWO, (2 * 6 * 24, 2 * 24)),
        # Three parts to devices of its slice, four to those of the other.
        ("all-to-all", TWO, (3 * 24, 4 * 24)),
        ("ragged-all-to-all", TWO, (3 * 24, 4 * 24)),
    ],
)
def test_a_group_of_eight(kind, slices, want):
    assert received(kind, B, ALL, slices) == pytest.approx(want)


def test_groups_within_and_across_slices():
    within, across = "replica_groups=[2,4]<=[8]", "replica_groups=[4,2]<=[2,4]T(1,0)"
    assert received("all-gather", B, within, TWO) == (B * 3 / 4, 0)
    assert received("all-gather", B, across, TWO) == (0, B / 2)
    assert received("all-reduce", B, across, TWO) == (0, B)
    assert received("all-gather", B, "replica_groups={{0},{1}}", TWO) == (0, 0)


def test_a_permutation():
    ring = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert received("collective-permute", B, ring, ONE) == (B, 0)
    assert received("collective-permute", B, ring, [0, 0, 1, 1]) == (0, B)
    assert received("collective-permute", B, "source_target_pairs={{0,0},{1,1}}", ONE) == (0, 0)
