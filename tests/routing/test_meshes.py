"""The strategies that move tokens, on meshes of eight devices: the values and gradients of one."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.parallel import topology as topologies
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.routing.dispatch import strategy
from medmoe_jax.routing.terms import LoraTerm
from tests.naive import rel
from tests.routing import loads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices"),
]

TOP_K = 2
AXES = ("data", "fsdp", "expert", "tensor", "sequence")
# Each axis alone, and each two axes cut together.
SHAPES = [
    *((1, 1, 4, 2, 1), (2, 2, 1, 2, 1), (1, 2, 1, 2, 2)),
    *((8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 8, 1, 1), (1, 1, 1, 8, 1)),
    *((2, 2, 2, 1, 1), (1, 2, 2, 2, 1), (2, 1, 2, 1, 2), (1, 1, 2, 2, 2)),
]
# Without an expert axis `all_to_all` is `grouped`.
CASES = [
    pytest.param(
        "all_to_all" if shape[2] > 1 else "grouped",
        shape,
        id="x".join(map(str, shape)),
    )
    for shape in SHAPES
]


def test_each_two_axes_are_cut_together_somewhere():
    cut = [{axis for axis, size in zip(AXES, s, strict=True) if size > 1} for s in SHAPES]
    for pair in itertools.combinations(AXES, 2):
        assert any(axes.issuperset(pair) for axes in cut), pair


def on_mesh(name, shape):
    """The strategy on a mesh of that shape."""
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[:8])
    return strategy(name, Execution(activations=batch_sharding(mesh, 3)))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_eight_devices_agree_with_one(name, shape):
    run = jax.jit(loads.loss_of(on_mesh(name, shape), TOP_K))
    for load in ("uneven", "one_takes_all", "padding"):
        tree, valid = loads.arrays(load)
        grads, out = run(tree, valid)
        want_grads, want = loads.compiled("reference", TOP_K)(tree, valid)
        for key in want:
            assert rel(out[key], want[key]) < 1e-5, (load, key)
        for key in want_grads:
            assert rel(grads[key], want_grads[key]) < 1e-4, (load, key)


def test_every_pick_travels_to_few_experts():
    """Two experts a device and four picks a token: a parcel holds at most two rows a token."""
    run = jax.jit(loads.loss_of(on_mesh("all_to_all", (2, 1, 4, 1, 1)), 4))
    tree, valid = loads.arrays("one_takes_all")
    grads, out = run(tree, valid)
    want_grads, want = loads.compiled("reference", 4)(tree, valid)
    assert max(rel(out[key], want[key]) for key in want) < 1e-5
    assert max(rel(grads[key], want_grads[key]) for key in want_grads) < 1e-4


def test_an_axis_that_does_not_divide_the_experts_is_refused():
    run = on_mesh("all_to_all", (1, 2, 4, 1, 1))
    run.check("bank 'noise'", 8)
    said = "^dispatch: the 4 devices .* expert do not divide the 6 experts of bank 'noise'"
    with pytest.raises(ParameterError, match=said):
        run.check("bank 'noise'", 6)
    on_mesh("grouped", (1, 2, 4, 1, 1)).check("bank 'noise'", 6)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_tokens_travel_by_ragged_exchange_on_tpu(name):
    """Both directions of both mixtures, forward and backward, with the kernels beside them."""
    topology = topologies.describe(name)
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}, topology.devices)
    run = strategy("all_to_all", Execution(activations=batch_sharding(mesh, 3)))
    B, T, E, D, O = 8, 64, 8, 256, 512

    def loss(tree, picks):
        gates = Gates(None, picks, tree["weights"])
        term = LoraTerm(tree["x"], tree["a"], tree["b"], gates, None, 1.0)
        y = run.lora({"mlp.up": [term]})["mlp.up"]
        experts = {site: tree[site] for site in ("gate", "up", "down")}
        return jnp.sum(y) + jnp.sum(run.ffn(tree["x"], gates, experts, jax.nn.silu))

    def shape(dims, axes, dtype=jnp.float32):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    rows = (("data", "fsdp", "expert"),)
    tree = {
        "x": shape((B, T, D), rows),
        "weights": shape((B, T, TOP_K), rows),
        "a": shape((D, E, 16), (None, "expert")),
        "b": shape((E, 16, O), ("expert", None, "tensor")),
        "gate": shape((E, D, O), ("expert", None, "tensor")),
        "up": shape((E, D, O), ("expert", None, "tensor")),
        "down": shape((E, O, D), ("expert", "tensor")),
    }
    picks = shape((B, T, TOP_K), rows, jnp.int32)
    text = topologies.compile_for(topology, jax.grad(loss), tree, picks).as_text()
    assert len(re.findall(r" ragged-all-to-all(-start)?\(", text)) >= 6
    assert "tpu_custom_call" in text
