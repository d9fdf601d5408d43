"""Mesh sizes."""

import jax
import numpy as np
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import AXES, batch_sharding, batch_shards, make_mesh, resolve

ONES = dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({"fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)),
        ({"data": -1, "tensor": 8}, (1, 1, 1, 8)),
        ({"data": 2, "expert": 2, "tensor": 2}, (2, 1, 2, 2)),
    ],
)
def test_resolve(sizes, want):
    assert tuple(resolve({**ONES, **sizes}, 8).values()) == want


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({**ONES, "fdsp": 2}, "axes are data, fsdp, expert, tensor; got"),
        ({"data": 8}, "axes are"),
        ({**ONES, "data": 0, "fsdp": -1}, "sizes are positive"),
        ({**ONES, "data": -2}, "sizes are positive"),
        ({**ONES, "data": -1, "fsdp": -1}, "at most one is -1"),
        ({**ONES, "data": 3, "fsdp": -1}, "does not cover the 8 devices"),
        (ONES, "does not cover the 8 devices"),
        ({**ONES, "data": 16}, "does not cover the 8 devices"),
    ],
)
def test_resolve_refuses(sizes, words):
    with pytest.raises(UserError, match=f"run.mesh: .*{words}"):
        resolve(sizes, 8)


def test_batches_go_over_every_axis_but_tensor():
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 2, "tensor": 2})
    assert mesh.axis_names == AXES
    assert batch_shards(mesh) == 4
    x = jax.device_put(np.arange(8)[:, None], batch_sharding(mesh))
    rows = {s.device.id: s.data.ravel().tolist() for s in x.addressable_shards}
    assert (
        sorted(map(tuple, rows.values()))
        == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [(6, 7)] * 2
    )
    assert batch_sharding(mesh, 3).spec[1:] == (None, None)


def test_some_devices():
    mesh = make_mesh({**ONES, "fsdp": -1}, jax.devices()[:2])
    assert mesh.devices.size == 2 and mesh.shape["fsdp"] == 2
