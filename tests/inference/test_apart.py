"""Layers that lie apart: the same answers, on the same memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.adapters import model
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.apart import Apart
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.quantised import KINDS
from medmoe_jax.inference import apart, decoding, steps
from medmoe_jax.inference.apart import layers_apart
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.forward import Weights
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from tests import naive

CONFIG = DecoderConfig(
    vocab_size=31, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=32,
    max_positions=64, windows=(7, 0, 5), ropes=("global", "local", "none"),
    local_rope_theta=100.0,
)  # fmt: skip
SPECS = (
    BankSpec("all", ("attn.q", "mlp.up"), 0, 3, experts=4, rank=2, gate="token", top_k=2),
    BankSpec("late", ("attn.v",), 1, 3, rank=2, alpha=4.0),
    BankSpec("skills", ("mlp.gate",), 0, 3, experts=3, rank=2, gate="skill"),
    BankSpec("tongue", ("mlp.down",), 0, 1, experts=3, rank=2, gate="language", forcing="always"),
)


@functools.cache
def parameters():
    """Base, banks, and a leaf of the base in every layer that was trained."""
    base = naive.random_params(CONFIG)
    kernel = base["layers"]["attn"]["o"]["kernel"]
    return base, naive.random_banks(SPECS, CONFIG), {"layers": {"attn": {"o": {"kernel": -kernel}}}}


def make_engine(devices=1, trained=True):
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    config = AdaptedConfig(CONFIG, SPECS, Execution(activations=batch_sharding(mesh, 3)))
    base, banks, leaves = parameters()
    return Engine(config, base, banks, leaves if trained else {}, mesh, 2)


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 31, n).tolist() for n in (3, 9, 20)]


@pytest.mark.parametrize("trained", [False, True])
def test_layers_apart_write_the_same(trained, monkeypatch):
    """Windows, rotations, banks of some layers, languages and trained leaves included."""
    want = make_engine(trained=trained).generate(prompts(), 12, (), languages=[2, -1, 0])
    other = make_engine(trained=not trained).generate(prompts(), 12, (), languages=[2, -1, 0])
    assert want != other
    monkeypatch.setattr(apart, "_CACHED", 0)
    seen = []

    def watched(config, most, alternatives, weights, *rest):
        seen.append(weights)
        return program(config, most, alternatives, weights, *rest)

    program = steps.go_on
    monkeypatch.setattr(decoding.steps, "go_on", watched)
    engine = make_engine(trained=trained)
    assert engine.generate(prompts(), 12, (), languages=[2, -1, 0]) == want
    for weights in seen:
        assert [len(weights.base["layers"]), len(weights.banks["late"])] == [3, 2]
    assert seen and type(seen[0].base["layers"]) is type(seen[0].banks["all"]) is Apart


def test_hidden_states_and_statistics_are_those_of_the_stacks():
    base, banks, _ = parameters()
    config = AdaptedConfig(CONFIG, SPECS)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 6)), jnp.int32)
    one, at = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(6), (2, 6))
    cut = Weights(
        {**base, "layers": apart._cut(base["layers"], 3)},
        {spec.name: apart._cut(banks[spec.name], spec.layers) for spec in SPECS},
        {},
    )
    want, _, stats = model.hidden(config, base, banks, ids, one, at)
    got, _, others = model.hidden(config, cut.base, cut.banks, ids, one, at)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(stats) == jax.tree.structure(others) and jax.tree.leaves(stats)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def large(dtype=jnp.float32, width=1024, d_ff=2048):
    """A decoder of two layers with kernels of several MiB."""
    config = DecoderConfig(
        vocab_size=8, d_model=width, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=d_ff
    )
    base = decoder.init(config, jax.random.key(0), dtype)
    return AdaptedConfig(config, (), Execution(dtype=dtype)), base


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "numpy"])
def test_nothing_is_there_twice(kind, monkeypatch):
    config, base = large(jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    if kind == "numpy":
        base = jax.tree.map(np.asarray, base)
    whole = Weights(base, {}, {})
    assert layers_apart(config, whole) is whole  # at most 25 MiB: the cache may hold a layer
    monkeypatch.setattr(apart, "_CACHED", 2**20)
    cut = layers_apart(config, whole)
    assert len(cut.base["layers"]) == 2
    for i, layer in enumerate(cut.base["layers"]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
            stack = functools.reduce(lambda node, key: node[key.key], path, base["layers"])
            start = np.asarray(stack)[i].ctypes.data
            assert leaf.unsafe_buffer_pointer() == start, path
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(stack)[i])
    assert whole.base["layers"] is base["layers"]


def test_stacks_stay_where_a_layer_of_them_would_be_copied(monkeypatch):
    """No array begins at bytes that 64 does not divide; int4 is packed otherwise in NumPy."""
    monkeypatch.setattr(apart, "_CACHED", 2**20)
    config, base = large(width=1021, d_ff=2047)
    whole = Weights(base, {}, {})
    assert layers_apart(config, whole) is whole
    config, base = large()
    int4 = jax.tree.map(lambda leaf: leaf.astype(jnp.int4), base["layers"]["mlp"])
    whole = Weights({**base, "layers": {**base["layers"], "mlp": int4}}, {}, {})
    assert layers_apart(config, whole) is whole


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_quantised_kernels_lie_apart_too(kind):
    kernel = jnp.asarray(np.random.default_rng(5).standard_normal((3, 16, 64)), jnp.float32)
    cut = apart._cut({"kernel": KINDS[kind](kernel)}, 3)
    for i in range(3):
        want = jax.tree.map(lambda leaf, i=i: leaf[i], KINDS[kind](kernel))
        jax.tree.map(np.testing.assert_array_equal, cut[i]["kernel"], want)


@pytest.mark.parametrize("told", [False, True])
def test_several_processors_keep_their_stacks(told, monkeypatch):
    """Also where nothing but the arrays tells of them."""
    monkeypatch.setattr(apart, "_CACHED", 0)
    engine = make_engine(2)
    spread = jax.device_put(engine.base, NamedSharding(engine.mesh, PartitionSpec()))
    whole = Weights(spread, engine.banks, {})
    config = engine.config if told else AdaptedConfig(CONFIG, SPECS)
    assert layers_apart(config, whole) is whole


def test_small_layers_lie_apart_where_all_are_unrolled():
    base, banks, _ = parameters()
    whole = Weights(base, banks, {})
    for unroll, kind in ((1, dict), (2, dict), (3, Apart)):
        config = AdaptedConfig(CONFIG, SPECS, Execution(unroll=unroll))
        assert type(layers_apart(config, whole).base["layers"]) is kind
