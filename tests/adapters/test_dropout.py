"""Dropout acts on A's input only, by one mask a group, the same wherever it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.site import adapted_linear
from medmoe_jax.base.seam import BareSeam, Context
from medmoe_jax.routing.dispatch import strategy
from tests.naive import rel

B, T, D = 2, 50, 40
RATE = 0.3
# A and B are identities, so that the bank's output is its input after dropout.
PLAIN = BankSpec("plain", ("attn.q", "attn.k"), 0, 1, rank=D, alpha=D, dropout=RATE)
LIGHT = PLAIN.replace(name="light", sites=("attn.q",), dropout=0.1)
ROUTED = BankSpec("routed", ("attn.q",), 0, 1, experts=3, rank=2, gate="token", dropout=RATE)


def _setup(specs, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    eye = {"lora_a": jnp.eye(D)[:, None], "lora_b": jnp.eye(D)[None]}
    extra = {
        spec.name: {
            site: eye
            if spec.gate == "always"
            else {
                "lora_a": draw(D, 3, 2),
                "lora_b": draw(3, 2, D),
                "router": {"kernel": draw(D, 3), "bias": draw(3)},
            }
            for site in spec.sites
        }
        for spec in specs
    }
    weights = {site: {"kernel": draw(D, D)} for site in ("attn.q", "attn.k")}
    return draw(B, T, D), weights, extra


def _run(specs, x, weights, extra, *, seed=0, layer=0, group="attn.qkv", dispatch="stacked"):
    """`({site: banks' output}, router sums)`."""
    key = None if seed is None else jax.random.key(seed)
    segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    context = Context(segment_ids, jnp.int32(layer), dropout_key=key)
    y, stats = adapted_linear(specs, strategy(dispatch), group, x, weights, extra, context)
    bare, _ = BareSeam(jax.nn.silu).linear(group, x, weights, None, context)
    return {site: y[site] - bare[site] for site in y}, stats


def _mask(delta, x):
    return np.abs(delta) > 0.5 * np.abs(x)


def test_statistics_and_scaling():
    x, weights, extra = _setup((PLAIN,))
    out, _ = _run((PLAIN,), x, weights, extra)
    mask = _mask(out["attn.q"], x)
    n = mask.size
    assert abs(mask.mean() - (1 - RATE)) < 4 * (RATE * (1 - RATE) / n) ** 0.5
    # Rows, columns and neighbours are as independent as their number allows.
    assert np.all(np.abs(mask.mean((0, 1)) - (1 - RATE)) < 5 * (0.21 / (B * T)) ** 0.5)
    assert np.all(np.abs(mask.mean(2) - (1 - RATE)) < 5 * (0.21 / D) ** 0.5)
    assert abs((mask[..., 1:] == mask[..., :-1]).mean() - 0.58) < 5 * (0.25 / n) ** 0.5
    # The base's part is untouched: what remains is exactly x / (1 - rate) on what was kept.
    assert np.abs(out["attn.q"] - np.where(mask, x / (1 - RATE), 0)).max() < 1e-4


def test_one_mask_a_group_and_another_elsewhere():
    x, weights, extra = _setup((PLAIN,))
    run = lambda **kwargs: _run((PLAIN,), x, weights, extra, **kwargs)[0]  # noqa: E731
    first = _mask(run()["attn.q"], x)
    assert np.array_equal(first, _mask(run()["attn.k"], x))
    assert np.array_equal(first, _mask(run(dispatch="reference")["attn.q"], x))
    for other in ({"seed": 1}, {"layer": 1}, {"group": "attn.out"}):
        mask = _mask(run(**other)["attn.q"], x)
        assert abs((mask == first).mean() - 0.58) < 5 * (0.25 / mask.size) ** 0.5, other


def test_rates_may_differ_within_a_group():
    """Each bank has its own rate, whatever its neighbours'."""
    x, weights, extra = _setup((PLAIN, LIGHT))
    both = _run((PLAIN, LIGHT), x, weights, extra)[0]
    heavy = both["attn.k"]
    light = both["attn.q"] - heavy
    assert _mask(light, x).mean() == pytest.approx(0.9, abs=0.02)
    alone = _run((LIGHT,), x, weights, {"light": extra["light"]})[0]["attn.q"]
    assert np.abs(light - alone).max() < 1e-4


def test_without_a_key_there_is_none():
    x, weights, extra = _setup((PLAIN,))
    out, _ = _run((PLAIN,), x, weights, extra, seed=None)
    assert rel(out["attn.q"], x) < 1e-5


def test_routers_see_the_whole_input():
    x, weights, extra = _setup((ROUTED,))
    dropped, stats = _run((ROUTED,), x, weights, extra)
    whole, clean = _run((ROUTED,), x, weights, extra, seed=None)
    assert rel(dropped["attn.q"], whole["attn.q"]) > 0.1
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(clean), strict=True):
        assert np.array_equal(a, b)


def test_gradient_goes_through_the_same_mask():
    x, weights, extra = _setup((PLAIN,))
    weights = jax.tree.map(jnp.zeros_like, weights)
    mix = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    mask = _mask(_run((PLAIN,), x, weights, extra)[0]["attn.q"], x)

    def loss(x):
        return jnp.sum(_run((PLAIN,), x, weights, extra)[0]["attn.q"] * mix)

    assert rel(jax.grad(loss)(x), np.where(mask, mix / (1 - RATE), 0)) < 1e-4
