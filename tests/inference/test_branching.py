"""Trees of prompts and completions against loops, what rows of them hold, and what that costs."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.attention import continued
from medmoe_jax.base.config import RopeScaling
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context
from medmoe_jax.inference import branching, engine
from medmoe_jax.inference.branching import grow, lay, pack, portions
from medmoe_jax.inference.engine import Engine
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from tests import naive

IDS = st.lists(st.integers(1, 3), min_size=1, max_size=4)  # of three ids: many begin alike


@given(st.lists(IDS, min_size=1, max_size=6), IDS)
@settings(max_examples=60, deadline=None)
def test_a_tree_holds_each_beginning_once_and_each_slot_sees_its_own(completions, prompt):
    tree = grow(prompt, sorted(completions), 5)
    beginnings = {(*prompt, *c[:n]) for c in completions for n in range(len(c))}
    assert len(tree.tokens) == len(prompt) - 1 + len(beginnings)
    last = np.full((1, 32), 31)  # one length compiles once
    last[0, : len(tree.last)] = tree.last
    sees = np.asarray(continued(last))[0, : len(tree.last)]
    texts = [[tree.tokens[k] for k in np.flatnonzero(row)] for row in sees]
    assert {tuple(t) for t in texts[len(prompt) - 1 :]} == beginnings
    assert all(sees[n, n] and tree.positions[n] == len(t) - 1 for n, t in enumerate(texts))
    asked = zip(tree.at, tree.targets, strict=True)
    want = [(c[:n], c[n]) for c in sorted(completions) for n in range(len(c))]
    assert [(texts[at][len(prompt) :], target) for at, target in asked] == want
    assert tree.longest == len(prompt) + max(map(len, completions)) and tree.language == 5


def drawn(rng, prompts, completions):
    """1,000 items of four options, their lengths within limits, as medmcqa's are."""
    return [
        (
            rng.integers(1, 50_000, rng.integers(*prompts, endpoint=True)).tolist(),
            [rng.integers(1, 50_000, rng.integers(*completions, endpoint=True)).tolist()
             for _ in range(4)],
        )
        for _ in range(1000)
    ]  # fmt: skip


@pytest.mark.parametrize("completions", [(1, 15), (1, 1)], ids=["texts", "letters"])
@pytest.mark.parametrize("prompts", [(30, 400), (280, 300), (257, 262), (500, 2000)])
def test_what_is_computed_is_what_differs(prompts, completions):
    """Slots that the decoder runs, filled or not, over tokens that must be run: those of each
    prompt and those of its options, but for each one's last.

    And products: linear layers and attention over whole rows, by count, against each item in a row
    of its own length, in a decoder of SmolLM2's widths, where attention weighs much.
    """
    items = drawn(np.random.default_rng(0), prompts, completions)
    trees = [grow(p, some, -1) for p, cs in items for some in portions(len(p), cs)]
    needed = sum(len(p) + sum(len(c) - 1 for c in cs) for p, cs in items)
    batches = pack([tree.size for tree in trees], 16, 4, 3072)
    assert sorted(i for one in batches for row in one.rows for i in row) == list(range(len(trees)))
    assert sum(one.count * one.slots for one in batches) <= 1.2 * needed
    spent = sum(one.count * one.slots * (1 + one.slots / 3072) for one in batches)
    least = sum(len(t.tokens) * (1 + len(t.tokens) / 3072) for t in trees)
    assert spent <= 1.2 * least
    assert len({(one.count, one.slots) for one in batches}) <= (2 if max(prompts) < 1024 else 6)


def test_long_trees_stand_among_others_and_no_row_overflows():
    rng = np.random.default_rng(1)
    sizes = [3000, *rng.integers(20, 300, 500).tolist()]
    first, *others = pack(sizes, 8, 2, 1e9)
    assert first.slots >= 3000 and {one.slots for one in others[:-1]} <= {others[0].slots}
    for one in (first, *others):
        used = [sum(sizes[i] for i in row) for row in one.rows]
        assert max(used) <= one.slots and len(one.rows) <= one.count <= 8
    assert sum(sizes[i] for row in first.rows for i in row) > 0.95 * 8 * first.slots
    assert [(one.count, one.slots) for one in pack([10, 20], 8, 2, 1e9)] == [(2, 32)]
    assert pack([], 8, 2, 1.0) == []


def test_no_number_of_completions_makes_a_tree_endless():
    labels = [[n // 100, n % 100] for n in range(1000)]
    parts = portions(100, labels)
    assert [ids for some in parts for ids in some] == labels
    assert max(grow([1] * 100, some, -1).size for some in parts) <= 512
    assert len(portions(5000, labels)) == 1


def test_rows_say_what_belongs_to_whom():
    trees = [grow([1, 2], [[3, 4], [3, 5]], 7), grow([6], [[8]], -1)]
    got = lay(trees, branching.Filled([[0, 1]], 2, 6))
    assert got.tokens[0].tolist() == [1, 2, 3, 6, 0, 0]
    assert got.segments[0].tolist() == [1, 1, 1, 2, 0, 0]
    assert got.positions[0].tolist() == [0, 1, 2, 0, 0, 0]
    assert got.languages[0].tolist() == [7, 7, 7, -1, -1, -1]
    assert got.last[0].tolist() == [2, 2, 2, 3, 4, 5]
    assert got.lengths[0].tolist() == [4, 4, 4, 2, 0, 0]
    assert got.at[0].tolist() == [1, 2, 1, 2, 3, 0]
    assert got.targets[0].tolist() == [3, 4, 3, 5, 8, -1]
    assert (got.targets[1] == -1).all() and not got.segments[1].any()


# Everything that could look beyond a token's own text, at once: windows shorter than prompts,
# frequencies that change for texts beyond 12 tokens, experts picked by token and by language.
CONFIG = naive.TINY.replace(
    vocab_size=31, vocab_used=29, max_positions=40, windows=(5, 0, 3), attn_softcap=1.5,
    ropes=("global", "none", "local"), local_rope_theta=5.0,
    rope_scaling=RopeScaling("longrope", factor=2.0, original_max_positions=12,
                             short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 1.0, 4.0)),
)  # fmt: skip
SPECS = (
    BankSpec("plain", ("attn.q", "attn.v"), 0, 3, rank=2, alpha=4.0),
    BankSpec("routed", ("attn.o", "mlp.up"), 0, 3, experts=4, rank=2, gate="token", top_k=2),
    BankSpec("spoken", ("mlp.down",), 0, 3, experts=4, rank=2, gate="language", top_k=2,
             forcing="always"),
)  # fmt: skip
MESHES = {
    "one": ({}, 1, "stacked"),
    "eight": ({"expert": 2, "sequence": 2, "tensor": 2}, 8, "all_to_all"),
}


@functools.cache
def parameters():
    return naive.random_params(CONFIG), naive.random_banks(SPECS, CONFIG)


@functools.cache
def questions():
    """Prompts of 1 to 24 tokens, two equal but for their language; options that begin alike."""
    rng = np.random.default_rng(3)

    def draw(length):
        return rng.integers(1, CONFIG.vocab_used, length).tolist()

    prompts = [draw(n) for n in (24, 9, 1, 11, 8, 6, 3)]
    prompts.append(prompts[1])
    completions = [[draw(c) for c in (1, 5, 2, 6)] for _ in prompts]
    for options in completions:
        options.append([*options[1][:3], *draw(2)])
        options.append(options[1][:2])
    completions[7] = completions[1]
    completions[2] += [[n] for n in range(CONFIG.vocab_used)]
    return prompts, completions, [2, 0, -1, 3, 1, -1, 0, 3]


@functools.cache
def answers():
    """`(log-probability, greedy)` of each text, alone in a row of the plain decoder."""
    base, banks = parameters()
    asked = [(p, c, lang) for p, cs, lang in zip(*questions(), strict=True) for c in cs]
    texts, languages = [[*p, *c] for p, c, _ in asked], np.array([[lang] for *_, lang in asked])
    batch, _ = naive.pack(texts, [[n] for n in range(len(texts))], 32)
    x, _, _ = jax.jit(functools.partial(adapted.hidden, AdaptedConfig(CONFIG, SPECS)))(
        base,
        banks,
        *(batch[name] for name in ("tokens", "segment_ids", "positions")),
        context=Context(language_ids_BxT=np.where(batch["segment_ids"] > 0, languages, -1)),
    )
    out = []
    for x_TxD, (prompt, ids, _) in zip(np.asarray(x, np.float64), asked, strict=True):
        z = x_TxD[len(prompt) - 1 :][: len(ids)] @ np.asarray(base["head"], np.float64).T
        z = z[:, : CONFIG.vocab_used]
        z -= np.log(np.exp(z - z.max()).sum(-1, keepdims=True)) + z.max()
        out.append((z[np.arange(len(ids)), ids].sum(), bool((z.argmax(-1) == ids).all())))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_tree_is_scored_as_its_texts_alone(mesh, monkeypatch):
    sizes, devices, dispatch = MESHES[mesh]
    devices = make_mesh(sizes, jax.devices()[:devices])
    config = AdaptedConfig(
        CONFIG, SPECS, Execution(activations=batch_sharding(devices, 3)), dispatch
    )
    shapes, program = [], engine.score_batch

    def seen(config, weights, packed):
        shapes.append((packed.segments.shape, int(packed.segments.max())))
        return program(config, weights, packed)

    monkeypatch.setattr(engine, "score_batch", seen)
    done = []
    got = Engine(config, *parameters(), {}, devices, 4).scored(*questions(), done.append)
    assert max(trees for _, trees in shapes) > 2  # in a row
    assert sum(done) == len(got) and len(done) == len(shapes)
    flat = [score for row in got for score in row]
    np.testing.assert_allclose([s.log_prob for s in flat], [w for w, _ in answers()], atol=1e-4)
    assert [s.greedy for s in flat] == [greedy for _, greedy in answers()]
    assert sum(greedy for _, greedy in answers()) > 0  # among all tokens after a prompt
    assert abs(got[1][0].log_prob - got[7][0].log_prob) > 0.01  # the language counts
