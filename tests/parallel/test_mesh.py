"""Mesh sizes."""

import jax
import numpy as np
import pytest

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel import topology
from medmoe_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    make_mesh,
    resolve,
    slice_of,
)

ONES = dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1, 1)),
        ({"data": -1, "tensor": 8}, (1, 1, 1, 1, 8)),
        ({"data": 2, "expert": 2, "tensor": 2}, (2, 1, 2, 1, 2)),
        ({"sequence": 4, "tensor": 2}, (1, 1, 1, 4, 2)),
    ],
)
def test_resolve(sizes, want):
    """Axes that are not named have size 1."""
    for given in (sizes, {**ONES, **sizes}):
        assert tuple(resolve(given, 8).values()) == want


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({**ONES, "fdsp": 2}, "axes are data, fsdp, expert, sequence, tensor; got"),
        ({**ONES, "data": 0, "fsdp": -1}, "sizes are positive"),
        ({**ONES, "data": -2}, "sizes are positive"),
        ({**ONES, "data": -1, "fsdp": -1}, "at most one is -1"),
        ({**ONES, "data": 3, "fsdp": -1}, "does not cover the 8 devices"),
        (ONES, "does not cover the 8 devices"),
        ({**ONES, "data": 16}, "does not cover the 8 devices"),
    ],
)
def test_resolve_refuses(sizes, words):
    with pytest.raises(ParameterError, match=f"^mesh: .*{words}"):
        resolve(sizes, 8)


def test_rows_and_their_tokens_go_over_every_axis_but_tensor():
    whole = make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    x = jax.device_put(np.arange(8).reshape(2, 4), batch_sharding(whole))
    parts = sorted(s.data.ravel().tolist() for s in x.addressable_shards)
    assert parts == [[n, n + 1] for n in (0, 2, 4, 6) for _ in range(2)]
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 2, "tensor": 2})
    assert mesh.axis_names == AXES
    assert batch_shards(mesh) == 4
    x = jax.device_put(np.arange(8)[:, None], batch_sharding(mesh))
    rows = {s.device.id: s.data.ravel().tolist() for s in x.addressable_shards}
    assert (
        sorted(map(tuple, rows.values()))
        == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [(6, 7)] * 2
    )
    assert batch_sharding(mesh, 3).spec[1:] == ("sequence", None)


def test_some_devices():
    mesh = make_mesh({**ONES, "fsdp": -1}, jax.devices()[:2])
    assert mesh.devices.size == 2 and mesh.shape["fsdp"] == 2


def test_an_axis_that_does_not_divide_the_heads_is_refused():
    decoder = DecoderConfig(
        vocab_size=32, d_model=24, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=4, d_ff=32
    )

    def on(**sizes):
        mesh = make_mesh({**ONES, **sizes})
        return AdaptedConfig(decoder, execution=Execution(activations=batch_sharding(mesh, 3)))

    on(fsdp=4, tensor=2)
    with pytest.raises(ParameterError, match=r"^mesh\.tensor: 4 does not divide the 6 attention"):
        on(fsdp=2, tensor=4)


@pytest.mark.aot
def test_only_the_axis_data_leaves_a_slice():
    slices = topology.describe("2xv5e:2x2").devices
    mesh = make_mesh({**ONES, "data": 4, "fsdp": -1}, slices)
    assert dict(mesh.shape) == {**ONES, "data": 4, "fsdp": 2}
    of = np.vectorize(slice_of)(mesh.devices)
    assert (of == np.array([0, 0, 1, 1])[:, None, None, None, None]).all()
    with pytest.raises(ParameterError, match=r"^mesh\.data: 1 is no multiple of the 2 slices"):
        make_mesh({**ONES, "fsdp": -1}, slices)


@pytest.mark.aot
@pytest.mark.parametrize("sizes", [{"fsdp": 8, "tensor": 2}, {"data": 2, "fsdp": 4, "tensor": 2}])
def test_axes_that_share_a_row_of_chips(sizes):
    """A 4x4 slice has no row of 8 or 2 chips: axes split its rows."""
    mesh = make_mesh({**ONES, **sizes}, topology.describe("v6e:4x4").devices)
    assert {axis: mesh.shape[axis] for axis in sizes} == sizes
    assert len(set(mesh.devices.flat)) == 16
