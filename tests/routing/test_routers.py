"""Top-k gates against loops, their gradient, and the sums that telemetry reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import RouterStats, choose_experts, router_stats
from medmoe_jax.routing.routers import balance_loss, check_top_k, router_logits, z_loss
from medmoe_jax.routing.telemetry import collect, summarise
from tests.naive import check_gradient, rel

routed_of = jax.jit(choose_experts, static_argnums=1, static_argnames="renormalise")


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


def _dense(gates, experts):
    """Picks and weights laid out over the experts."""
    out = np.zeros((*gates.picks_BxTxK.shape[:2], experts))
    for at in np.ndindex(gates.picks_BxTxK.shape):
        out[at[0], at[1], gates.picks_BxTxK[at]] += gates.weights_BxTxK[at]
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.booleans(),
    st.lists(st.integers(-3, 3), min_size=8, max_size=8),
)
def test_top_k_gates(k, renormalise, values):
    """Small whole numbers, so that ties are common."""
    z = np.array(values, np.float32).reshape(1, 2, 4)
    gates, kept, prob, forced = routed_of(z, k, renormalise=renormalise)
    want, want_kept = _naive_gates(z.astype(np.float64), k, renormalise)
    assert np.array_equal(kept, want_kept) and not forced.any()
    assert rel(gates.dense_BxTxE, want) < 1e-5
    assert np.array_equal(np.sort(gates.picks_BxTxK[0, 0]), np.flatnonzero(want_kept[0, 0]))
    assert rel(_dense(gates, 4), want) < 1e-5
    assert rel(prob, _naive_gates(z.astype(np.float64), 4, False)[0]) < 1e-5


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_of_gates(k, renormalise):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 3, 4)) * 2
    mix = rng.standard_normal(z.shape)

    def loss(z):
        return jnp.sum(choose_experts(z, k, renormalise=renormalise).gates.dense_BxTxE * mix)

    def loss_of_weights(z):
        gates = choose_experts(z, k, renormalise=renormalise).gates
        return jnp.sum(gates.weights_BxTxK * jnp.take_along_axis(mix, gates.picks_BxTxK, -1))

    grad = jax.grad(loss)(jnp.asarray(z, jnp.float32))
    assert rel(jax.grad(loss_of_weights)(jnp.asarray(z, jnp.float32)), grad) < 1e-5 or k == 1
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
    x, kernel = (rng.standard_normal(s) for s in ((2, 3, 5), (5, 4)))
    got = router_logits(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)
    assert got.dtype == jnp.float32
    assert rel(got, rounded @ kernel) < 1e-6
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
    stats = router_stats(jnp.asarray(z), routed_of(z, 2, renormalise=True), valid)
    _, kept = _naive_gates(z, 2, True)
    prob, _ = _naive_gates(z.astype(np.float64), 4, False)
    assert stats.tokens == 5
    assert np.array_equal(stats.use_E, kept[valid].sum(0))
    assert rel(stats.prob_E, prob[valid].sum(0)) < 1e-6
    assert rel(stats.entropy, -(prob[valid] * np.log(prob[valid])).sum()) < 1e-6
    # What padding holds changes nothing.
    z[~valid] = 50 * rng.standard_normal(z[~valid].shape)
    again = router_stats(jnp.asarray(z), routed_of(z, 2, renormalise=True), valid)
    for a, b in zip(stats, again, strict=True):
        assert rel(a, b) < 1e-6


def test_stats_add_up():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 4)), jnp.float32)

    @jax.jit
    def stats(z):
        return router_stats(z, choose_experts(z, 2, renormalise=True), jnp.ones(z.shape[:2], bool))

    parts = jax.tree.map(jnp.add, stats(z[:1]), stats(z[1:]))
    for a, b in zip(stats(z), parts, strict=True):
        assert rel(a, b) < 1e-6


def test_a_token_without_finite_logits_is_counted():
    z = np.zeros((1, 4, 3), np.float32)
    z[0, 1, 2], z[0, 2, 0], z[0, 3, 1] = np.nan, np.inf, np.nan
    valid = np.array([[1, 1, 1, 0]], bool)
    stats = router_stats(jnp.asarray(z), routed_of(z, 2, renormalise=True), valid)
    assert stats.non_finite == 2


def _naive_losses(z, valid, k):
    p = np.exp(z[valid] - z[valid].max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    share = _naive_gates(z, k, True)[1][valid].sum(0)
    share = share / share.sum()
    lse = np.log(np.exp(z[valid]).sum(-1))
    return z.shape[-1] * (share * p.mean(0)).sum(), (lse**2).mean()


@pytest.mark.parametrize("which", [0, 1])
def test_router_losses(which):
    """Against numpy, with a gradient that sees the probabilities but not the counts."""
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((2, 5, 4))
    valid = rng.random((2, 5)) < 0.7

    def loss(tree):
        stats = router_stats(tree["z"], choose_experts(tree["z"], 2, renormalise=True), valid)
        return (balance_loss, z_loss)[which](stats)

    tree = {"z": jnp.asarray(z, jnp.float32)}
    value, grad = jax.value_and_grad(loss)(tree)
    assert rel(value, _naive_losses(z, valid, 2)[which]) < 1e-5
    check_gradient(lambda t: _naive_losses(t["z"], valid, 2)[which], {"z": z}, grad, rng)


def test_balance_loss_is_one_when_even_and_e_when_collapsed():
    even, one = np.full(4, 5.0), np.array([20.0, 0, 0, 0])
    zero = np.zeros(())
    stats = RouterStats(np.full(2, 20.0), np.stack([even, one]), np.stack([even, one]), *[zero] * 4)
    assert np.allclose(balance_loss(stats), [1, 4])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.integers(-3, 3), min_size=8, max_size=8),
    st.lists(st.integers(-1, 3), min_size=2, max_size=2),
)
def test_forced_picks(k, values, forced):
    """The language's expert replaces the weakest pick, unless it is there or unknown."""
    z = np.array(values, np.float32).reshape(1, 2, 4)
    out = choose_experts(
        jnp.asarray(z), k, renormalise=False, forced_BxT=jnp.asarray([forced], jnp.int32)
    )
    prob, _ = _naive_gates(z.astype(np.float64), 4, False)
    for t in range(2):
        picks = sorted(range(4), key=lambda e, t=t: (-z[0, t, e], e))[:k]
        override = forced[t] >= 0 and forced[t] not in picks
        if override:
            picks[-1] = forced[t]
        assert out.gates.picks_BxTxK[0, t].tolist() == picks
        assert bool(out.forced_BxT[0, t]) == override
        want = np.zeros(4)
        want[picks] = prob[0, t, picks]
        assert rel(out.gates.dense_BxTxE[0, t], want) < 1e-5


def test_collect_joins_segments_in_order():
    def stats(layers, start):
        ones = np.arange(start, start + layers, dtype=np.float32)
        wide = ones[:, None] * np.ones((1, 2))
        return RouterStats(ones, wide, 2 * wide, *[ones] * 4)

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
        z2=np.zeros(3),
        forced=np.array([5.0, 0.0, 0.0]),
        non_finite=np.zeros(3),
    )
    out = summarise(stats)
    assert np.allclose(out["use"], [[0.25] * 4, [0, 0.5, 0.5, 0], [0] * 4])
    assert np.allclose(out["prob"], [[0.25] * 4, [0, 0.5, 0.5, 0], [0] * 4])
    assert np.allclose(out["entropy"], [1, 0.5, 0])
    assert np.allclose(out["imbalance"], [1, 2, 0])
    assert np.allclose(out["forced"], [0.25, 0, 0])
    assert np.isfinite(
        summarise(stats._replace(use_E=stats.use_E[:, :1], prob_E=stats.prob_E[:, :1]))["entropy"]
    ).all()


def test_gates_over_all_experts_are_a_softmax():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 3)), jnp.float32)
    softmax, kept = (
        choose_experts(z, 3, renormalise=flag).gates.dense_BxTxE for flag in (True, False)
    )
    assert rel(softmax, kept) < 1e-6
