"""AdaLoRA's allocation and regulariser against float64 loops over triplets and entries.

Axes: N layers of the bank, D input width, E experts, r rank, O output width.
"""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import adalora
from medmoe_jax.adapters.adalora import Allocator, BudgetSchedule
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.errors import UserError
from tests.naive import TINY, check_gradient, f64, random_banks, rel

SPEC = BankSpec("skill", ("attn.q", "mlp.down"), 1, 3, experts=2, rank=3, alpha=5.0,
                learned_scale=True)  # fmt: skip
ALLOCATOR = Allocator("skill", 1, t_init=2, t_final=3, every=2, beta1=0.8, beta2=0.6)
STEPS = 13
PLAN = BudgetSchedule(ALLOCATOR, SPEC, STEPS)
SITES = tuple(itertools.product(SPEC.sites, range(2), range(2)))  # (site, layer, expert)


@functools.cache
def inputs():
    """`(parameters, gradients)` of every update; triplets matter more or less, not by layer."""
    rng = np.random.default_rng(5)
    out = []
    for t in range(STEPS):
        params = random_banks((SPEC,), TINY, seed=2 * t)["skill"]
        grads = random_banks((SPEC,), TINY, seed=2 * t + 1)["skill"]
        weight = {site: rng.uniform(0.5, 2.0, (2, 2, 3)) for site in SPEC.sites}
        for site, w in weight.items():
            # So that A and B decide as much as Λ does.
            grads[site]["lora_a"] *= jnp.float32(12 * w)[:, None]
            grads[site]["lora_b"] *= jnp.float32(36 * w)[..., None]
        out.append((params, grads))
    return out


def entries(tree, site, n, e, i):
    """A triplet's Λ, A and B as three vectors."""
    p = tree[site]
    return p["scale"][n, e, i : i + 1], p["lora_a"][n, :, e, i], p["lora_b"][n, e, i]


def budget(t):
    """The schedule in exact fractions."""
    first, last, freeze = 24, 8, STEPS - 3
    if t <= 2:
        return first
    if t > freeze:
        return last
    return int(last + (first - last) * (1 - Fraction(t - 2, freeze - 2)) ** 3)


def naive_run(change=""):
    """For every update: triplet scores, threshold, which Λ are cleared; `change` spoils a term."""
    state = {}
    chosen, out = set(), []
    for t, (params, grads) in enumerate(inputs(), 1):
        params, grads = f64(params), f64(grads)
        score = {}
        for site, n, e in SITES:
            for i in range(3):
                key = (site, n, e, i)
                parts = []
                for kind, (p, g) in enumerate(
                    zip(entries(params, *key), entries(grads, *key), strict=True)
                ):
                    old_mean, old_uncertain = state.get((key, kind), (0 * p, 0 * p))
                    new = np.abs(p * g)
                    if change == "signed":
                        new = p * g
                    mean = 0.8 * old_mean + 0.2 * new
                    off = np.abs(new - (old_mean if change == "old mean" else mean))
                    uncertain = 0.6 * old_uncertain + 0.4 * off
                    if t >= STEPS - 3 and change != "never stops":
                        mean, uncertain = old_mean, old_uncertain
                    state[key, kind] = mean, uncertain
                    entry = mean if change == "sensitivity only" else mean * uncertain
                    parts.append(entry.sum() if change == "sum" else entry.mean())
                if change in ("no Λ", "no A", "no B"):
                    parts["ΛAB".index(change[-1])] = 0.0
                score[key] = sum(parts)
        count = 24 - budget(t)
        if change == "per site":
            groups = [[k for k in score if k[0] == site] for site in SPEC.sites]
        else:
            groups = [list(score)]
        lowest = {k for g in groups for k in sorted(g, key=score.get)[: count // len(groups)]}
        acts = (2 < t < STEPS - 3 and t % 2 == 0) or t == STEPS - 3
        if acts:
            chosen = lowest
        if t > STEPS - 3:
            acts = change != "once"
        out.append((score, sorted(score.values())[count - 1] if count else -np.inf,
                    chosen if acts else set(), state.copy()))  # fmt: skip
    return out


@functools.cache
def library_run():
    """The same from the library, compiled once."""
    advance = jax.jit(functools.partial(adalora.advance, PLAN))
    state, out = adalora.start(SPEC, inputs()[0][0]), []
    for t, (params, grads) in enumerate(inputs(), 1):
        cleared, state = advance(jnp.int32(t), params, grads, state)
        out.append(jax.device_get((cleared, state)))
    return out


def cleared_keys(masks):
    return {(site, *map(int, k)) for site, mask in masks.items() for k in np.argwhere(mask)}


def test_every_step_of_a_schedule():
    """Importance, scores, and exactly the same triplets cleared."""
    allocations = 0
    runs = zip(library_run(), naive_run(), strict=True)
    for t, ((cleared, state), (score, limit, chosen, memory)) in enumerate(runs, 1):
        assert PLAN.budget(t) == budget(t)
        for kind, leaf in enumerate(("scale", "lora_a", "lora_b")):
            for part, tree in enumerate((state.sensitivity, state.uncertainty)):
                got = np.concatenate([entries(tree, *key)[kind] for key in score])
                want = np.concatenate([memory[key, kind][part] for key in score])
                assert rel(got, want) < 1e-5, (t, leaf)
        scores = adalora.scores(state)
        assert rel([scores[s][n, e, i] for s, n, e, i in score], list(score.values())) < 1e-5
        if np.isfinite(limit):
            next_one = min(v for v in score.values() if v > limit)
            assert next_one / limit > 1 + 1e-4, "near-tie in the test's inputs"
        assert cleared_keys(cleared) == chosen, t
        assert not chosen or len(chosen) == 24 - budget(t)
        allocations += bool(chosen)
        kept = {(s, *map(int, k)) for s, m in state.kept.items() for k in np.argwhere(m)}
        assert len(kept) == 24 - len(cleared_keys(cleared)) or not chosen
    assert allocations == 4 + 3  # updates 4, 6, 8 and 10; then 11, 12 and 13 again
    masks = [cleared_keys(cleared) for cleared, _ in library_run()[9:]]
    assert all(mask == masks[0] for mask in masks)


CHANGES = ("signed", "old mean", "never stops", "sensitivity only", "sum", "no Λ", "no A", "no B",
           "per site", "once")  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_term_decides(change):
    """The comparison above would see any part of the method missing."""
    right, wrong = naive_run(), naive_run(change)
    if change in ("never stops", "old mean"):
        # Seen in the scores alone: the first chooses nothing by them, the second scales them all.
        scores = [np.array(list(run[-1][0].values())) for run in (right, wrong)]
        assert rel(*scores) > 0.01
    else:
        assert any(a[2] != b[2] for a, b in zip(right, wrong, strict=True))


def test_budgets():
    """Constant, cubic, constant; in whole triplets for every length of the phases."""
    for t_init, t_final, steps in ((0, 0, 7), (5, 0, 6), (0, 4, 9), (3, 3, 40)):
        plan = BudgetSchedule(Allocator("skill", 2, t_init, t_final), SPEC, steps)
        budgets = [plan.budget(t) for t in range(steps + 1)]
        assert budgets[: t_init + 1] == [24] * (t_init + 1)
        assert budgets[steps - t_final :] == [16] * (t_final + 1)
        assert all(a >= b for a, b in itertools.pairwise(budgets))
        for t in range(t_init + 1, steps - t_final):
            left = 1 - Fraction(t - t_init, steps - t_final - t_init)
            assert abs(budgets[t] - (16 + 8 * left**3)) <= 1
    same = BudgetSchedule(Allocator("skill", 3), SPEC, 4)
    assert {same.budget(t) for t in range(5)} == {24}
    advance = jax.jit(functools.partial(adalora.advance, same))
    state = adalora.start(SPEC, inputs()[0][0])
    for t in range(1, 5):
        cleared, state = advance(jnp.int32(t), *inputs()[t], state)
        assert not cleared_keys(cleared)


def test_as_many_are_cleared_as_asked_where_scores_are_equal():
    """By a plain sort over (score, place in the matrix, site, layer, expert)."""
    rng = np.random.default_rng(3)
    tied = {site: rng.integers(0, 3, (2, 2, 3)).astype(np.float32) for site in SPEC.sites}
    lowest = jax.jit(adalora.lowest)
    for scores in (tied, {site: 0 * s for site, s in tied.items()}):
        order = sorted(
            ((site, n, e, i) for site, n, e in SITES for i in range(3)),
            key=lambda k: (scores[k[0]][k[1:]], k[3]),  # `sorted` keeps the rest in order
        )
        for cut in range(25):
            assert cleared_keys(lowest(scores, cut)) == set(order[:cut])
    # Where nothing tells triplets apart, every matrix keeps its share.
    cleared = lowest(scores, 16)
    assert all((np.sum(mask, -1) == 2).all() for mask in cleared.values())


@pytest.mark.parametrize(("t_init", "t_final", "steps"), [(0, 2, 3), (0, 0, 1)])
def test_triplets_are_not_chosen_before_any_importance(t_init, t_final, steps):
    allocator = Allocator("skill", 1, t_init, t_final)
    with pytest.raises(UserError, match=f"t_final: with {t_final} of {steps} steps .*at update 1"):
        BudgetSchedule(allocator, SPEC, steps)
    assert BudgetSchedule(allocator, SPEC, steps + 1).freeze == 2


@pytest.mark.parametrize("silent", [False, True], ids=["some-experts", "all"])
def test_a_schedule_keeps_its_budget_whatever_the_gradients(silent):
    """Experts that no token picked have none, and every score of theirs is 0."""
    plan = BudgetSchedule(Allocator("skill", 1), SPEC, 4)
    advance = jax.jit(functools.partial(adalora.advance, plan))
    params, grads = inputs()[0]
    picked = np.array([0.0, 0.0 if silent else 1.0], np.float32)  # by expert
    shape = {"lora_a": (1, 1, 2, 1), "lora_b": (1, 2, 1, 1), "scale": (1, 2, 1)}
    grads = {s: {k: g[k] * picked.reshape(shape[k]) for k in shape} for s, g in grads.items()}
    state = adalora.start(SPEC, params)
    for t in range(1, 5):
        cleared, state = advance(jnp.int32(t), params, grads, state)
        assert len(cleared_keys(cleared)) == 24 - plan.budget(t)
        if t == 1 and not silent:  # the budget leaves some of the silent expert's
            assert all(mask[:, 1].all() for mask in state.kept.values())


def naive_regulariser(params, squared):
    norms = []
    for site, n, e in SITES:
        a, b = params[site]["lora_a"][n, :, e].T, params[site]["lora_b"][n, e].T  # [r, D], [O, r]
        for gram in (a @ a.T, b.T @ b):
            total = sum((gram[i, j] - (i == j)) ** 2 for i in range(3) for j in range(3))
            norms.append(total if squared else np.sqrt(total))
    return np.mean(norms)


@pytest.mark.parametrize("squared", [False, True], ids=["norm", "squared"])
def test_regulariser_and_its_gradient(squared):
    term, banks = Orthonormality("skill", squared=squared), {"skill": inputs()[0][0]}
    value, grads = jax.jit(jax.value_and_grad(lambda b: term.value({"skill": SPEC}, b)))(banks)
    assert value == pytest.approx(naive_regulariser(f64(banks)["skill"], squared), rel=1e-5)
    check_gradient(
        lambda b: naive_regulariser(b["skill"], squared), banks, grads, np.random.default_rng(0)
    )
    sites = grads["skill"].values()
    assert all(np.any(p["lora_a"]) and np.any(p["lora_b"]) for p in sites)
    squares = np.asarray(term.measure({"skill": SPEC}, banks))
    assert term.figures(squares) == {"orthonormality/skill/largest": np.sqrt(squares.max())}


def test_the_regulariser_of_orthonormal_factors():
    """It is zero there, and so is its gradient, not NaN."""
    spec = SPEC.replace(sites=("attn.q",), start=0, stop=1, experts=1)
    params = {
        "lora_a": jnp.eye(16, 3)[None, :, None],
        "lora_b": jnp.eye(3, 24)[None, None],
        "scale": jnp.ones((1, 1, 3)),
    }
    term = Orthonormality("skill")
    value, grads = jax.value_and_grad(lambda b: term.value({"skill": spec}, b))(
        {"skill": {"attn.q": params}}
    )
    assert value == 0
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(grads))
    with pytest.raises(UserError, match="bank 'skill' has no low-rank factors"):
        term.value({"skill": BankSpec("skill", ("mlp.gate", "mlp.up", "mlp.down"), 0, 1, "ffn", 2,
                                      gate="token")}, {})  # fmt: skip


def holed(gaps):
    """Random parameters with Λ zero in some triplets."""
    params = dict(inputs()[0][0])
    for (site, n, e), triplets in gaps.items():
        scale = params[site]["scale"].at[n, e, jnp.array(triplets)].set(0.0)
        params[site] = {**params[site], "scale": scale}
    return params


def test_ranks_are_the_triplets_that_do_something():
    gaps = {key: ([0], [1, 2], [0, 2], [0, 1, 2])[i % 4] for i, key in enumerate(SITES)}
    assert adalora.ranks(SPEC, holed(gaps)) == {site: [[2, 1], [1, 0]] for site in SPEC.sites}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_rank": 0}, "target_rank: 0 is below 1"),
        ({"t_init": -1}, "t_init: -1 is below 0"),
        ({"t_final": -1}, "t_final: -1 is below 0"),
        ({"every": 0}, "every: 0 is below 1"),
        ({"beta1": 1.0}, "beta1: 1.0 is not below 1"),
        ({"beta2": 0.0}, "beta2: 0.0 is not above 0"),
    ],
)
def test_allocators_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        Allocator(**{"bank": "skill", "target_rank": 1, **fields})
