"""Mixtures of feed-forward networks against float64 loops, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig, hidden
from medmoe_jax.adapters.seam import AdaptedSeam
from medmoe_jax.base import decoder
from medmoe_jax.base.seam import Context, activation
from medmoe_jax.errors import UserError
from medmoe_jax.routing.dispatch import STRATEGIES, strategy
from tests.naive import TINY, check_gradient, f64, random_params, rel

B, T, E, K = 2, 3, 4, 2
SITES = ("mlp.gate", "mlp.up", "mlp.down")
WHOLE = BankSpec(
    "family", SITES, 1, 3, form="ffn", experts=E, top_k=K, gate="language", renormalise=False,
    router_bias=False,
)  # fmt: skip
NEXT_TO = WHOLE.replace(form="ffn_beside")
INSIDE = WHOLE.replace(form="ffn_lora", rank=2, alpha=3.0, gate="token", learned_scale=True)
BESIDE = BankSpec("lora", ("mlp.up", "mlp.down"), 0, 3, rank=2)


def random_bank(spec, seed):
    """Large values everywhere, so that every term matters."""
    rng = np.random.default_rng(seed)

    def leaf(struct):
        return jnp.asarray(rng.standard_normal(struct.shape) * 0.6, jnp.float32)

    return jax.tree.map(leaf, bank_lib.abstract(spec, TINY))


def silu(x):
    return x / (1 + np.exp(-x))


def weights_of(x, router, forced=None):
    """Top-2 of a softmax, not renormalised; the forced expert replaces the weaker pick."""
    z = x @ router["kernel"] + router.get("bias", 0.0)
    p = np.exp(z - z.max())
    p /= p.sum()
    picks = list(np.argsort(-z)[:K])
    if forced is not None and forced >= 0 and forced not in picks:
        picks[-1] = forced
    return {e: p[e] for e in picks}


def naive(spec, x, p, w, beside=None, forced=None):
    """`Σ_k w_k FFN_k(x)`, one token and one expert at a time; the base's as well, if beside."""
    y = np.zeros(x.shape)

    def shared(site, v):
        out = v @ w[site]["kernel"]
        if beside is not None and site in beside:
            out = out + BESIDE.s * (v @ beside[site]["lora_a"][:, 0]) @ beside[site]["lora_b"][0]
        return out

    def product(site, v, e):
        if spec.whole:
            return v @ p[site]["experts"][e]
        a, lora_b = p[site]["lora_a"][:, e], p[site]["lora_b"][e]
        return shared(site, v) + spec.s * ((v @ a) * p[site]["scale"][e]) @ lora_b

    def network(v, product):
        return product("mlp.down", silu(product("mlp.gate", v)) * product("mlp.up", v))

    for b, t in np.ndindex(x.shape[:2]):
        token = x[b, t]
        chosen = weights_of(token, p["mlp"]["router"], forced and forced[b][t])
        for e, weight in chosen.items():
            y[b, t] += weight * network(token, functools.partial(product, e=e))
        if spec.form == "ffn_beside":
            y[b, t] += network(token, shared)
    return y


def layer_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    layer = layer_of(random_params(TINY)["layers"]["mlp"], 1)
    return {
        "x": jnp.asarray(rng.standard_normal((B, T, TINY.d_model)), jnp.float32),
        "w": {f"mlp.{name}": leaf for name, leaf in layer.items()},
        "bank": layer_of({s.name: random_bank(s, 7) for s in (WHOLE,)}["family"], 0),
        "inside": layer_of(random_bank(INSIDE, 8), 0),
        "beside": layer_of(random_bank(BESIDE, 9), 1),
    }


def run(name, spec, tree, context=Context()):
    params = {spec.name: tree["bank"], "lora": tree.get("beside", {})}
    on_sites = (BESIDE,) if "beside" in tree else ()
    seam = AdaptedSeam(on_sites, spec, strategy(name), activation(TINY))
    context = context._replace(segment_ids_BxT=jnp.ones((B, T), jnp.int32), layer=jnp.int32(1))
    return seam.mlp(tree["x"], tree["w"], params, context)


CASES = {
    "ffn": (WHOLE, "bank", False),
    "ffn_lora": (INSIDE, "inside", True),
    "ffn_beside": (NEXT_TO, "bank", True),
}


RUNS = [(name, case) for case in ("ffn", "ffn_lora") for name in STRATEGIES]


@pytest.mark.parametrize(("name", "case"), [*RUNS, ("stacked", "ffn_beside")])
def test_value_and_gradient(name, case, setting):
    spec, bank, with_lora = CASES[case]
    tree = {"x": setting["x"], "w": setting["w"], "bank": setting[bank]}
    if with_lora:
        tree["beside"] = setting["beside"]
    mix = np.random.default_rng(1).standard_normal((B, T, TINY.d_model))

    def loss(tree):
        y, stats = run(name, spec, tree)
        return jnp.sum(y * mix), (y, stats)

    def want(tree):
        return naive(spec, tree["x"], tree["bank"], tree["w"], tree.get("beside"))

    grads, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(tree)
    assert rel(y, want(f64(tree))) < 1e-5
    assert stats["family/mlp"].use_E.sum() == B * T * K
    if spec.form == "ffn":  # the mixture stands in the place of the base's network
        assert not any(np.any(g) for g in jax.tree.leaves(grads["w"]))
    check_gradient(lambda t: (want(t) * mix).sum(), tree, grads, np.random.default_rng(2))


@pytest.mark.parametrize("forcing", ["off", "train", "always"])
@pytest.mark.parametrize("training", [True, False])
def test_hybrid_routing(forcing, training, setting):
    """The language's expert is among the picks in training, or always, or never by force."""
    tree = {"x": setting["x"], "w": setting["w"], "bank": setting["bank"]}
    ids = [[0, 1, -1], [3, 2, 0]]
    context = Context(language_ids_BxT=jnp.asarray(ids, jnp.int32), training=training)
    spec = WHOLE.replace(forcing=forcing)
    y, stats = run("reference", spec, tree, context)
    forced = ids if forcing == "always" or (forcing == "train" and training) else None
    assert rel(y, naive(spec, *(f64(tree[k]) for k in ("x", "bank", "w")), forced=forced)) < 1e-5
    free = naive(spec, *(f64(tree[k]) for k in ("x", "bank", "w")))
    assert (rel(y, free) < 1e-5) == (forced is None)
    assert (stats["family/mlp"].forced > 0) == (forced is not None)


def test_upcycling_keeps_the_function_when_weights_sum_to_one():
    base = random_params(TINY)
    key = jax.random.key(0)
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    ids = jnp.ones_like(tokens), jnp.tile(jnp.arange(3, dtype=jnp.int32)[None], (2, 1))
    want, _, _ = decoder.hidden(TINY, base, tokens, *ids)
    for renormalise in (True, False):
        spec = WHOLE.replace(renormalise=renormalise)
        roster, banks = lifecycle.add({}, {}, spec, TINY, key, base)
        config = AdaptedConfig(TINY, lifecycle.active_banks(roster))
        got, _, aux = hidden(config, base, banks, tokens, *ids)
        assert (rel(got, want) < 1e-5) == renormalise
        assert aux[-1]["family/mlp"].tokens.shape == (2,)
    copies = banks["family"]["mlp.up"]["experts"]
    assert copies.shape == (2, E, TINY.d_model, TINY.d_ff)
    assert np.array_equal(copies[1, 3], base["layers"]["mlp"]["up"]["kernel"][2])


def test_experts_beside_the_network_keep_the_function():
    """Whatever the weights; and the first step can move all that their last product needs."""
    base = random_params(TINY)
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    ids = jnp.ones_like(tokens), jnp.tile(jnp.arange(3, dtype=jnp.int32)[None], (2, 1))
    want, _, _ = decoder.hidden(TINY, base, tokens, *ids)
    roster, banks = lifecycle.add({}, {}, NEXT_TO, TINY, jax.random.key(0), base)
    config = AdaptedConfig(TINY, lifecycle.active_banks(roster))

    def loss(banks):
        got, _, _ = hidden(config, base, banks, tokens, *ids)
        return jnp.sum(got**2), got

    gradient, got = jax.grad(loss, has_aux=True)(banks)
    assert rel(got, want) < 1e-5
    mixture = banks["family"]
    assert np.array_equal(
        mixture["mlp.gate"]["experts"][0, 2], base["layers"]["mlp"]["gate"]["kernel"][1]
    )
    assert not mixture["mlp.down"]["experts"].any()
    assert np.abs(gradient["family"]["mlp.down"]["experts"]).max() > 0


def test_bad_banks():
    with pytest.raises(UserError, match=r"bank 'family'.*router"):
        WHOLE.replace(gate="always")
    with pytest.raises(UserError, match=r"bank 'family'.*sites"):
        WHOLE.replace(sites=("mlp.up",))
    with pytest.raises(UserError, match="form: 'dense' is none of"):
        WHOLE.replace(form="dense")
    with pytest.raises(UserError, match=r"'family'.*'lora' sits on mlp sites too"):
        AdaptedConfig(TINY, (BESIDE, WHOLE))
    with pytest.raises(UserError, match="experts have no biases, and this base's network has"):
        AdaptedConfig(TINY.replace(mlp_bias=True), (INSIDE,))
    AdaptedConfig(TINY, (BESIDE.replace(stop=1), WHOLE))
    AdaptedConfig(TINY, (BESIDE, INSIDE))
