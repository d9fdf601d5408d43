"""Requests side by side: every one is answered as if it were alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.config import DecoderConfig, RopeScaling
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import UserError
from medmoe_jax.inference import decoding, memory, steps
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from tests import naive

pytestmark = pytest.mark.slow

CONFIG = DecoderConfig(
    vocab_size=31, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20,
    max_positions=64, windows=(7, 0),
    rope_scaling=RopeScaling(
        "longrope", factor=4.0, original_max_positions=30, short_factor=(1.0, 2.0),
        long_factor=(3.0, 5.0),
    ),
)  # fmt: skip
SPECS = (
    BankSpec("attention", ("attn.q", "attn.v"), 0, 2, rank=2, alpha=4.0),
    BankSpec("noise", ("mlp.up",), 1, 2, experts=4, rank=2, gate="token", top_k=2),
    BankSpec("tongue", ("mlp.down",), 0, 1, experts=3, rank=2, gate="language", forcing="always"),
    BankSpec("skills", ("mlp.gate",), 0, 2, experts=3, rank=2, gate="skill"),
)
MESHES = {
    "one": ({}, 1),
    "four": ({"fsdp": 2, "tensor": 2}, 4),
    "eight": ({"fsdp": 4, "tensor": 2}, 8),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks and slots so few that short prompts are read in parts, and slots must grow."""
    for name, value in {"_CHUNK": 16, "_LEAST_SLOTS": 32, "_WORTH": 4}.items():
        monkeypatch.setattr(decoding, name, value)


@functools.cache
def parameters():
    return naive.random_params(CONFIG), naive.random_banks(SPECS, CONFIG)


def make_engine(mesh="one", rows=4, kernels="auto"):
    sizes, count = MESHES[mesh]
    mesh = make_mesh(sizes, jax.devices()[:count])
    execution = Execution(kernels=kernels, activations=batch_sharding(mesh, 3))
    config = AdaptedConfig(CONFIG, SPECS, execution)
    return Engine(config, *parameters(), {}, mesh, rows)


def requests():
    """Their lengths and wishes differ; many begin alike, in one language or in two."""
    rng = np.random.default_rng(7)
    start = rng.integers(0, 31, 26).tolist()
    laws = (Sampling(), Sampling(1.2, 0.9), Sampling(0.9, top_k=7, repetition_penalty=1.4))
    out = []
    for n in range(14):
        prompt = start[: (0, 9, 20, 26)[n % 4]] + rng.integers(0, 31, 1 + n % 5).tolist()
        law = dataclasses.replace(laws[n % 3], seed=n % 2, first=n)
        stops = ((int(rng.integers(31)),), tuple(rng.integers(0, 31, 2).tolist()))
        ask = Request(
            tuple(prompt), (3, 9, 17, 30)[n % 3], stops, law, n // 4 % 3 - 1, 2 if n else 0
        )
        out.append(ask)
    return out


def answers(rows, asked, arrivals=None, cancelled=()):
    """What is said to each request in the end; `arrivals` are the steps at which they come."""
    arrivals = arrivals or [0] * len(asked)
    numbers, tokens, ended = {}, {}, {}
    for step in range(200):
        for i, request in enumerate(asked):
            if arrivals[i] == step:
                numbers[rows.submit(request)] = i
        for one in rows.step():
            i = numbers[one.request]
            assert i not in ended
            tokens.setdefault(i, []).extend(one.tokens)
            if one.ended:
                ended[i] = one.ended
            elif i in cancelled:
                rows.cancel(one.request)
                ended[i] = "cancelled"
        if len(ended) == len(asked):
            break
    assert rows.step() == []
    return [(tokens[i], ended[i]) for i in range(len(asked))]


def assert_same(got, want):
    for (tokens, how), (others, other_how) in zip(got, want, strict=True):
        assert [t.id for t in tokens] == [t.id for t in others] and how == other_how
        np.testing.assert_allclose(
            [t.log_prob for t in tokens], [t.log_prob for t in others], atol=1e-4
        )


@functools.cache
def alone():
    """Each in fresh rows, where there is nothing to copy and nobody beside it."""
    engine = make_engine()
    return [answers(engine.decoding(), [request])[0] for request in requests()]


@pytest.mark.parametrize("mesh", ["one", "eight"])
def test_whoever_comes_when_each_is_answered_as_alone(mesh, monkeypatch):
    asked, want = requests(), alone()
    assert {how for _, how in want} == {"stop", "length"}
    read = []

    def counted(config, alternatives, weights, state, now, rows_R, sources_R):
        read.append(int(now.counts_R.sum()))
        return program(config, alternatives, weights, state, now, rows_R, sources_R)

    program = steps.read
    monkeypatch.setattr(steps, "read", counted)
    rows = make_engine(mesh).decoding()
    assert_same(answers(rows, asked), want)
    total = sum(len(request.prompt) for request in asked)
    assert sum(read) < total - 30  # what they begin with is copied
    rng = np.random.default_rng(1)
    arrivals = rng.integers(0, 12, len(asked)).tolist()
    assert_same(answers(rows, asked, arrivals), want)
    assert rows.slots >= 64
    read.clear()
    assert_same(answers(make_engine(mesh).decoding(pause=16), asked, arrivals), want)
    assert sum(read) < total
    some = [(tokens[:1], "cancelled") if len(tokens) > 9 else (tokens, how) for tokens, how in want]
    quitters = [i for i, (_, how) in enumerate(some) if how == "cancelled"]
    got = answers(rows, asked, arrivals[::-1], quitters)
    stayed = [i for i in range(len(asked)) if i not in quitters]
    assert quitters and stayed
    assert_same([got[i] for i in stayed], [want[i] for i in stayed])


def test_the_kernels_of_tpu_say_the_same():
    asked = requests()[1:3]
    rows = make_engine("four", kernels="interpret").decoding()
    assert_same(answers(rows, asked), alone()[1:3])


def test_rows_go_on_while_a_long_prompt_is_read():
    """Its whole prompt takes four calls, and nobody waits for more than two of them."""
    rng = np.random.default_rng(3)
    long = tuple(rng.integers(0, 31, 52).tolist())
    talker = Request((5, 7), 50)
    others = [Request(long, 8), Request((9,), 3), Request((*long[:40], 1), 8), Request(long, 2)]
    engine = make_engine()
    want = [answers(engine.decoding(), [request])[0] for request in (talker, *others)]
    rows = engine.decoding(stride=2, pause=16)
    numbers = [rows.submit(talker)]
    said = {numbers[0]: list(rows.step()[0].tokens)}
    numbers += [rows.submit(request) for request in others]
    firsts, lasts, ended = {}, {}, {}
    for step in range(60):
        told = rows.step()
        for one in told:
            said.setdefault(one.request, []).extend(one.tokens)
            firsts.setdefault(one.request, step)
            # First tokens come in steps of their own, between which all others go on.
            assert step <= lasts.setdefault(one.request, step) + 2
            lasts[one.request] = step
            ended |= {one.request: one.ended} if one.ended else {}
        if len(ended) == len(numbers):
            break
    assert_same([(said[n], ended[n]) for n in numbers], want)
    # The short one did not stand behind the long one.
    assert firsts[numbers[2]] == 0 and 3 <= firsts[numbers[1]] < 12

    rows = engine.decoding(stride=2, pause=16)
    rows.submit(talker)
    assert len(rows.step()[0].tokens) == 1  # told before the others
    quitter = rows.submit(others[0])
    assert [one.request for one in rows.step()] == [0]
    rows.cancel(quitter)  # in the midst of its prompt
    again = rows.submit(others[0])
    found = [token for _ in range(12) for one in rows.step() if one.request == again
             for token in one.tokens]  # fmt: skip
    assert [token.id for token in found] == [token.id for token in want[1][0]]


def test_log_probabilities_are_those_of_the_whole_text():
    """Long texts and short ones, by forward passes without a cache."""
    engine, asked = make_engine(), requests()
    whole = [i for i, (_, how) in enumerate(alone()) if how == "length"]
    texts = [[*asked[i].prompt, *(t.id for t in alone()[i][0])] for i in whole]
    limit = CONFIG.rope_scaling.original_max_positions
    assert {len(text) > limit for text in texts} == {False, True}
    told = engine.told(texts, 2, [asked[i].language for i in whole])
    for i, row in zip(whole, told, strict=True):
        tokens = alone()[i][0]
        rest = row[len(asked[i].prompt) :]
        assert [t.id for t in rest] == [t.id for t in tokens]
        np.testing.assert_allclose(
            [t.log_prob for t in rest], [t.log_prob for t in tokens], atol=1e-4
        )
        for mine, theirs in zip(tokens, rest, strict=True):
            assert len(mine.alternatives) == asked[i].alternatives
            if mine.alternatives:
                assert mine.alternatives[0][1] >= mine.log_prob - 1e-6
                np.testing.assert_allclose(mine.alternatives, theirs.alternatives, atol=1e-4)


def test_what_cannot_be_answered(monkeypatch):
    rows = make_engine().decoding()
    for request, message in (
        (Request((), 4), "at least one token"),
        (Request((1,), 0), "max_tokens: 0 is below 1"),
        (Request((1,) * 60, 5), "prompt of 60 tokens and 5 new tokens do not fit a context of 64"),
        (Request((1,), 4, stops=((),)), "stops"),
        (Request((1,), 4, alternatives=32), "alternatives: 32 is above 31"),
    ):
        with pytest.raises(UserError, match=message):
            rows.submit(request)
    rows.cancel(0)
    assert rows.step() == []
    monkeypatch.setattr(memory, "cache_bytes", lambda *_: 2**50)
    with pytest.raises(UserError, match=r"4 rows of 32 tokens take 1048576\.0 GiB"):
        rows.submit(Request((1,), 4))
