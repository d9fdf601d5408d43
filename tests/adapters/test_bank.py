"""Bank descriptions and their first weights."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_jax.adapters import bank
from medmoe_jax.adapters.bank import BankSpec, match_layers, match_sites
from medmoe_jax.adapters.model import AdaptedConfig, hidden
from medmoe_jax.base.config import site_shapes
from medmoe_jax.errors import UserError
from tests import naive
from tests.naive import TINY


def test_match_sites():
    assert match_sites("b", ("mlp.*", "attn.q"), TINY) == (
        "attn.q",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
    assert match_sites("b", ("*",), TINY) == tuple(site_shapes(TINY))
    with pytest.raises(UserError, match=r"bank 'b'\.sites: pattern 'mpl\.\*' matches none"):
        match_sites("b", ("attn.q", "mpl.*"), TINY)
    with pytest.raises(UserError, match=r"bank 'b'\.sites is empty"):
        match_sites("b", (), TINY)


END = st.none() | st.integers(-7, 7)


@given(END, END, st.integers(1, 5))
def test_match_layers(start, stop, n_layers):
    want = list(range(n_layers))[start:stop]
    if want:
        assert match_layers("b", (start, stop), n_layers) == (want[0], want[-1] + 1)
    else:
        with pytest.raises(UserError, match=r"bank 'b'\.layers"):
            match_layers("b", (start, stop), n_layers)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"gate": "best"}, "gate"),
        ({"name": "b/c"}, "name: has a '/'"),
        ({"experts": 0}, "experts"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"gate": "token", "experts": 2, "top_k": 3}, "top_k"),
        ({"init": "c"}, "init: 'c' is none of a, b"),
        ({"init": "b", "learned_scale": True}, "init: 'b' is for"),
    ],
)
def test_spec_names_the_field(changes, word):
    with pytest.raises(UserError, match=f"bank 'b.*{word}"):
        BankSpec(**{"name": "b", "sites": ("attn.q",), **changes})


def test_factor():
    spec = BankSpec("b", ("attn.q",), 0, 1, rank=16, alpha=32.0)
    assert spec.s == 2
    assert spec.replace(rank_stabilised=True).s == 8


SPEC = BankSpec("b", ("attn.o", "mlp.down"), 1, 3, experts=4, rank=8, gate="token")


def test_first_weights_of_lora():
    params = bank.init(SPEC, TINY, jax.random.key(0))
    for site, leaves in params.items():
        D, O = site_shapes(TINY)[site]
        assert leaves["lora_a"].shape == (2, D, 4, 8)
        assert leaves["lora_b"].shape == (2, 4, 8, O)
        assert leaves["router"]["kernel"].shape == (2, D, 4)
        assert leaves["router"]["bias"].shape == (2, 4)
        assert "scale" not in leaves
        assert not np.any(leaves["lora_b"])
        bound = D**-0.5
        for leaf in (leaves["lora_a"], leaves["router"]["kernel"], leaves["router"]["bias"]):
            assert np.abs(leaf).max() <= bound
        a = np.asarray(leaves["lora_a"])
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(a.mean()) < 0.1 * bound
        assert not np.array_equal(a[0], a[1]) and not np.array_equal(a[:, :, 0], a[:, :, 1])
    assert bank.count(params) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_first_weights_with_the_other_factor_zero():
    for changes in ({}, {"form": "ffn_lora", "sites": ("mlp.gate", "mlp.up", "mlp.down")}):
        params = bank.init(SPEC.replace(init="b", **changes), TINY, jax.random.key(0))
        for leaves in (leaves for leaves in params.values() if "lora_a" in leaves):
            assert not np.any(leaves["lora_a"])
            b, bound = np.asarray(leaves["lora_b"]), 8**-0.5
            assert 0.9 * bound < np.abs(b).max() <= bound
            assert b.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not np.array_equal(b[:, 0], b[:, 1])


def test_first_weights_with_a_learned_scale():
    spec = SPEC.replace(gate="always", learned_scale=True, experts=2, rank=16)
    params = bank.init(spec, TINY, jax.random.key(0))
    for leaves in params.values():
        assert set(leaves) == {"lora_a", "lora_b", "scale"}
        assert not np.any(leaves["scale"])
        for name in ("lora_a", "lora_b"):
            assert np.std(leaves[name]) == pytest.approx(0.02, rel=0.1)


def test_what_begins_with_zero_in_both_factors_is_refused():
    with pytest.raises(UserError, match="init: 'b' is for"):
        BankSpec("b", **NETWORK, form="ffn", init="b")


NETWORK = {"sites": ("mlp.gate", "mlp.up", "mlp.down"), "gate": "token", "experts": 4}
# A field's other value, a bank where it acts, and some where it would change nothing.
ACTS = {
    "dropout": (0.1, {}, [{"form": "ffn"}, {"form": "ffn_beside"}]),
    "learned_scale": (True, {"form": "ffn_lora"}, [{"form": "ffn"}]),
    "rank_stabilised": (True, {}, [{"form": "ffn"}]),
    "top_k": (1, {}, [{"gate": "always"}, {"gate": "skill"}]),
    "renormalise": (False, {"gate": "language"}, [{"gate": "always"}]),
    "router_bias": (False, {"form": "ffn"}, [{"gate": "skill"}]),
    "forcing": ("off", {"gate": "language"}, [{}, {"gate": "always"}, {"gate": "skill"}]),
    "mix_per_layer": (True, {"gate": "skill"}, [{}, {"gate": "always"}, {"gate": "language"}]),
    "mix_softmax": (True, {"gate": "skill"}, [{}, {"gate": "always"}, {"form": "ffn"}]),
}


@pytest.mark.parametrize("field", ACTS)
def test_a_field_that_would_change_nothing_is_refused(field):
    """Where the bank is to be trained; one that is there is opened as it is."""
    value, acting, idle = ACTS[field]
    bank.check_acts(BankSpec("b", **{**NETWORK, **acting, field: value}))
    for bank_of in idle:
        bank.check_acts(BankSpec("b", **{**NETWORK, **bank_of}))
        with pytest.raises(UserError, match=rf"bank 'b'\.{field}: {value!r} would change nothing"):
            bank.check_acts(BankSpec("b", **{**NETWORK, **bank_of, field: value}))


def test_abstract_is_init():
    for changes in ({}, {"router_bias": False}, {"gate": "always", "learned_scale": True}):
        spec = SPEC.replace(**changes)
        init = functools.partial(bank.init, spec, TINY)
        assert jax.eval_shape(init, jax.random.key(0)) == bank.abstract(spec, TINY)


def test_two_banks_of_one_key_differ():
    """Knowledge and alignment banks made from one key must not start in the same directions."""
    spec = SPEC.replace(gate="always", experts=1, sites=("attn.o",), stop=2)
    a, b = (bank.init(spec.replace(name=n), TINY, jax.random.key(0)) for n in ("a", "b"))
    again = bank.init(spec.replace(name="a"), TINY, jax.random.key(0))
    x, y, z = (np.asarray(p["attn.o"]["lora_a"]).ravel() for p in (a, b, again))
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.3
    assert np.array_equal(x, z)


FRESH = {"gate": "skill", "experts": 3}
PICK = {"gate": "token", "experts": 3, "top_k": 1}
# A bank, whether it is fresh, and whether its gate's gradient is 0 whatever the other values are.
GATES = {
    "mixing": (FRESH, True, True),
    "mixing Λ": ({**FRESH, "learned_scale": True}, True, True),
    "mixing B": ({**FRESH, "init": "b"}, True, True),
    "mixing trained banks": (FRESH, False, False),
    "softmax": ({**FRESH, "mix_softmax": True}, True, False),
    "one pick": (PICK, False, True),
    "one pick of a network": ({**PICK, "form": "ffn"}, False, True),
    "one weighted pick": ({**PICK, "renormalise": False}, False, False),
    "two picks": ({**PICK, "top_k": 2}, False, False),
}


@pytest.mark.parametrize("name", GATES)
def test_a_bank_without_a_gradient_is_refused(name):
    """Fresh, no parameter at all has one; otherwise the router has none."""
    fields, fresh, dead = GATES[name]
    sites = NETWORK["sites"] if "form" in fields else ("mlp.up",)
    spec = BankSpec("b", sites, 0, 1, rank=2, **fields)
    base = naive.random_params(TINY)
    params = bank.init(spec, TINY, jax.random.key(0), base)
    if not fresh:
        params = naive.random_banks([spec], TINY)["b"]
    batch = naive.random_batch(TINY, rows=((5,),), length=5)
    ids = [batch[k] for k in ("tokens", "segment_ids", "positions")]

    @jax.jit
    @jax.grad
    def gradient(params):
        x, _, _ = hidden(AdaptedConfig(TINY, (spec,)), base, {"b": params}, *ids)
        return (x**2 * np.arange(x.shape[-1])[None, None]).sum()

    found = gradient(params)
    gate, _ = bank.split_gate(found)
    moved = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found if fresh else gate))
    assert (moved < 1e-4) == dead, moved
    if not dead:
        bank.check_gate_learns(spec, fresh)
        return
    with pytest.raises(UserError, match=r"bank 'b'\.(mix_softmax|top_k): .* n?ever learns"):
        bank.check_gate_learns(spec, fresh)


def test_a_single_pick_that_something_else_teaches():
    for fields in ({"balance_loss": 0.1}, {"z_loss": 0.1}, {"experts": 1},
                   {"gate": "language", "forcing": "always"}):  # fmt: skip
        bank.check_gate_learns(BankSpec("b", ("mlp.up",), **{**PICK, **fields}), False)
    with pytest.raises(UserError, match="top_k"):
        # The language of a token is not told at inference, where the router then decides.
        bank.check_gate_learns(BankSpec("b", ("mlp.up",), **{**PICK, "gate": "language"}), False)
