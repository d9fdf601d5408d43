"""The orthogonality term and its metrics against numpy and scipy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from medmoe_jax.adapters import orthogonality
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.orthogonality import Orthogonality, grams, overlap, pairs, term
from medmoe_jax.errors import UserError
from tests.naive import TINY, check_gradient, f64, random_banks, rel

OF = BankSpec("of", ("attn.o", "mlp.up", "mlp.down"), 0, 2, experts=2, rank=2)
AGAINST = BankSpec("against", ("mlp.down", "mlp.up", "attn.q"), 1, 3, rank=3)


@pytest.fixture(scope="module")
def banks():
    return random_banks((OF, AGAINST), TINY)


def _shared(banks):
    """`[(A [rows, D], A' [rows, D])]` for layer 1, the only one both banks have."""
    return [
        (
            np.moveaxis(banks["of"][site]["lora_a"][1], 0, -1).reshape(4, -1),
            np.moveaxis(banks["against"][site]["lora_a"][0], 0, -1).reshape(3, -1),
        )
        for site in ("mlp.up", "mlp.down")
    ]


def _naive(banks, reduction):
    total = 0.0
    for a, b in _shared(banks):
        entries = [abs(row @ other) for row, other in itertools.product(a, b)]
        total += sum(entries) / (len(entries) if reduction == "mean" else 1)
    return total


def _term(spec, banks):
    return term(spec, pairs(OF, AGAINST, banks["of"], banks["against"]))


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "both-sides"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_term_and_gradient(banks, reduction, stop):
    spec = Orthogonality("of", "against", 0.3, reduction, stop)
    value, grads = jax.value_and_grad(lambda b: _term(spec, b))(banks)
    assert abs(value / _naive(f64(banks), reduction) - 1) < 1e-5
    if stop:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["against"]))
        fixed = f64(banks["against"])
        check_gradient(
            lambda of: _naive({"of": of, "against": fixed}, reduction),
            banks["of"],
            grads["of"],
            np.random.default_rng(0),
        )
    else:
        check_gradient(lambda b: _naive(b, reduction), banks, grads, np.random.default_rng(0))
    assert np.any(grads["of"]["mlp.up"]["lora_a"])
    # Sites and layers that the two do not share have no part in it.
    assert not np.any(grads["of"]["attn.o"]["lora_a"])
    assert not np.any(grads["of"]["mlp.up"]["lora_a"][0])


def test_overlap(banks):
    got = overlap(grams(pairs(OF, AGAINST, banks["of"], banks["against"])))
    cosines, angles = [], []
    for a, b in _shared(f64(banks)):
        unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b)]
        cosines.append(np.abs(unit[0] @ unit[1].T).mean())
        angles.append(scipy.linalg.subspace_angles(a.T, b.T))
    assert got["cos"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert got["principal_cos_mean"] == pytest.approx(np.mean(np.cos(angles)), rel=1e-5)
    assert got["principal_cos_max"] == pytest.approx(np.cos(np.min(angles)), rel=1e-5)
    assert got["principal_angle_min"] == pytest.approx(np.degrees(np.min(angles)), rel=1e-3)


def test_overlap_is_scale_free(banks):
    """Shrinking A lowers the term and leaves the metrics; equal banks give cosines of one."""
    shrunk = jax.tree.map(lambda x: 0.01 * x, banks["of"])
    before = pairs(OF, AGAINST, banks["of"], banks["against"])
    after = pairs(OF, AGAINST, shrunk, banks["against"])
    spec = Orthogonality("of", "against")
    assert term(spec, after) < 0.011 * term(spec, before)
    for key, value in overlap(grams(before)).items():
        assert rel(overlap(grams(after))[key], value) < 1e-4
    same = overlap(grams(pairs(OF, OF, banks["of"], banks["of"])))
    assert same["principal_cos_mean"] == pytest.approx(1, abs=1e-5)


def test_orthogonal_banks_have_none():
    rows = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0])[None]
    apart = [(rows[:, :, :3], rows[:, :, 3:])]
    assert term(Orthogonality("a", "b", reduction="sum"), apart) < 1e-5
    measured = overlap(grams(apart))
    assert measured["principal_cos_max"] < 1e-5
    assert measured["principal_angle_min"] == pytest.approx(90, abs=0.01)


def test_errors(banks):
    with pytest.raises(UserError, match="reduction: 'max'"):
        Orthogonality("a", "b", reduction="max")
    for changes in ({"sites": ("attn.k",)}, {"start": 0, "stop": 1}):
        with pytest.raises(UserError, match="'of' and 'against' share no site"):
            orthogonality.pairs(OF.replace(**changes), AGAINST, {}, {})
