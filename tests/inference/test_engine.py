"""Scoring and cached generation against float64 forward passes of single texts."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import UserError
from medmoe_jax.inference import steps
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.requests import Token
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from tests import naive

CONFIG = DecoderConfig(
    vocab_size=31, vocab_used=29, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4,
    d_ff=20, max_positions=48, windows=(5, 0),
)  # fmt: skip
SPECS = (
    BankSpec("attention", ("attn.q", "attn.v"), 0, 2, rank=2, alpha=4.0),
    BankSpec("noise", ("mlp.up", "mlp.down"), 1, 2, experts=4, rank=2, gate="token", top_k=2),
    BankSpec("unused", ("mlp.gate",), 0, 2, rank=2),
)
ACTIVE = SPECS[:2]
MESHES = {
    "one": ({}, 1),
    "eight": ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    "sequences": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 8),
}


@functools.cache
def parameters():
    return naive.random_params(CONFIG), naive.random_banks(SPECS, CONFIG)


def make_engine(mesh="one", batch=4, specs=ACTIVE):
    sizes, count = MESHES[mesh]
    mesh = make_mesh(sizes, jax.devices()[:count])
    execution = Execution(activations=batch_sharding(mesh, 3))
    return Engine(AdaptedConfig(CONFIG, specs, execution), *parameters(), {}, mesh, batch)


def log_probs(ids, specs=ACTIVE, base=None):
    """Float64 log-probabilities `[T, V]` of the next token after each of the ids."""
    own, banks = parameters()
    base = own if base is None else base
    batch, _ = naive.pack([ids], [[0]], len(ids))
    z = naive.logits(CONFIG, base, batch, naive.adapted(specs, banks))[0]
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def naive_score(prompt, completion, specs=ACTIVE, base=None):
    ids = [*prompt, *completion]
    z = log_probs(ids, specs, base)
    return sum(z[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def draw(rng, length):
    return rng.integers(1, CONFIG.vocab_used, length).tolist()


@functools.cache
def questions():
    """Prompts of 1 to 30 tokens with 1 to 5 completions of 1 to 7 tokens."""
    rng = np.random.default_rng(0)
    prompts = [draw(rng, n) for n in (1, 2, 30, 7, 17, 3)]
    completions = [[draw(rng, c) for c in counts] for counts in
                   ((1, 7), (2,), (1, 1, 3), (5, 4, 3, 2, 1), (2, 2), (6,))]  # fmt: skip
    return prompts, completions


@functools.cache
def answers():
    prompts, completions = questions()
    return [[naive_score(p, c) for c in cs] for p, cs in zip(prompts, completions, strict=True)]


def assert_scores(got, want):
    assert [len(row) for row in got] == [len(row) for row in want]
    flat = [np.concatenate(x) for x in (got, want)]
    np.testing.assert_allclose(*flat, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_scores(mesh):
    """Very different lengths in a row, uneven choices, a batch not filled."""
    engine = make_engine(mesh)
    assert_scores(engine.score(*questions()), answers())
    assert engine.truncated == 0


def test_a_batch_scores_as_its_rows_do():
    prompts, completions = questions()
    engine = make_engine(batch=1)
    alone = [engine.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert_scores(alone, answers())
    order = [3, 0, 5, 2, 4, 1]
    mixed = make_engine(batch=6).score([prompts[i] for i in order], [completions[i] for i in order])
    assert_scores(mixed, [answers()[i] for i in order])


def test_trained_leaves_take_the_place_of_the_bases():
    """At the top and in the layers, whether the base has a leaf of that name or not."""
    base, banks = parameters()
    rng = np.random.default_rng(5)
    names = ("embed", "head", "final_norm", "layers.attn_norm", "layers.attn.v.kernel")
    leaves = trees.unflatten(
        (name, trees.get(base, name) + 0.3 * rng.standard_normal(trees.get(base, name).shape))
        for name in names
    )
    config, mesh = AdaptedConfig(CONFIG, ACTIVE), make_mesh({}, jax.devices()[:1])
    prompts, completions = [[3, 7, 2, 9]], [[[4, 5, 6], [8]]]
    own = jax.tree.map(jnp.float32, leaves)
    got = [
        Engine(config, frozen, banks, own, mesh, 1).score(prompts, completions)
        for frozen in (base, trees.without(base, leaves))
    ]
    want = [[naive_score(prompts[0], c, base=trees.overlay(base, leaves)) for c in completions[0]]]
    assert_scores(got[0], want)
    assert got[0] == got[1]
    for name in names:
        rest = trees.without(leaves, trees.unflatten([(name, None)]))
        less = naive_score(prompts[0], completions[0][0], base=trees.overlay(base, rest))
        assert abs(less - want[0][0]) > 1e-2, name


def test_every_bank_matters_and_inactive_ones_do_not():
    prompts, completions = questions()
    for specs in (SPECS[:1], SPECS[1:2], ()):
        wrong = naive_score(prompts[2], completions[2][2], specs)
        assert abs(wrong - answers()[2][2]) > 0.1
    bare = make_engine(specs=()).score(prompts[2:3], completions[2:3])
    want = [[naive_score(prompts[2], c, ()) for c in completions[2]]]
    assert_scores(bare, want)


def test_every_token_of_a_text_is_told():
    texts, engine = questions()[0], make_engine()
    for ids, row in zip(texts, engine.told(texts, 3), strict=True):
        z = log_probs(ids)
        assert [token.id for token in row] == ids and row[0] == Token(ids[0], 0.0)
        for t, token in enumerate(row[1:]):
            best = np.argsort(-z[t])[:3]
            np.testing.assert_allclose(token.log_prob, z[t, ids[t + 1]], atol=1e-4)
            np.testing.assert_allclose(
                token.alternatives, list(zip(best, z[t, best], strict=True)), atol=1e-4
            )
    for wrong, message in (([], "a text of 0 tokens"), ([1] * 49, "a text of 49 tokens")):
        with pytest.raises(UserError, match=message):
            engine.told([wrong])


def test_batches_are_rounded_up_to_the_mesh():
    assert make_engine("eight", batch=1).batch == 4
    assert make_engine("eight", batch=5).batch == 8
    assert make_engine("one", batch=5).batch == 5


def naive_greedy(prompt, max_tokens, stops):
    out = []
    while len(out) < max_tokens:
        z = log_probs([*prompt, *out])[-1]
        first, second = np.sort(z)[::-1][:2]
        assert first - second > 1e-3, "near-tie in the test's inputs"
        out.append(int(z.argmax()))
        if out[-1] in stops:
            return out[:-1]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_generation(mesh):
    prompts = questions()[0]
    free = [naive_greedy(p, 10, ()) for p in prompts]
    stops = (free[0][4], free[3][2])
    want = [naive_greedy(p, 10, stops) for p in prompts]
    assert len({len(ids) for ids in want}) > 1
    engine = make_engine(mesh)
    assert engine.generate(prompts, 10, stops) == want
    assert engine.generate(prompts, 10, (-1,)) == free


def test_ids_that_follow_each_other_end_a_generation(monkeypatch):
    """And are its end, unlike an id alone: where their text begins is not known here."""
    prompts = questions()[0]
    engine = make_engine()
    free = engine.generate(prompts, 10, (-1,))
    runs = [tuple(free[0][3:6]), tuple(free[2][:2])]  # one from the very start
    want = []
    for ids in free:
        ends = [n for n in range(11) for run in runs if tuple(ids[max(n - len(run), 0) : n]) == run]
        want.append(ids[: min(ends, default=10)])
    assert len(want[0]) == 6 and len(want[2]) == 2
    assert engine.generate(prompts, 10, runs) == want
    program, taken = steps.go_on, []

    def counted(*arguments):
        taken.append(program(*arguments))
        return taken[-1]

    monkeypatch.setattr(steps, "go_on", counted)
    assert engine.generate(prompts[:1], 10, runs[:1]) == want[:1]
    assert sum(int(n) for _, _, n in taken) == 5  # it ended there, not after 10


@pytest.mark.slow
def test_generation_alone_equals_generation_in_a_batch():
    """Token-gated banks included: greedy and sampled, whatever shares the batch."""
    prompts = questions()[0]
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    whole = make_engine(batch=6).generate(prompts, 6, (-1,), sampling)
    assert make_engine(batch=2).generate(prompts, 6, (-1,), sampling) == whole
    assert make_engine(batch=1).generate(prompts[:1], 6, (-1,), sampling) == whole[:1]
    assert make_engine("eight").generate(prompts, 6, (-1,), sampling) == whole
    later = dataclasses.replace(sampling, first=2)
    assert make_engine(batch=6).generate(prompts[2:], 6, (-1,), later) == whole[2:]
    assert make_engine(batch=6).generate(prompts[2:], 6, (-1,), sampling) != whole[2:]
    assert make_engine(batch=6).generate(prompts, 6, (-1,), Sampling(0.8, 0.9, 4)) != whole


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampling_statistics(top_p):
    """4,000 first tokens of one prompt, in batches, against the exact distribution."""
    prompt, n, temperature = questions()[0][3], 4000, 1.6
    z = log_probs(prompt)[-1] / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1] if top_p < 1 else order
    want = np.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    sampling = Sampling(temperature, top_p, seed=1)
    drawn = make_engine(batch=500).generate([prompt] * n, 1, (-1,), sampling)
    counts = collections.Counter(ids[0] for ids in drawn)
    got = np.array([counts[i] / n for i in range(len(p))])
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want > 0))
    assert np.all(np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / n) + 1e-9)
    assert len(kept) > 2
    first, second = drawn[:500], drawn[500:1000]
    assert first != second


def test_every_step_draws_anew():
    """Nearly uniform draws: with one key for all steps a row would repeat one token."""
    rows = make_engine().generate(questions()[0][:4], 8, (-1,), Sampling(temperature=1e4))
    assert all(len(set(row)) > 3 for row in rows) and len({tuple(row) for row in rows}) == 4


def test_a_cold_sample_is_greedy():
    prompts = questions()[0]
    engine = make_engine()
    cold = engine.generate(prompts, 5, (-1,), Sampling(temperature=1e-4))
    narrow = engine.generate(prompts, 5, (-1,), Sampling(temperature=1.0, top_p=1e-6))
    assert cold == narrow == engine.generate(prompts, 5, (-1,))


def test_long_prompts_are_cut_on_the_left_and_counted():
    rng = np.random.default_rng(5)
    long, short = draw(rng, 60), draw(rng, 4)
    completion = draw(rng, 3)
    engine = make_engine()
    got = engine.score([long, short], [[completion], [completion]])
    kept = long[-(CONFIG.max_positions - 2) :]  # the completion's last token is never read
    want = [[naive_score(kept, completion)], [naive_score(short, completion)]]
    assert_scores(got, want)
    assert engine.truncated == 1
    engine.generate([long, long, short], 8, (-1,))
    assert engine.truncated == 3
    assert make_engine().generate([long], 8, (-1,)) == [naive_greedy(long[-40:], 8, ())]


def test_what_does_not_fit_is_an_error():
    engine = make_engine()
    with pytest.raises(UserError, match="48 new tokens do not fit a context of 48"):
        engine.generate([[1, 2]], 48, (-1,))
    with pytest.raises(UserError, match="49 new tokens do not fit a context of 48"):
        engine.score([[1]], [[[2] * 49]])
    assert_scores(engine.score([[1]], [[[2] * 48]]), [[naive_score([1], [2] * 48)]])
    for prompts, completions in (([[]], [[[1]]]), ([[1]], [[[]]]), ([[1]], [[[1], []]])):
        with pytest.raises(UserError, match="at least one token"):
            engine.score(prompts, completions)
    with pytest.raises(UserError, match="at least one token"):
        engine.generate([[1], []], 4, (-1,))
    with pytest.raises(UserError, match="max_tokens: 0 is below 1"):
        engine.generate([[1]], 0, (-1,))
    for name, values in {
        "temperature": (-0.1, math.nan, math.inf),
        "top_p": (-0.1, 1.1, math.nan),
        "seed": (2**63,),
        "first": (-1,),
    }.items():
        for value in values:
            with pytest.raises(UserError, match=f"{name}: {value} is "):
                Sampling(**{name: value})
    assert engine.score([], []) == [] and engine.generate([], 4, (-1,)) == []
