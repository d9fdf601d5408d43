"""The router's kernel and its reference against a float64 loop, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import routing
from medmoe_jax.kernels.router_equations import choose_experts, router_stats
from medmoe_jax.routing import routers
from tests.naive import check_gradient, rel, tree_rel

BACKENDS = ["xla", "interpret"]
route = jax.jit(routing.route, static_argnames=("top_k", "renormalise", "backend"))


def _naive(x, kernel, bias, valid, forced, top_k, renormalise):
    """One token at a time, float64; ties go to the lower index."""
    z = x @ kernel + bias
    T, E = z.shape
    out = {
        "weights_TxK": np.zeros((T, top_k)),
        "picks_TxK": np.zeros((T, top_k), int),
        "use_E": np.zeros(E),
        "prob_E": np.zeros(E),
        **dict.fromkeys(("tokens", "entropy", "z2", "forced", "non_finite"), 0.0),
    }
    for t in range(T):
        p = np.exp(z[t] - z[t].max())
        lse = np.log(p.sum()) + z[t].max()
        p /= p.sum()
        picks = sorted(range(E), key=lambda e, t=t: (-z[t, e], e))[:top_k]
        override = 0 <= forced[t] < len(bias) and forced[t] not in picks
        if override:
            picks[-1] = forced[t]
        out["picks_TxK"][t] = picks
        out["weights_TxK"][t] = p[picks] / (p[picks].sum() if renormalise else 1)
        if valid[t]:
            out["tokens"] += 1
            out["use_E"][picks] += 1
            out["prob_E"] += p
            out["entropy"] -= p @ np.log(p)
            out["z2"] += lse**2
            out["forced"] += override
    return out


def _arrays(T, D, E, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((T, D)), dtype)
    kernel = jnp.asarray(2 * rng.standard_normal((D, E)) / np.sqrt(D), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(E), jnp.float32)
    valid = jnp.asarray(rng.random(T) > 0.3)
    forced = jnp.asarray(rng.integers(-1, E + 1, T), jnp.int32)  # no expert has the last
    return x, kernel, bias, valid, forced


def _f64(*arrays):
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]


def _cotangents(routed, seed=1):
    """Random cotangents of what can be differentiated, of like weight in the sum."""
    rng = np.random.default_rng(seed)
    shapes = {"weights_TxK": routed["weights_TxK"].shape, "prob_E": routed["prob_E"].shape}
    return {n: rng.standard_normal(s) for n, s in shapes.items()} | {"z2": 0.1}


def fields(routed):
    """Picks, weights and statistics by name."""
    return {**routed._asdict(), **routed.stats._asdict()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "T, D, E, K, dtype, renormalise",
    [
        (13, 24, 5, 2, jnp.float32, True),
        # Two blocks of tokens and of the width, neither of them full.
        (530, 1100, 12, 3, jnp.bfloat16, False),
    ],
)
def test_values_and_gradients(backend, T, D, E, K, dtype, renormalise):
    x, kernel, bias, valid, forced = _arrays(T, D, E, dtype)
    tree = dict(zip(("x", "kernel", "bias"), _f64(x, kernel, bias), strict=True))

    def naive(tree):
        valid_T, forced_T = np.asarray(valid), np.asarray(forced)
        return _naive(*tree.values(), valid_T, forced_T, K, renormalise)

    want = naive(tree)
    weight = _cotangents(want)

    options = {"top_k": K, "renormalise": renormalise, "forced_T": forced, "backend": backend}

    def loss(x, kernel, bias):
        out = fields(routing.route(x, kernel, bias, valid, **options))
        terms = [jnp.sum(out[n] * jnp.asarray(w, jnp.float32)) for n, w in weight.items()]
        return sum(terms), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, kernel, bias)
    assert np.array_equal(out["picks_TxK"], want.pop("picks_TxK")), "a near-tie, or a wrong pick"
    assert want["forced"] > 1 and want["tokens"] < T
    for name, value in want.items():
        assert rel(out[name], value) < 1e-5, name
    assert gradient[0].dtype == dtype
    # Its own rounding is all that the input's gradient may lose in bfloat16.
    exact = dict(zip(tree, gradient, strict=True))
    tolerance = {"x": 1e-4 if dtype == jnp.float32 else 4e-3, "kernel": 1e-4, "bias": 1e-4}
    for name, g in exact.items():

        def moved(part, name=name):
            out = naive(tree | part)
            return sum(np.sum(out[n] * w) for n, w in weight.items())

        rng = np.random.default_rng(2)
        check_gradient(moved, {name: tree[name]}, {name: g}, rng, tolerance=tolerance[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fewer_tokens_than_a_register_has_rows(dtype):
    """As rows among others, in value, statistics and gradient."""
    x, kernel, bias, _, forced = _arrays(9, 20, 5, dtype)
    first = jnp.arange(9) < 2
    mix = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2)), jnp.float32)

    def loss(x, kernel, bias, tokens):
        options = {"top_k": 2, "renormalise": False, "forced_T": forced[:tokens]}
        out = route(x[:tokens], kernel, bias, first[:tokens], **options, backend="interpret")
        return jnp.sum(out.weights_TxK[:2] * mix) + jnp.sum(out.stats.prob_E**2), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    ((_, few), some), ((_, many), all_) = (run(x, kernel, bias, n) for n in (2, 9))
    assert few.picks_TxK.shape == (2, 2) and few.stats.tokens == 2
    assert np.array_equal(few.picks_TxK, many.picks_TxK[:2])
    assert rel(few.weights_TxK, many.weights_TxK[:2]) < 1e-6
    assert tree_rel(few.stats, many.stats) < 1e-6
    assert min(float(jnp.abs(g).max()) for g in all_) > 1e-3
    assert tree_rel(some, all_) < 1e-5


@pytest.mark.parametrize("top_k", [1, 11])
def test_any_number_of_picks_and_no_bias(top_k):
    x, kernel, _, valid, _ = _arrays(9, 20, 11)
    want = _naive(*_f64(x, kernel), 0.0, np.asarray(valid), np.full(9, -1), top_k, True)
    out = route(x, kernel, None, valid, top_k=top_k, renormalise=True, backend="interpret")
    assert np.array_equal(out.picks_TxK, want["picks_TxK"])
    assert rel(out.weights_TxK, want["weights_TxK"]) < 1e-5
    assert np.array_equal(out.stats.use_E, want["use_E"])


def test_the_kernel_says_what_the_equations_say():
    """The same picks, weights and statistics, ties included."""
    x, kernel, bias, valid, forced = _arrays(13, 24, 6)
    x = jnp.round(x)
    kernel = jnp.round(kernel * 4).at[:, 3].set(jnp.round(kernel * 4)[:, 1])
    bias = jnp.zeros_like(bias)
    options = {"top_k": 3, "renormalise": True, "forced_T": forced, "backend": "interpret"}
    out = route(x, kernel, bias, valid, **options)

    @jax.jit
    def plain():
        z = routers.router_logits(x[None], kernel)
        choice = choose_experts(z, 3, renormalise=True, forced_BxT=forced[None])
        return choice, router_stats(z, choice, valid[None])

    want, stats = plain()
    assert np.array_equal(out.picks_TxK, want.gates.picks_BxTxK[0])
    assert rel(out.weights_TxK, want.gates.weights_BxTxK[0]) < 1e-5
    for name, value in stats._asdict().items():
        assert rel(getattr(out.stats, name), value) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_logits_are_counted_and_picks_stay_in_range(backend):
    x, kernel, bias, valid, _ = _arrays(13, 24, 5)
    x = x.at[4].set(jnp.nan).at[6, 0].set(jnp.inf).at[7].set(jnp.nan)
    valid = jnp.ones_like(valid).at[7].set(False)
    out = route(x, kernel, bias, valid, top_k=2, renormalise=True, backend=backend)
    assert out.stats.non_finite == 2
    picks = np.asarray(out.picks_TxK)
    assert ((picks >= 0) & (picks < 5)).all()
    assert all(len(set(row)) == 2 for row in picks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 6}, "top_k: 6 of 5 experts"),
        ({"top_k": 0}, "give 1 to 5"),
        ({"backend": "triton"}, "'triton' is none of xla, pallas, interpret"),
        ({"valid_T": jnp.ones(4, jnp.bool_)}, r"give bool \(13,\)"),
        ({"valid_T": jnp.ones(13)}, "valid_T is float32"),
        ({"kernel_DxE": jnp.ones((23, 5))}, "width 24, the router's kernel expects 23"),
        ({"kernel_DxE": jnp.ones((24, 2000)), "bias_E": None}, "2000 experts.*use backend 'xla'"),
        ({"x_TxD": jnp.ones((13, 24), jnp.float16)}, "x_TxD is float16"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    x, kernel, bias, valid, _ = _arrays(13, 24, 5)
    given = {"x_TxD": x, "kernel_DxE": kernel, "bias_E": bias, "valid_T": valid}
    given |= {"top_k": 2, "renormalise": True, "backend": "interpret"}
    with pytest.raises(UserError, match=message):
        routing.route(**given | change)
