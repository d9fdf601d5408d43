"""Add, freeze, off, drop, merge, fold and stack keep the function they promise to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import trees
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import UserError
from tests import naive
from tests.adapters.conftest import SPECS, compiled_logits
from tests.naive import TINY, rel, tree_rel

# Unequal ranks, factors, ranges and kinds; attn.o and mlp.up carry more than one.
ALWAYS = tuple(s for s in SPECS if s.gate == "always")
ROSTER = {s.name: (s, "train") for s in SPECS}


def _real(batch, z):
    return np.asarray(z)[batch["segment_ids"] > 0]


def _check_folded(base, folded, specs, banks, batch):
    """The folded base alone computes what the base with its banks does, and needs each of them."""
    want = _real(batch, naive.logits(TINY, base, batch, naive.adapted(specs, banks)))
    exact = naive.f64(base)
    for spec in specs:
        s = spec.alpha / (spec.rank**0.5 if spec.rank_stabilised else spec.rank)
        for site, p in naive.f64(banks[spec.name]).items():
            kernel = trees.get(exact, f"layers.{site}.kernel")
            scale = p.get("scale", np.ones(p["lora_a"].shape[:1] + p["lora_a"].shape[2:]))
            for n, i in enumerate(range(spec.start, spec.stop)):
                for e in range(spec.experts):
                    kernel[i] += s * p["lora_a"][n, :, e] * scale[n, e] @ p["lora_b"][n, e]
    for path, leaf in trees.flatten(folded):
        old = trees.get(base, path)
        assert leaf.dtype == old.dtype and leaf.shape == old.shape
        # One rounding to the base's dtype: half a unit in the last place.
        ulp = 2.0**-8 if leaf.dtype == jnp.bfloat16 else 2.0**-22
        value = trees.get(exact, path)
        bound = ulp * np.abs(value) + 1e-6 * np.abs(value).max()
        assert np.all(np.abs(naive.f64(leaf) - value) <= bound), path
        if not path.endswith("kernel"):
            assert leaf is old
    got = _real(batch, compiled_logits(())(folded, {}, batch)[0])
    if jax.tree.leaves(base)[0].dtype == jnp.bfloat16:
        low = Execution(dtype=jnp.bfloat16)
        plain = _real(batch, compiled_logits(specs, low)(base, banks, batch)[0])
        tolerance = 2 * rel(plain, want)
    else:
        tolerance = 1e-5
    assert rel(got, want) <= tolerance
    bare = _real(batch, naive.logits(TINY, base, batch))
    assert rel(bare, want) > 0.1
    for spec in specs:
        others = [s for s in specs if s != spec]
        without = naive.logits(TINY, base, batch, naive.adapted(others, banks))
        assert rel(_real(batch, without), want) > max(5 * tolerance, 0.01), spec.name
        wrong = naive.adapted(specs, banks, scales={spec.name: 0.5 * spec.s})
        assert rel(_real(batch, naive.logits(TINY, base, batch, wrong)), want) > 2 * tolerance


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_fold(dtype, batch):
    base = naive.random_params(TINY, dtype=dtype)
    banks = naive.random_banks(ALWAYS, TINY, size=2.0)
    roster = {s.name: (s, "frozen") for s in ALWAYS}
    folded = lifecycle.fold(roster, banks, base)
    _check_folded(base, folded, ALWAYS, banks, batch)
    # With the others off, only what takes part in the forward is folded.
    roster = {s.name: (s, "train" if s is ALWAYS[1] else "off") for s in ALWAYS}
    one = lifecycle.fold(roster, banks, base)
    alone, _ = lifecycle.fold({"knowledge": (ALWAYS[1], "train")}, banks, base), None
    assert tree_rel(naive.f64(one), naive.f64(alone)) == 0
    assert tree_rel(naive.f64(one), naive.f64(base)) > 0.1


def test_merge_one_by_one_is_fold(base, banks, batch):
    """In float32; and the roster remembers what is inside the base."""
    roster = {s.name: (s, "train") for s in ALWAYS}
    merged = base
    for spec in ALWAYS:
        roster, merged = lifecycle.merge(roster, banks, merged, spec.name)
    assert {state for _, state in roster.values()} == {"merged"}
    assert lifecycle.active_banks(roster) == ()
    folded = lifecycle.fold({s.name: (s, "train") for s in ALWAYS}, banks, base)
    assert tree_rel(merged, folded) < 1e-6
    for again in (
        lambda: lifecycle.merge(roster, banks, merged, "knowledge"),
        lambda: lifecycle.drop(roster, banks, "knowledge"),
        lambda: lifecycle.set_state(roster, "knowledge", "train"),
    ):
        with pytest.raises(UserError, match="'knowledge' is merged"):
            again()


@pytest.mark.parametrize("call", ["merge", "fold"])
def test_donation_frees_the_old_kernels(call, base, banks):
    own = jax.tree.map(jnp.array, base)
    roster = {"attention": (SPECS[0], "train")}
    if call == "merge":
        _, new = lifecycle.merge(roster, banks, own, "attention", donate=True)
    else:
        new = lifecycle.fold(roster, banks, own, donate=True)
    for path, leaf in trees.flatten(own):
        touched = path.startswith("layers.attn.") and path.endswith("kernel")
        assert leaf.is_deleted() == touched, path
    assert tree_rel(new, lifecycle.fold(roster, banks, base)) < 1e-7


def test_token_gates_cannot_be_merged(base, banks):
    with pytest.raises(UserError, match="'noise' has gate 'token'"):
        lifecycle.merge(ROSTER, banks, base, "noise")
    with pytest.raises(UserError, match="depend on the token"):
        lifecycle.fold(ROSTER, banks, base)


def test_states(banks):
    """Frozen banks stay in the forward, those that are off or dropped do not."""
    roster = lifecycle.freeze(ROSTER, "attention")
    assert roster["attention"] == (SPECS[0], "frozen")
    assert lifecycle.active_banks(roster) == SPECS
    roster = lifecycle.set_state(roster, "noise", "off")
    assert lifecycle.active_banks(roster) == tuple(s for s in SPECS if s.name != "noise")
    assert ROSTER["noise"][1] == "train"
    dropped, left = lifecycle.drop(roster, banks, "noise")
    assert "noise" not in dropped and "noise" not in left and "noise" in banks
    assert lifecycle.active_banks(dropped) == lifecycle.active_banks(roster)
    assert all(left[name] is banks[name] for name in left)
    with pytest.raises(UserError, match=r"no bank 'nose'; known: attention"):
        lifecycle.drop(ROSTER, banks, "nose")
    with pytest.raises(UserError, match="state 'asleep' is none of"):
        lifecycle.set_state(ROSTER, "noise", "asleep")


def test_add():
    spec = BankSpec("new", ("attn.o",), 0, 1, rank=2)
    roster, banks = lifecycle.add({}, {}, spec, TINY, jax.random.key(0))
    assert roster == {"new": (spec, "train")} and not np.any(banks["new"]["attn.o"]["lora_b"])
    with pytest.raises(UserError, match="'new' is added twice"):
        lifecycle.add(roster, banks, spec, TINY, jax.random.key(0))


MEMBERS = (
    BankSpec("a", ("attn.o", "mlp.up"), 0, 2, rank=2, alpha=3.0),
    BankSpec("b", ("attn.o", "mlp.up"), 0, 2, rank=4, alpha=5.0, rank_stabilised=True),
    BankSpec("c", ("attn.o", "mlp.up"), 0, 2, rank=3, alpha=2.0, learned_scale=True),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_stack(dtype, batch):
    """One bank of three experts computes the sum of the three banks, run or folded."""
    base = naive.random_params(TINY, dtype=dtype)
    banks = naive.random_banks(MEMBERS, TINY, size=2.0)
    spec, params = lifecycle.stack("skills", [(s, banks[s.name]) for s in MEMBERS])
    assert (spec.name, spec.experts, spec.rank, spec.s) == ("skills", 3, 4, 1.0)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["attn.o"] == {
        "lora_a": (2, 24, 3, 4),
        "lora_b": (2, 3, 4, 16),
        "scale": (2, 3, 4),
    }
    want = _real(batch, naive.logits(TINY, base, batch, naive.adapted(MEMBERS, banks)))
    run = compiled_logits((spec,))
    assert rel(_real(batch, run(base, {"skills": params}, batch)[0]), want) < 1e-5
    for n in range(3):
        others = MEMBERS[:n] + MEMBERS[n + 1 :]
        some = naive.logits(TINY, base, batch, naive.adapted(others, banks))
        assert rel(_real(batch, some), want) > 0.05
    _check_folded(
        base,
        lifecycle.fold({"skills": (spec, "train")}, {"skills": params}, base),
        (spec,),
        {"skills": params},
        batch,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": 2}, "'a' is not one always-on expert"),
        ({"experts": 2, "gate": "token"}, "'a' is not one always-on expert"),
        ({"stop": 3}, "differs from"),
        ({"sites": ("attn.o",)}, "differs from"),
        ({"dropout": 0.1}, "differs from"),
    ],
)
def test_stack_names_the_odd_one(changes, words):
    odd = [(MEMBERS[0].replace(**changes), {}), (MEMBERS[1], {})]
    with pytest.raises(UserError, match=words):
        lifecycle.stack("skills", odd)
