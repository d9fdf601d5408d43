"""A whole step with experts spread over the mesh: the step of one device with the plain loop."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import rules_for, shardings, state_shardings
from medmoe_jax.planning.hlo import count
from medmoe_jax.training.step import Objective, TrainState, train_step
from tests import naive
from tests.naive import tree_rel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices"),
]
CONFIG = DecoderConfig(
    vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=16, tied=True
)
MLP = ("mlp.gate", "mlp.up", "mlp.down")
ROUTED = BankSpec("noise", ("attn.q", "attn.o"), 0, 2, experts=4, rank=2, gate="token", top_k=2)
SPECS = (
    ROUTED,
    BankSpec("attention", ("attn.q", "attn.o"), 0, 2, rank=2, dropout=0.2),
    ROUTED.replace(name="whole", sites=MLP, start=1, form="ffn", renormalise=False),
)
MESHES = {
    "grouped": {"data": 2, "fsdp": 2, "tensor": 2},
    "all_to_all": {"fsdp": 2, "expert": 2, "tensor": 2},
    "auto": {"fsdp": 2, "expert": 4},
}
SEQUENCES = {
    "grouped": {"data": 2, "sequence": 2, "tensor": 2},
    "all_to_all": {"fsdp": 2, "expert": 2, "sequence": 2},
}
# After one step the momentum is the gradient.
SGD = optax.sgd(1.0, momentum=0.9)


@functools.cache
def batch():
    """Eight packed rows of unequal fill, the last almost all padding."""
    rows = ((5, 4), (9,), (3, 3, 3), (2, 2), (8,), (4,), (6, 3), (2,))
    return naive.random_batch(CONFIG, rows=rows, length=10)


@functools.cache
def banks():
    """Random banks; whole networks at a gain of one."""
    out = naive.random_banks(SPECS, CONFIG)
    for site in MLP:
        out["whole"][site]["experts"] *= CONFIG.d_model**-0.5
    return out


def placed(dispatch, sizes, devices, specs=SPECS):
    """`(step, state, frozen, batch)`, everything in its shards."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **sizes}, devices)
    execution = Execution(activations=batch_sharding(mesh, 3))
    objective = Objective(AdaptedConfig(CONFIG, specs, execution, dispatch), specs=specs)
    rules = rules_for(dispatch)

    def put(tree):
        return jax.tree.map(jax.device_put, tree, shardings(tree, mesh, rules))

    trainable = put({"banks": {spec.name: banks()[spec.name] for spec in specs}, "base": {}})
    frozen = put({"base": naive.random_params(CONFIG), "banks": {}})
    moments = SGD.init(trainable)
    spread = state_shardings(moments, mesh, rules)
    state = TrainState(jnp.int32(0), trainable, jax.tree.map(jax.device_put, moments, spread))
    step = jax.jit(functools.partial(train_step, objective, SGD))
    return step, state, frozen, jax.device_put(batch(), batch_sharding(mesh))


@functools.cache
def one_device():
    step, *arguments = placed("reference", {}, jax.devices()[:1])
    state, metrics = step(*arguments)
    return jax.device_get((state.optimiser, metrics))


@pytest.mark.parametrize(
    ("dispatch", "sizes"),
    [
        ("grouped", MESHES["grouped"]),
        ("all_to_all", MESHES["all_to_all"]),
        ("auto", MESHES["auto"]),
        ("grouped", SEQUENCES["grouped"]),
        ("all_to_all", SEQUENCES["all_to_all"]),
    ],
)
def test_eight_devices_take_the_step_of_one(dispatch, sizes):
    step, *arguments = placed(dispatch, sizes, jax.devices()[:8])
    state, metrics = step(*arguments)
    want_moments, want_metrics = one_device()
    assert abs(metrics["loss"] / want_metrics["loss"] - 1) < 1e-5
    assert tree_rel(jax.device_get(state.optimiser), want_moments) < 1e-4
    assert tree_rel(metrics["router"], want_metrics["router"]) < 1e-4


def test_experts_and_their_moments_are_spread():
    _, state, _, _ = placed("all_to_all", {"fsdp": 2, "expert": 2, "tensor": 2}, jax.devices()[:8])
    trees = (state.trainable["banks"], state.optimiser[0].trace["banks"])
    for bank in trees:
        low, whole = bank["noise"], bank["whole"]
        for leaf, shape in (
            (low["attn.q"]["lora_a"], (2, 8, 2, 2)),
            (low["attn.q"]["lora_b"], (2, 2, 2, 4)),
            (low["attn.o"]["lora_a"], (2, 4, 2, 2)),
            (low["attn.o"]["lora_b"], (2, 2, 2, 8)),
            (low["attn.q"]["router"]["kernel"], (2, 16, 4)),
            (whole["mlp.up"]["experts"], (1, 2, 8, 8)),
            (whole["mlp.down"]["experts"], (1, 2, 8, 8)),
        ):
            assert leaf.addressable_shards[0].data.shape == shape


@pytest.mark.shipped
def test_the_expert_axis_costs_a_chip_nothing():
    """The base and the batch are cut over it too: no chip holds or computes more than before."""
    programs = []
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "expert": 4}):
        step, *arguments = placed("all_to_all", sizes, jax.devices()[:8], SPECS[:1])
        programs.append(step.lower(*arguments).compile())
    without, spread = (p.memory_analysis().argument_size_in_bytes for p in programs)
    assert spread <= 1.05 * without
    without, spread = (count(p.as_text()).flops for p in programs)
    assert spread <= 1.05 * without
