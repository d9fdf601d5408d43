"""TPU slices that are not there: names, chips, and a program compiled for them."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import mesh as meshes
from medmoe_jax.parallel import slices, topology


def test_what_cannot_be_described():
    with pytest.raises(UserError, match="slice 'v5e:3x3' is not known; the closest is v5e:2x4"):
        topology.describe("v5e:3x3")
    with pytest.raises(UserError, match="no figures of v4 are known, only of v5e, v5p"):
        topology.describe("v4-8")


def test_a_libtpu_that_does_not_know_the_chip_is_named(monkeypatch):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU7x")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: "0.0.21")
    with pytest.raises(UserError, match=r"^v7x:2x2x1 cannot .* libtpu 0.0.21 does not know it"):
        topology.describe("tpu7x-8")


def test_a_device_of_v7x_is_half_a_chip():
    """Doubled, its figures are the published ones of the chip."""
    half = topology.CHIPS["v7x"]
    assert topology.Topology("v7x:2x2x1", half, (0,) * 8).chips == 4
    published = (192, 2307, 7380, 1200, 100 / 8)  # GiB, TFLOP/s, GB/s, GB/s, 100 Gbit/s
    assert tuple(2 * figure for figure in half[-6:] if figure != half.limit_gib) == published


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'medmoe_jax\[aot\]'"):
        topology.describe("v5e:2x2")


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", [f"{chip}:{one}" for chip in topology.CHIPS for one in slices.layouts(chip)[:9]]
)
def test_every_slice_that_is_offered_exists(name):
    slice_ = topology.describe(name)
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    assert len(slice_.devices) == math.prod(sizes) * slice_.chip.devices
    assert slice_.chips == math.prod(sizes)
    assert {device.device_kind for device in slice_.devices} == {slice_.chip.kind}
    assert topology.CHIPS[name.partition(":")[0]] is slice_.chip


@pytest.mark.aot
def test_several_slices():
    two = topology.describe("2xv5litepod-4")
    assert [device.slice_index for device in two.devices] == [0] * 4 + [1] * 4
    assert two.chip is topology.CHIPS["v5e"] and two.name == "2xv5e:2x2"


@pytest.mark.aot
@pytest.mark.parametrize("chip", topology.CHIPS)
def test_hbm_of_the_table_is_where_the_compiler_says_no(chip):
    slice_ = topology.describe(f"{chip}:{slices.layouts(chip)[0]}")

    def peak(gib):
        rows = int(gib * 2**30) // 4096
        # One buffer in, one out: half the memory each.
        x = jax.ShapeDtypeStruct((rows // 2, 1024), jnp.float32)
        return topology.compile_for(slice_, lambda x: jnp.sin(x), x)

    memory = peak(slice_.chip.hbm_gib * 0.9).memory_analysis()
    assert memory.argument_size_in_bytes > slice_.chip.hbm_gib * 0.44 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        peak(slice_.chip.hbm_gib * 1.1)
    (limit,) = re.findall(r"exceeds available HBM \(([\d.]+)G\)", str(refused.value))
    # The compiler's versions differ by 0.01.
    assert float(limit) == pytest.approx(slice_.chip.limit_gib, abs=0.02)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "v7x:2x2x1"])
def test_a_sharded_program_compiles_with_its_collectives(name):
    slice_ = topology.describe(name)
    mesh = meshes.make_mesh({"data": 1, "fsdp": -1, "expert": 2, "tensor": 1}, slice_.devices)
    rows = jax.ShapeDtypeStruct(
        (64, 256), jnp.bfloat16, sharding=meshes.batch_sharding(mesh, rank=2)
    )
    compiled = topology.compile_for(slice_, lambda x: jnp.sum(x * x), rows)
    assert "all-reduce" in compiled.as_text()
    assert compiled.memory_analysis().argument_size_in_bytes == 64 * 256 * 2 // 8
