"""Top-k gates against loops, their gradient, and the sums that telemetry reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.errors import UserError
from medmoe_jax.routing.routers import (
    RouterStats,
    check_top_k,
    router_logits,
    router_stats,
    top_k_gates,
)
from medmoe_jax.routing.telemetry import collect, summarise
from tests.naive import check_gradient, rel

gates_of = jax.jit(top_k_gates, static_argnums=1, static_argnames="renormalise")


def _naive_gates(z, k, renormalise):
    """One token at a time; a tie goes to the lower index."""
    gates, kept = np.zeros(z.shape), np.zeros(z.shape, bool)
    for at in np.ndindex(z.shape[:-1]):
        p = np.exp(z[at] - z[at].max())
        p /= p.sum()
        picks = sorted(range(len(p)), key=lambda e, at=at: (-z[at][e], e))[:k]
        for e in picks:
            kept[at][e] = True
            gates[at][e] = p[e] / (sum(p[j] for j in picks) if renormalise else 1)
    return gates, kept


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.booleans(),
    st.lists(st.integers(-3, 3), min_size=8, max_size=8),
)
def test_top_k_gates(k, renormalise, values):
    """Small whole numbers, so that ties are common."""
    z = np.array(values, np.float32).reshape(1, 2, 4)
    gates, kept, prob = gates_of(z, k, renormalise=renormalise)
    want, want_kept = _naive_gates(z.astype(np.float64), k, renormalise)
    assert np.array_equal(kept, want_kept)
    assert rel(gates, want) < 1e-5
    assert rel(prob, _naive_gates(z.astype(np.float64), 4, False)[0]) < 1e-5


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_of_gates(k, renormalise):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 3, 4)) * 2
    mix = rng.standard_normal(z.shape)

    def loss(z):
        return jnp.sum(top_k_gates(z, k, renormalise=renormalise)[0] * mix)

    grad = jax.grad(loss)(jnp.asarray(z, jnp.float32))
    assert np.isfinite(grad).all()
    if k == 1 and renormalise:
        assert np.abs(grad).max() < 1e-6  # the only weight is 1, whatever its logit
    else:
        check_gradient(
            lambda t: (_naive_gates(t["z"], k, renormalise)[0] * mix).sum(),
            {"z": z},
            {"z": grad},
            rng,
        )


def test_router_logits():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s) for s in ((2, 3, 5), (5, 4), (4,)))
    got = router_logits(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), jnp.asarray(bias))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)
    assert got.dtype == jnp.float32
    assert rel(got, rounded @ kernel + bias) < 1e-6
    no_bias = router_logits(jnp.asarray(x, jnp.float32), jnp.asarray(kernel))
    assert rel(no_bias, x @ kernel) < 1e-6
    text = jax.jit(router_logits).lower(x, kernel).as_text()
    assert "HIGHEST" in text


@pytest.mark.parametrize("k", [0, 5])
def test_top_k_is_checked(k):
    with pytest.raises(UserError, match=r"here\.top_k"):
        check_top_k("here", k, 4)
    check_top_k("here", 4, 4)


def test_stats_exclude_padding():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 5, 4)).astype(np.float32)
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
    stats = router_stats(jnp.asarray(z), *gates_of(z, 2, renormalise=True)[1:], valid)
    _, kept = _naive_gates(z, 2, True)
    prob, _ = _naive_gates(z.astype(np.float64), 4, False)
    assert stats.tokens == 5
    assert np.array_equal(stats.use_E, kept[valid].sum(0))
    assert rel(stats.prob_E, prob[valid].sum(0)) < 1e-6
    assert rel(stats.entropy, -(prob[valid] * np.log(prob[valid])).sum()) < 1e-6
    # What padding holds changes nothing.
    z[~valid] = 50 * rng.standard_normal(z[~valid].shape)
    again = router_stats(jnp.asarray(z), *gates_of(z, 2, renormalise=True)[1:], valid)
    for a, b in zip(stats, again, strict=True):
        assert rel(a, b) < 1e-6


def test_stats_have_no_gradient_and_add_up():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 4)), jnp.float32)

    def stats(z):
        _, kept, prob = top_k_gates(z, 2, renormalise=True)
        return router_stats(z, kept, prob, jnp.ones(z.shape[:2], bool))

    total = lambda z: sum(leaf.sum() for leaf in stats(z))  # noqa: E731
    assert not np.any(jax.grad(total)(z))
    parts = jax.tree.map(jnp.add, stats(z[:1]), stats(z[1:]))
    for a, b in zip(stats(z), parts, strict=True):
        assert rel(a, b) < 1e-6


def test_collect_joins_segments_in_order():
    def stats(layers, start):
        ones = np.arange(start, start + layers, dtype=np.float32)
        return RouterStats(ones, ones[:, None] * np.ones((1, 2)), ones[:, None] * 2, ones)

    aux = ({}, {"a/x": stats(1, 0)}, {"a/x": stats(2, 1), "b/x": stats(2, 7)})
    out = collect(aux)
    assert list(out) == ["a/x", "b/x"]
    assert np.array_equal(out["a/x"].tokens, [0, 1, 2])
    assert np.array_equal(out["b/x"].tokens, [7, 8])
    assert out["a/x"].use_E.shape == (3, 2)
    assert collect(({}, {})) == {}


def test_summarise():
    even = np.full(4, 10.0)
    collapsed = np.array([0, 20.0, 20.0, 0])
    stats = RouterStats(
        tokens=np.array([20.0, 20.0, 0.0]),
        use_E=np.stack([even, collapsed, 0 * even]),
        prob_E=np.stack([even / 2, collapsed / 2, 0 * even]),
        entropy=np.array([20 * np.log(4), 20 * np.log(2), 0.0]),
    )
    out = summarise(stats)
    assert np.allclose(out["use"], [[0.25] * 4, [0, 0.5, 0.5, 0], [0] * 4])
    assert np.allclose(out["prob"], [[0.25] * 4, [0, 0.5, 0.5, 0], [0] * 4])
    assert np.allclose(out["entropy"], [1, 0.5, 0])
    assert np.allclose(out["imbalance"], [1, 2, 0])
    assert np.isfinite(summarise(jax.tree.map(lambda x: x[..., :1], stats))["entropy"]).all()


def test_gates_over_all_experts_are_a_softmax():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 3)), jnp.float32)
    both = functools.partial(top_k_gates, z, 3)
    assert rel(both(renormalise=True)[0], both(renormalise=False)[0]) < 1e-6
