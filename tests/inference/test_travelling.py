"""Few tokens that travel to the weights of a mesh: the same values, and no weight is gathered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import model
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, quantised
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from medmoe_jax.base.seam import Context
from medmoe_jax.inference import steps
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import rules_for, shardings
from medmoe_jax.planning import hlo
from tests import naive
from tests.naive import rel

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices")

CONFIG = DecoderConfig(
    vocab_size=128, d_model=64, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=96,
    max_positions=64, qkv_bias=True,
)  # fmt: skip
MLP = ("mlp.gate", "mlp.up", "mlp.down")
LORA = (
    BankSpec("attention", ("attn.q", "attn.v", "attn.o"), 0, 2, rank=4, alpha=8.0),
    BankSpec("mixture", MLP, 0, 1, experts=8, rank=2, gate="token", top_k=2),
    BankSpec("tongue", ("mlp.down",), 0, 1, experts=4, rank=2, gate="language", forcing="always"),
)
NETWORKS = BankSpec(
    "family", MLP, 1, 2, form="ffn", experts=4, top_k=2, gate="language", renormalise=False
)
BESIDE = NETWORKS.replace(name="beside", form="ffn_beside", gate="token")
INSIDE = NETWORKS.replace(name="inside", form="ffn_lora", rank=2, gate="token")
BANKS = {
    "bare": (),
    "lora": LORA,
    "networks": (*LORA, NETWORKS),
    "beside": (*LORA, BESIDE),
    "inside": (*LORA, INSIDE),
}
MESHES = {
    "fsdp": {"fsdp": 8},
    "sequence": {"data": 2, "fsdp": 2, "sequence": 2},
    "expert": {"fsdp": 2, "expert": 2, "tensor": 2},
}


@functools.cache
def parameters(kind=""):
    specs = (*LORA, NETWORKS, BESIDE, INSIDE)
    base = naive.random_params(CONFIG)
    return quantised.quantise(base, kind) if kind else base, naive.random_banks(specs, CONFIG)


def on_mesh(mesh, specs, dispatch, kind=""):
    """`(config, base, banks)`, the arrays as a run places them."""
    mesh = make_mesh(MESHES[mesh], jax.devices()[:8])
    config = AdaptedConfig(CONFIG, specs, Execution(activations=batch_sharding(mesh, 3)), dispatch)
    base, banks = parameters(kind)
    rules = rules_for(dispatch)
    banks = {spec.name: banks[spec.name] for spec in specs}
    put = jax.device_put
    return (
        config,
        put(base, shardings(base, mesh, rules)),
        put(banks, shardings(banks, mesh, rules)),
    )


def token_rows(rows=8, tokens=2):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, tokens))
    return jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(config, base, banks, ids):
    """Logits, and the statistics of routers."""
    where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    languages = jnp.broadcast_to(jnp.arange(len(ids))[:, None] % 4 - 1, ids.shape)
    context = Context(language_ids_BxT=languages)
    x, _, stats = model.hidden(config, base, banks, ids, jnp.ones_like(ids), where, context=context)
    return logits(config.decoder, decoder.head(base), x), stats


CASES = [
    ("fsdp", "bare", "auto", ""),
    ("fsdp", "networks", "auto", ""),
    ("sequence", "lora", "stacked", "int8"),
    ("expert", "lora", "all_to_all", "nf4"),
    ("expert", "networks", "all_to_all", ""),
    ("expert", "inside", "grouped", ""),
    ("sequence", "beside", "auto", ""),
]


@pytest.mark.parametrize(("mesh", "banks", "dispatch", "kind"), CASES)
def test_values_are_those_of_a_loop_over_experts_on_one_device(mesh, banks, dispatch, kind):
    specs = BANKS[banks]
    own, every = parameters(kind)
    ids = token_rows()
    plain = AdaptedConfig(CONFIG, specs, Execution(), "reference")
    want, want_stats = run(plain, own, every, ids)
    config, base, placed = on_mesh(mesh, specs, dispatch, kind)
    got, stats = run(dataclasses.replace(config, travelling=True), base, placed, ids)
    assert rel(got, want) < 1e-5
    assert jax.tree.structure(stats) == jax.tree.structure(want_stats)
    for ours, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(want_stats), strict=True):
        assert rel(ours, theirs) < 1e-5


def test_the_loop_is_the_equations():
    """That of the banks on sites, in float64."""
    base, banks = parameters()
    specs = LORA[:2]
    ids = token_rows()
    got, _ = run(AdaptedConfig(CONFIG, specs, Execution(), "reference"), base, banks, ids)
    batch, _ = naive.pack(list(np.asarray(ids)), [[i] for i in range(8)], 2)
    assert rel(got, naive.logits(CONFIG, base, batch, naive.adapted(specs, banks))) < 1e-5


def exchanged(config, base, banks, tokens):
    """Bytes that a device exchanges in one pass over so many tokens of 8 rows."""
    program = run.lower(config, base, banks, token_rows(tokens=tokens)).compile()
    return sum(traffic.bytes for traffic in hlo.count(program.as_text()).collectives.values())


@pytest.mark.parametrize("banks", ["bare", "lora", "networks"])
def test_no_weight_is_gathered(banks):
    config, base, placed = on_mesh("fsdp", BANKS[banks], "auto")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((base["layers"], placed)))
    moving = exchanged(config, base, placed, 1)
    resting = exchanged(dataclasses.replace(config, travelling=True), base, placed, 1)
    assert moving > 0.5 * weights
    # Their width in and out, of 8 tokens: a small part of widths of 64 by 96.
    assert resting < 0.45 * moving


@pytest.mark.parametrize(
    ("mesh", "tokens", "travels"), [("fsdp", 16, True), ("fsdp", 17, False), ("one", 1, False)]
)
def test_few_tokens_travel(mesh, tokens, travels):
    """Up to a quarter of D, where there are parts to be gathered."""
    sizes = MESHES.get(mesh, {"data": 4, "tensor": 2})
    execution = Execution(activations=batch_sharding(make_mesh(sizes, jax.devices()[:8]), 3))
    assert steps._placed(AdaptedConfig(CONFIG, (), execution), tokens).travelling is travels
    assert not steps._placed(AdaptedConfig(CONFIG, (), Execution()), tokens).travelling
