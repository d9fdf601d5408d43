"""Which rows a process reads, and where they come to lie."""

import jax
import numpy as np
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.training import placement
from medmoe_jax.training.placement import Placement, abstract_batch


def stream_batch(shard_ids, rows, shards, length=3):
    """What the stream gives a process: row i of the global batch names shard i mod S and i."""
    own = [i for i in range(rows) if i % shards in shard_ids]
    values = np.array([[100 * (i % shards) + i] * length for i in own], np.int32)
    return {"tokens": values, "loss_mask": -values}


def in_blocks(rows, shards):
    """The whole batch shard by shard, each shard's rows in their order."""
    order = sorted(range(rows), key=lambda i: (i % shards, i))
    return [100 * (i % shards) + i for i in order]


@pytest.mark.parametrize("shards", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}, {"sequence": 8}]
)
def test_rows_lie_shard_by_shard(sizes, shards):
    mesh = make_mesh(sizes)
    put = Placement(mesh, 16, shards)
    assert put.shard_ids == tuple(range(shards))
    batch = put(stream_batch(put.shard_ids, 16, shards, length=8))
    like = abstract_batch(mesh, 16, 8, languages=False)
    like = {name: like[name] for name in batch}
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), like
    )
    for sign, name in ((1, "tokens"), (-1, "loss_mask")):
        wanted = np.repeat(in_blocks(16, shards), 8).reshape(16, 8)
        np.testing.assert_array_equal(batch[name], sign * wanted)


class Held:
    """The sharding of a process that holds these slices of the rows."""

    def __init__(self, *spans):
        self.spans = [slice(*span) for span in spans]

    def addressable_devices_indices_map(self, shape):
        return {number: (span,) for number, span in enumerate(self.spans)}


@pytest.mark.parametrize(
    "spans, shard_ids",
    [
        ([(0, 4), (4, 8)], (0, 1)),
        ([(8, 12), (12, 16)], (2, 3)),
        ([(0, 2), (0, 2)], (0,)),  # half of a shard's rows, on two devices
        ([(2, 6)], (0, 1)),
        ([(0, 2), (12, 14)], (0, 3)),  # a mesh whose order is not that of the processes
        ([(None, None)], (0, 1, 2, 3)),
    ],
)
def test_a_process_reads_the_shards_it_holds(monkeypatch, spans, shard_ids):
    held = Held(*spans)
    monkeypatch.setattr(placement, "batch_sharding", lambda mesh, rank=2: held)
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, s, of: [of((span, slice(None))) for span in s.spans],
    )
    put = Placement(None, 16, 4)
    assert put.shard_ids == shard_ids
    parts = put(stream_batch(shard_ids, 16, 4))["tokens"]
    for span, part in zip(held.spans, parts, strict=True):
        assert part[:, 0].tolist() == in_blocks(16, 4)[span]


@pytest.mark.parametrize("shards", [0, 3, 32])
def test_shards_that_do_not_divide(shards):
    with pytest.raises(UserError, match=f"shards: {shards} does not divide a global batch of 16"):
        Placement(make_mesh({"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}), 16, shards)
