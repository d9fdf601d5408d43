"""Every strategy against a float64 loop over tokens and experts, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.routing.dispatch import STRATEGIES, Stacked, strategy
from medmoe_jax.routing.terms import LoraTerm
from tests.naive import check_gradient, f64, rel
from tests.routing import loads

B, T = 2, 3
# site -> (input, D, O, [(E, r, has Λ, gated, s), ...]); inputs "x~" are "x" after dropout.
CASES = {
    "one_lora": {"q": [("x", 5, 4, 1, 3, False, False, 2.0)]},
    "one_mixture": {"up": [("x", 5, 7, 4, 2, False, True, 2.0)]},
    "scaled": {"o": [("x", 5, 4, 3, 2, True, False, 0.7)]},
    "everything": {
        "gate": [
            ("x", 5, 7, 1, 3, False, False, 2.0),
            ("x~", 5, 7, 4, 2, False, True, 1.5),
            ("x", 5, 7, 2, 1, True, True, 0.3),
        ],
        "up": [("x~", 5, 6, 4, 2, True, True, 1.5), ("x", 5, 6, 1, 5, True, False, 2**0.5)],
        "down": [("y", 4, 5, 3, 2, False, True, 1.0)],
    },
}


def _random(case, seed=0):
    """`(inputs, parameters)`: arrays by name, and a list of dicts a site."""
    rng = np.random.default_rng(seed)
    inputs, params = {}, {}
    for site, terms in CASES[case].items():
        params[site] = []
        for name, D, O, E, r, scaled, gated, _ in terms:
            if name not in inputs:
                inputs[name] = rng.standard_normal((B, T, D))
            p = {"a": rng.standard_normal((D, E, r)), "b": rng.standard_normal((E, r, O))}
            if scaled:
                p["scale"] = rng.standard_normal((E, r))
            if gated:  # sparse, as a router's are
                p["gates"] = rng.random((B, T, E)) * (rng.random((B, T, E)) < 0.6)
            params[site].append(p)
    if "x~" in inputs:
        inputs["x~"] *= rng.random(inputs["x~"].shape) < 0.8
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (inputs, params))


def _gates(p):
    """A router's decision with these weights."""
    if "gates" not in p:
        return None
    weights, picks = jax.lax.top_k(p["gates"], p["gates"].shape[-1])
    return Gates(p["gates"], picks, weights)


def _terms(case, inputs, params):
    return {
        site: [
            LoraTerm(inputs[name], p["a"], p["b"], _gates(p), p.get("scale"), s)
            for (name, *_, s), p in zip(terms, params[site], strict=True)
        ]
        for site, terms in CASES[case].items()
    }


def _naive(case, inputs, params):
    """`Σ_terms s Σ_e gate_e B_e (Λ_e ∘ A_e x)`, one token and one expert at a time."""
    out = {}
    for site, terms in CASES[case].items():
        out[site] = np.zeros((B, T, terms[0][2]))
        for (name, _, _, E, _, _, _, s), p in zip(terms, params[site], strict=True):
            for b, t, e in np.ndindex(B, T, E):
                h = inputs[name][b, t] @ p["a"][:, e]
                h = h * p["scale"][e] if "scale" in p else h
                gate = p["gates"][b, t, e] if "gates" in p else 1.0
                out[site][b, t] += s * gate * (h @ p["b"][e])
    return out


@pytest.mark.parametrize("name", STRATEGIES)
class TestStrategy:
    """What every strategy has to pass; a new one needs no test of its own."""

    @pytest.mark.parametrize("case", CASES)
    def test_value_and_gradient(self, name, case):
        """Gradients of inputs, A, B, Λ and gates."""
        inputs, params = _random(case)
        want = _naive(case, f64(inputs), f64(params))
        rng = np.random.default_rng(1)
        mix = {site: rng.standard_normal(y.shape) for site, y in want.items()}

        def loss(tree):
            out = strategy(name).lora(_terms(case, *tree))
            return sum(jnp.sum(out[site] * mix[site]) for site in mix), out

        def naive_loss(tree):
            return sum((y * mix[site]).sum() for site, y in _naive(case, *tree).items())

        grads, got = jax.jit(jax.grad(loss, has_aux=True))((inputs, params))
        assert set(got) == set(want)
        for site in want:
            assert rel(got[site], want[site]) < 1e-5
        check_gradient(naive_loss, (inputs, params), grads, rng)

    @pytest.mark.parametrize("case", CASES)
    def test_bfloat16(self, name, case):
        """At most twice the error of the plainest loop in bfloat16."""
        inputs, params = _random(case)
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
        got = jax.jit(lambda *a: strategy(name).lora(_terms(case, *a)))(low, params)
        want = _naive(case, f64(low), f64(params))
        plain = _plain_bfloat16(case, low, params)
        for site in want:
            assert got[site].dtype == jnp.bfloat16
            error = rel(f64(got[site]), want[site])
            assert 0 < error <= 2 * rel(f64(plain[site]), want[site])

    @pytest.mark.parametrize("top_k", [1, 2, loads.E])
    def test_loads(self, name, top_k):
        """Whatever the tokens pick: low-rank and feed-forward experts, with the router's gradient.

        The same compiled program serves every load, so no expert has a fixed share.
        """
        run = loads.compiled(name, top_k)
        for load in loads.LOADS:
            tree, valid = loads.arrays(load)
            grads, got = run(tree, valid)
            want = loads.naive_outputs(tree, valid, top_k)
            loads.check_load(load, tree, valid, top_k)
            for key, y in want.items():
                assert rel(got[key], y) < 1e-5, (load, key)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
            check_gradient(
                lambda t, valid=valid: loads.naive_loss(t, valid, top_k),
                tree,
                grads,
                np.random.default_rng(2),
            )

    def test_feed_forward_in_bfloat16(self, name):
        """At most twice the error of the plainest loop in bfloat16."""
        tree, valid = loads.arrays("uneven")
        low = {k: v.astype(jnp.bfloat16) if k != "logits" else v for k, v in tree.items()}
        _, got = loads.compiled(name, 2)(low, valid)
        want = loads.naive_outputs(low, valid, 2)["ffn"]
        plain = loads.plain_bfloat16_ffn(low, valid, 2)
        assert got["ffn"].dtype == jnp.bfloat16
        assert 0 < rel(f64(got["ffn"]), want) <= 2 * rel(f64(plain), want)


def _plain_bfloat16(case, inputs, params):
    """The published modules' way: every operation rounds, experts are added one after another."""
    out = {}
    for site, terms in CASES[case].items():
        total = jnp.zeros((B, T, terms[0][2]), jnp.bfloat16)
        for (name, _, _, E, _, _, _, s), p in zip(terms, params[site], strict=True):
            p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
            for e in range(E):
                h = inputs[name] @ p["a"][:, e]
                h = h * p["scale"][e][None, None] if "scale" in p else h
                h = h * p["gates"][..., e, None] if "gates" in p else h
                total = total + jnp.bfloat16(s) * (h @ p["b"][e])
        out[site] = total
    return out


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_few_tokens_read_the_experts_that_they_picked(scaled, beside):
    """Two tokens, two picks each, one of them in common; a third is padding. Others are NaN."""
    D, O, E, r, s = 5, 7, 12, 2, 1.5
    picks, used = np.array([[[3, 8], [8, 0], [E, E]]]), [0, 3, 8, E - 1]  # the last for padding
    rng = np.random.default_rng(4)
    tree = {
        "x": rng.standard_normal((1, 3, D)),
        "a": rng.standard_normal((D, E, r)),
        "b": rng.standard_normal((E, r, O)),
        "scale": rng.standard_normal((E, r)) if scaled else None,
        "weights": np.where(picks < E, rng.random(picks.shape), 0.0),
        "always": [rng.standard_normal((D, 1, 4)), rng.standard_normal((1, 4, O))],
    }
    mix = rng.standard_normal((1, 3, O))

    def loss(tree):
        k_BxTxKxE = jax.nn.one_hot(picks, E)
        gates = Gates((tree["weights"][..., None] * k_BxTxKxE).sum(2), picks, tree["weights"])
        terms = [LoraTerm(tree["x"], tree["a"], tree["b"], gates, tree["scale"], s)]
        if beside:
            terms.append(LoraTerm(tree["x"], *tree["always"], None, None, 0.5))
        y = strategy("stacked").lora({"up": terms})["up"]
        return jnp.sum(y * mix), y

    def naive(tree):
        y = 0.5 * tree["x"] @ tree["always"][0][:, 0] @ tree["always"][1][0] * beside
        for t, k in np.ndindex(2, 2):
            e = picks[0, t, k]
            h = tree["x"][0, t] @ tree["a"][:, e]
            h = h * tree["scale"][e] if scaled else h
            y[0, t] += s * tree["weights"][0, t, k] * (h @ tree["b"][e])
        return y

    others = np.setdiff1d(np.arange(E), used)
    broken = jax.tree.map(np.array, tree)
    broken["a"][:, others] = broken["b"][others] = np.nan
    low = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), broken)
    grads, y = jax.jit(jax.grad(loss, has_aux=True))(low)
    assert rel(y, naive(f64(tree))) < 1e-5
    assert not np.asarray(grads["a"])[:, others].any() and not np.asarray(grads["b"])[others].any()
    # The weight of padding has no gradient of its own: it is always 0.
    check_gradient(
        lambda t: (naive(t) * mix).sum(),
        tree,
        jax.tree.map(np.asarray, grads) | {"weights": np.where(picks < E, grads["weights"], 0)},
        rng,
    )


def test_shared_inputs_are_read_once():
    """Terms on one input are one product with A, whatever their sites."""
    inputs, params = _random("everything")
    fn = jax.jit(lambda *a: strategy("stacked").lora(_terms("everything", *a)))
    jaxpr = jax.make_jaxpr(fn)(inputs, params)
    products = str(jaxpr).count("dot_general")
    assert products == len(inputs) + len(params)


def test_unknown_strategy():
    assert strategy("stacked") == Stacked(Execution())
    with pytest.raises(ParameterError, match=r"^dispatch: 'magic' is none of .*stacked"):
        strategy("magic")
