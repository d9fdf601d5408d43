"""Bytes over links and between slices, against counts by hand."""

import pytest

from medmoe_jax.planning.collectives import between_slices, groups, within_slice

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
    ("kind", "want"),
    [
        # Seven other devices' eighths; an all-reduce is a reduce-scatter and an all-gather.
        ("all-gather", 7 * 24),
        ("reduce-scatter", 7 * 24),
        ("all-to-all", 7 * 24),
        ("ragged-all-to-all", 7 * 24),
        ("all-reduce", 2 * 7 * 24),
    ],
)
def test_a_group_of_eight(kind, want):
    assert within_slice(kind, B, "replica_groups={{0,1,2,3,4,5,6,7}}", 8) == want
    assert within_slice(kind, B, "replica_groups=[8,1]<=[8]", 8) == 0
    assert within_slice(kind, B, "replica_groups={}", 8) == want


def test_a_permutation():
    assert within_slice("collective-permute", B, "source_target_pairs={{0,1},{1,0}}", 8) == B
    assert within_slice("collective-permute", B, "source_target_pairs={{0,0},{1,1}}", 8) == 0


@pytest.mark.parametrize(
    ("opcode", "name", "kind"),
    [
        ("recv", "ALL_REDUCE", "all-reduce"),
        ("send", "ALL_REDUCE", ""),
        ("recv", "ALL_GATHER", "all-gather"),
        ("send", "REDUCE_SCATTER", "reduce-scatter"),
        ("recv", "REDUCE_SCATTER", ""),
    ],
)
def test_between_slices(opcode, name, kind):
    named = f'channel_id=1, frontend_attributes={{_xla_megascale_transfer_type="{name}"}}'
    assert between_slices(opcode, named) == kind
    assert between_slices(opcode, "channel_id=1, is_host_transfer=true") == ""
