"""Routing and sites by the Pallas kernels, interpreted: the values and gradients of plain JAX."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.site import adapted_linear
from medmoe_jax.base import quantised
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import ParameterError
from medmoe_jax.kernels import permute, tiles
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.topology import CHIPS
from medmoe_jax.routing import fused, gating
from medmoe_jax.routing.dispatch import Stacked, strategy
from medmoe_jax.routing.dispatchers import LocalDispatcher
from medmoe_jax.routing.routers import balance_loss, z_loss
from medmoe_jax.routing.terms import LoraTerm
from tests.naive import rel, tree_rel

B, T, D, O, E, r = 4, 6, 16, 24, 4, 2
COLUMN = {"attn.q": O, "attn.k": O}
ROW = {"attn.o": O}
SITES = ("attn.q", "attn.o")
TOKEN = BankSpec("token", SITES, 0, 1, experts=E, rank=r, gate="token", balance_loss=0.1)
LANGUAGE = BankSpec("language", SITES, 0, 1, experts=3, rank=r, gate="language",
                    forcing="always", renormalise=False, router_bias=False, z_loss=0.1)  # fmt: skip
PLAIN = BankSpec("plain", (*COLUMN, *ROW), 0, 1, rank=3, learned_scale=True)
SPECS = (TOKEN, LANGUAGE, PLAIN)


def problem(specs=SPECS, seed=0, D=D):
    """`(tree, context)`: everything that is differentiated, and what is known of the tokens."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tree = {"x": draw(B, T, D), "weights": {}, "extra": {}}
    for site in (*COLUMN, *ROW):
        tree["weights"][site] = {"kernel": draw(D, O)}
    tree["weights"]["attn.q"]["bias"] = draw(O)
    for spec in specs:
        mine = tree["extra"].setdefault(spec.name, {})
        for site in spec.sites:
            mine[site] = {"lora_a": draw(D, spec.experts, spec.rank)}
            mine[site]["lora_b"] = draw(spec.experts, spec.rank, O)
            if spec.learned_scale:
                mine[site]["scale"] = draw(spec.experts, spec.rank)
            if spec.routed:
                mine[site]["router"] = {"kernel": draw(D, spec.experts)}
                if spec.router_bias:
                    mine[site]["router"]["bias"] = draw(spec.experts)
    segments = np.ones((B, T), np.int32)
    segments[0, 4:] = segments[2] = 0
    languages = jnp.asarray(rng.integers(-1, 3, (B, T)), jnp.int32)
    return tree, Context(jnp.asarray(segments), jnp.int32(0), languages)


def outputs(run, specs, tree, context):
    """`({site: y}, statistics)` of a column-parallel group and of a row-parallel one."""
    y, stats = {}, {}
    for group, sites in (("attn.qkv", COLUMN), ("attn.out", ROW)):
        weights = {site: tree["weights"][site] for site in sites}
        some, more = adapted_linear(specs, run, group, tree["x"], weights, tree["extra"], context)
        y, stats = {**y, **some}, {**stats, **more}
    return y, stats


class ByKernels(Stacked):
    """What a TPU runs, with the kernels or their twins."""

    def linear(self, x, weights, terms):
        return fused.linear(self.execution, x, weights, terms)

    def decide(self, x, valid, routers):
        return gating.decide_by_kernel(self.execution, x, valid, routers)


def gradient(run, specs=SPECS):
    """`(tree, context) -> (gradients, (outputs, statistics))`, router losses included."""

    def loss(tree, context):
        y, stats = outputs(run, specs, tree, context)
        mix = np.cos(np.arange(B * T * O)).reshape(B, T, O)
        total = sum(jnp.sum(v * mix) for v in y.values())
        for one in stats.values():
            total += 5 * balance_loss(one) + 3 * z_loss(one)
        return total, (y, stats)

    return jax.jit(jax.grad(loss, has_aux=True))


def on(kernels, **sizes):
    """An execution on a mesh of that shape."""
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes}, devices)
    return Execution(kernels=kernels, activations=batch_sharding(mesh, 3))


@functools.cache
def expected():
    return gradient(strategy("stacked"))(*problem())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "sizes"),
    [
        ("interpret", {}),
        # The twins: eight devices that interpret would wait for each other's threads.
        ("xla", {"fsdp": 4, "tensor": 2}),
        ("xla", {"data": 2, "expert": 2, "tensor": 2}),
        ("interpret", {"sequence": 2, "tensor": 2}),
        ("xla", {"fsdp": 2, "sequence": 2, "tensor": 2}),
        ("xla", {"fsdp": 2, "sequence": 4}),  # 4 does not divide the 6 tokens: they stay together
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(value) or "one",
)
def test_values_statistics_and_gradients(kernels, sizes):
    """Gradients of inputs, base weights, banks, Λ and routers; the routers' losses take part."""
    if math.prod(sizes.values()) > jax.device_count():
        pytest.skip("needs eight (simulated) devices")
    execution = on(kernels, **sizes) if sizes else Execution(kernels=kernels)
    grads, (y, stats) = gradient(ByKernels(execution))(*problem())
    want_grads, (want, want_stats) = expected()
    for site in want:
        assert rel(y[site], want[site]) < 1e-5, site
    assert stats["language/attn.q"].forced > 0
    for name, one in want_stats.items():
        for field, value in one._asdict().items():
            size = max(np.abs(value).max(), 1e-6)
            assert np.abs(getattr(stats[name], field) - value).max() < 1e-5 * size, (name, field)
    assert min(np.abs(g).max() for g in jax.tree.leaves(want_grads)) > 1e-2
    assert tree_rel(grads, want_grads) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "sizes"),
    [("interpret", {"fsdp": 2, "tensor": 2}), ("xla", {"sequence": 2, "tensor": 4})],
    ids=lambda value: value if isinstance(value, str) else "x".join(value) or "one",
)
def test_dropout_on_any_mesh(kernels, sizes):
    """The masks are those of one device, whichever tokens and columns a device has."""
    specs = tuple(spec.replace(dropout=0.3) for spec in SPECS)
    tree, context = problem(specs)
    context = context._replace(dropout_key=jax.random.key(3))
    want_grads, (want, _) = gradient(strategy("stacked"), specs)(tree, context)
    assert all(rel(want[site], expected()[1][0][site]) > 0.05 for site in want)
    execution = on(kernels, **sizes) if sizes else Execution(kernels=kernels)
    grads, (y, _) = gradient(ByKernels(execution), specs)(tree, context)
    assert all(rel(y[site], want[site]) < 1e-5 for site in want)
    assert tree_rel(grads, want_grads) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kernels", "sizes"),
    [
        ("int8", "interpret", {}),
        ("nf4", "interpret", {"fsdp": 2, "tensor": 2}),
        ("int8", "xla", {"fsdp": 2, "sequence": 2, "tensor": 2}),
        ("nf4", "xla", {"fsdp": 2, "sequence": 2, "tensor": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(value) or "one",
)
def test_quantised_weights_on_any_mesh(kind, kernels, sizes):
    """As the floats that they stand for, with dropout; each device unpacks its own blocks."""
    specs = tuple(spec.replace(dropout=0.3) for spec in SPECS)
    tree, context = problem(specs, D=128)  # two of nf4's blocks, one a device of `tensor`
    context = context._replace(dropout_key=jax.random.key(3))
    weights = tree.pop("weights")
    packed = {s: {**w, "kernel": quantised.KINDS[kind](w["kernel"])} for s, w in weights.items()}
    floats = {s: {**w, "kernel": w["kernel"].astype(jnp.float32)} for s, w in packed.items()}

    def run(strategy, weights):
        def loss(trained):
            return summed(strategy, specs, {**trained, "weights": weights}, context)

        return jax.jit(jax.grad(loss, has_aux=True))(tree)

    want_grads, want = run(strategy("stacked"), floats)
    _, unpacked = run(strategy("stacked"), weights)
    assert all(rel(unpacked[site], want[site]) > 1e-4 for site in want)
    execution = on(kernels, **sizes) if sizes else Execution(kernels=kernels)
    grads, y = run(ByKernels(execution), packed)
    assert all(rel(y[site], want[site]) < 1e-5 for site in want)
    assert tree_rel(grads, want_grads) < 1e-4


def summed(run, specs, tree, context):
    """A sum over outputs, and these."""
    y, _ = outputs(run, specs, tree, context)
    mix = np.cos(np.arange(B * T * O)).reshape(B, T, O)
    return sum(jnp.sum(v * mix) for v in y.values()), y


def kernels(execution, specs=SPECS, change=None, dispatch="stacked"):
    """`(routers, sites)` by a kernel, of the program as traced."""
    tree, context = problem(specs)
    tree["weights"] = {s: (change or (lambda w: w))(w) for s, w in tree["weights"].items()}
    context = context._replace(dropout_key=jax.random.key(0))
    run = strategy(dispatch, execution)
    text = str(jax.make_jaxpr(lambda t, c: outputs(run, specs, t, c))(tree, context))
    return text.count("name=route\n"), text.count("name=lora_linear\n")


def test_what_runs_by_a_kernel(monkeypatch):
    interpret = Execution(kernels="interpret")
    assert kernels(interpret) == kernels(interpret, dispatch="auto") == (4, 3)
    assert kernels(Execution()) == (0, 0)
    assert kernels(interpret, dispatch="reference") == (0, 0)
    dropping = tuple(spec.replace(dropout=0.1) for spec in SPECS)
    assert kernels(interpret, dropping) == (4, 3)
    # Noise on a router's logits; two rates on a site; a site without banks.
    assert kernels(interpret, (TOKEN.replace(router_noise=1.0), LANGUAGE, PLAIN)) == (2, 3)
    assert kernels(interpret, (TOKEN, LANGUAGE, PLAIN.replace(dropout=0.1))) == (4, 1)
    assert kernels(interpret, (TOKEN, LANGUAGE)) == (4, 2)
    # A base in bytes; one in four bits, whose blocks 16 rows do not fill.
    for kind, sites in (("int8", 3), ("nf4", 0)):
        small = lambda w, of=quantised.KINDS[kind]: {**w, "kernel": of(w["kernel"])}  # noqa: E731
        assert kernels(interpret, change=small) == (4, sites)
    # Blocks that do not fit the kernel's memory.
    monkeypatch.setattr(fused, "SMALLEST", tiles.SMALLEST._replace(blocks=1000))
    assert kernels(interpret) == (4, 0)


def test_the_kernel_is_told_what_a_device_has():
    def of(kind):
        return fused.memory(types.SimpleNamespace(device_kind=kind))

    memories = {name: of(chip.kind) for name, chip in CHIPS.items()}
    assert {name: memory.cores for name, memory in memories.items()} == dict(
        v5e=1, v5p=2, v6e=1, v7x=1
    )
    assert memories["v5e"] == memories["v6e"] and memories["v6e"].limit == 64 * 2**20
    assert memories["v5p"] == of("cpu") == tiles.SMALLEST == (2, 48 * 2**20, 28 * 2**20)
    assert memories["v7x"] == tiles.SMALLEST._replace(cores=1)


def test_sites_are_fused_in_the_order_of_their_weights():
    """So that processes whose hashes differ compile one program."""
    sites = ("attn.v", "attn.k", "attn.q", "mlp.up", "mlp.gate")
    x, w = jnp.ones((B, T, D)), jnp.ones((D, O))
    term = LoraTerm(x, jnp.ones((D, 1, r)), jnp.ones((1, r, O)), None, None, 1.0)
    weights, terms = {site: {"kernel": w} for site in sites}, {site: [term] for site in sites}
    assert tuple(fused.linear(Execution(), x, weights, terms)) == sites


def test_frozen_weights_get_no_gradient_where_sites_are_fused():
    tree, context = problem()
    run = ByKernels(on("xla", fsdp=1))

    def loss(trained, weights):
        y, _ = outputs(run, SPECS, {**trained, "weights": weights}, context)
        return sum(jnp.sum(v**2) for v in y.values())

    weights = tree.pop("weights")
    text = str(jax.make_jaxpr(jax.grad(loss))(tree, weights))
    whole = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(tree, weights))
    made = f"f32[{D},{O}] = dot_general"
    assert made not in text and whole.count(made) == 3


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("cuda", "^kernels: 'cuda' is none of auto, xla, pallas, interpret"),
        ("pallas", "^kernels: 'pallas' needs TPUs, these devices are cpu; use 'auto'"),
    ],
)
def test_kernels_that_cannot_run_are_refused(kernels, message):
    with pytest.raises(ParameterError, match=message):
        Execution(kernels=kernels)


def test_more_experts_than_the_kernels_have_room_for():
    """Plain JAX takes what is beyond, beside a router that the kernel takes."""
    rng = np.random.default_rng(0)
    many = permute.MAX_EXPERTS + 8
    width = 128  # of a whole tile
    x = jnp.asarray(rng.standard_normal((1, T, width)), jnp.float32)
    valid = jnp.arange(T)[None] < T - 1
    routers = [
        gating.Router(jnp.asarray(rng.standard_normal((width, n)), jnp.float32), None, 2, True)
        for n in (many, E)
    ]
    interpret = Execution(kernels="interpret")
    got = jax.jit(lambda x: gating.decide_by_kernel(interpret, x, valid, routers))(x)
    want = jax.jit(lambda x: gating.decide(x, valid, routers))(x)
    for (gates, _), (plain, _) in zip(got, want, strict=True):
        np.testing.assert_array_equal(gates.picks_BxTxK, plain.picks_BxTxK)
        assert rel(gates.weights_BxTxK, plain.weights_BxTxK) < 1e-5
    picks, weights = (v.reshape(T, -1) for v in (want[0][0].picks_BxTxK, want[0][0].weights_BxTxK))
    rows = {}
    for backend in ("interpret", "xla"):

        @jax.jit
        def there_and_back(x, dispatcher=LocalDispatcher(backend)):
            rows, journey = dispatcher.dispatch(x[0], picks, weights, many)
            return rows, dispatcher.combine(journey, rows.x_MxD)

        rows[backend], back = there_and_back(x)
        assert rel(back[:-1], 2 * x[0, :-1]) < 1e-6
    np.testing.assert_array_equal(rows["interpret"].sizes_E, rows["xla"].sizes_E)
    assert int(jnp.sum(rows["xla"].sizes_E)) == 2 * (T - 1)
