"""Batch streams: packing, mixtures, shards and resume, against plain Python.

The tokenizer here gives one id to each character, so that every row can be read in a batch.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.data import batches, encoded_rows
from medmoe_jax.data.batches import StreamSpec
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.tokens import Added
from medmoe_jax.errors import UserError
from tests.data.samples import conversation

pytestmark = pytest.mark.usefixtures("few_bins")


class Characters:
    """A tokenizer of characters: the id is the code point; 1 is bos, 2 is eos, 0 is padding."""

    vocab_size, bos_id, eos_id, pad_id, stop_ids = 0x10FFFF, 1, 2, 0, ()
    specials, chat_template, digest = {}, None, "characters"

    def encode(self, text, start=False):
        return [ord(character) for character in text]

    def parts(self, text):
        return [text]

    def encode_parts(self, parts, start=False, strip=False):
        kept = (part for part in parts if isinstance(part, str | Added))
        return [
            token
            for part in kept
            for token in ([part.id] if isinstance(part, Added) else map(ord, part))
        ]

    def token(self, token_id):
        return Added(token_id)

    def begins_after(self, ids, start=False):
        return start and not ids

    def strips_after(self, ids, strip=False):
        return False

    def special(self, text):
        return None

    def text_of(self, token_id):
        return ""


def rows_of(count, first=0, seed=0):
    """Rows of 5 to 20 tokens; each names itself: its first letter is 1000 + its number."""
    sizes = np.random.default_rng(seed).integers(0, 9, (count, 2))
    return [
        conversation(chr(1000 + first + i) + "q" * q, "a" * (a or 1), language=("xx", "de")[i % 2])
        for i, (q, a) in enumerate(sizes)
    ]


ROWS = rows_of(40)
LENGTH = 32


def encoded(rows, length=LENGTH, tokenizer=None, languages=None, **encoder):
    encoder = Encoder(tokenizer or Characters(), TEMPLATES["plain"], languages=languages, **encoder)
    return EncodedRows("rows", rows, encoder, length, encoded_rows.CACHE_BYTES)


def stream(datasets=None, weights=None, **changes):
    spec = {"global_batch": 6, "shards": 2, "seed": 3}
    names = StreamSpec.__dataclass_fields__
    spec |= {key: changes.pop(key) for key in list(changes) if key in names}
    rows = {name: encoded(some, **changes) for name, some in (datasets or {"a": ROWS}).items()}
    return batches.make_stream(rows, weights, StreamSpec(**spec))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


def samples(batch):
    """Per row of a batch, the (tokens, mask) of what was packed in it; checks the whole layout."""
    found = []
    for tokens, mask, segments, positions in zip(
        *(batch[k] for k in ("tokens", "loss_mask", "segment_ids", "positions")), strict=True
    ):
        parts, at = [], 0
        for segment in range(1, segments.max() + 1):
            size = int((segments == segment).sum())
            assert segments[at : at + size].tolist() == [segment] * size
            assert positions[at : at + size].tolist() == list(range(size))
            parts.append((tuple(tokens[at : at + size]), tuple(mask[at : at + size])))
            at += size
        assert not segments[at:].any() and not mask[at:].any() and not positions[at:].any()
        assert not tokens[at:].any()
        found.append(parts)
    return found


def expected_sample(row, length=LENGTH):
    question, answer = (turn["content"] for turn in row["conversations"])
    tokens = [1, *map(ord, question), *map(ord, f" {answer}"), 2]
    mask = [0] * (1 + len(question)) + [1] * (len(answer) + 2)
    return tuple(tokens[:length]), tuple(mask[:length])


def number_of(sample):
    return sample[0][1] - 1000


def first_fit(sizes, length, bins):
    """Groups of bins of item numbers: the plain algorithm."""
    groups, current = [], []
    for item, size in enumerate(sizes):
        place = next((b for b in current if sum(sizes[i] for i in b) + size <= length), None)
        if place is None and len(current) == bins:
            groups.append(current)
            current = []
        if place is None:
            current.append(place := [])
        place.append(item)
    return groups, current


def test_arrays():
    batch = next(stream())
    assert set(batch) == {"tokens", "loss_mask", "segment_ids", "positions"}
    for value in batch.values():
        assert value.shape == (6, LENGTH) and value.dtype == np.int32


def test_each_sample_is_a_row_with_its_mask():
    known = {expected_sample(row) for row in ROWS}
    for batch in take(stream(), 20):
        for parts in samples(batch):
            assert parts and known.issuperset(parts)


def test_packing_is_first_fit_over_the_shuffled_rows():
    order = [
        row[0]
        for batch in take(stream(shards=1, global_batch=1, pack=False), 400)
        for row in samples(batch)
    ]
    packed, orders = stream(shards=1, global_batch=1), []
    for start in range(0, len(order), 40):  # an epoch by itself
        sizes = [len(tokens) for tokens, _ in order[start : start + 40]]
        full, rest = first_fit(sizes, LENGTH, batches.PACK_BINS)
        for group in [*full, rest]:
            wanted = [tuple(order[start + i] for i in b) for b in group]
            found = [tuple(samples(batch)[0]) for batch in take(packed, len(group))]
            assert Counter(found) == Counter(wanted)
            orders.append(found == wanted)
    assert len(orders) > 20 and sum(orders) < len(orders) / 2  # each comes in an order of its own


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=4, max_size=30),
    length=st.integers(4, 40),
    pack=st.booleans(),
)
def test_no_row_is_lost_whatever_the_lengths(sizes, length, pack):
    rows = [conversation(chr(1000 + i) + "q" * q, "a" * a) for i, (q, a) in enumerate(sizes)]
    s = stream({"a": rows}, length=length, pack=pack, global_batch=2)
    seen = Counter()
    steps = 0
    while steps < 3 or seen.total() < 2 * len(rows):
        for parts in samples(next(s)):
            assert pack or len(parts) == 1
            for sample in parts:
                assert sample == expected_sample(rows[number_of(sample)], length)
                seen[number_of(sample)] += 1
        steps += 1
    counted = s.counters()
    s.close()
    assert counted["rows"] == seen.total()
    cut = {i for i, row in enumerate(rows) if len(expected_sample(row, 99)[0]) > length}
    assert counted["truncated_rows"] == sum(seen[i] for i in cut)
    blank = {i for i, row in enumerate(rows) if not any(expected_sample(row, length)[1])}
    assert counted["rows_without_target"] == sum(seen[i] for i in blank)


def test_every_epoch_has_each_row_once_in_a_new_order():
    order = [
        number_of(row[0])
        for batch in take(stream(shards=1, global_batch=1, pack=False), 120)
        for row in samples(batch)
    ]
    epochs = [order[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("bins", [5, 32])
@pytest.mark.parametrize("weights", [None, {"a": 1.0}])
def test_packed_rows_of_an_epoch_come_before_those_of_the_next(monkeypatch, bins, weights):
    """However few there are: 40 rows fill some 16 sequences; up to 32 are packed together."""
    monkeypatch.setattr(batches, "PACK_BINS", bins)
    made = stream(weights=weights, shards=1, global_batch=1)
    lengths = []
    for _ in range(3):
        epoch = Counter()
        while epoch.total() < 40:
            epoch.update(map(number_of, samples(next(made))[0]))
            lengths.append(epoch.total())
        assert epoch == dict.fromkeys(range(40), 1)
    assert lengths.index(40) + 1 == made.steps_per_epoch()


def test_shards_own_their_rows_and_shuffle_apart():
    order = np.array(
        [
            [number_of(row[0]) for row in samples(batch)]
            for batch in take(stream(shards=2, global_batch=2, pack=False), 20)
        ]
    )
    assert sorted(order[:, 0]) == list(range(0, 40, 2))
    assert sorted(order[:, 1]) == list(range(1, 40, 2))
    assert (order[:, 0] // 2 != order[:, 1] // 2).any()


def test_seed():
    assert equal(take(stream(), 3), take(stream(), 3))
    assert not equal(take(stream(), 3), take(stream(seed=4), 3))


def test_mixture_proportions():
    datasets = {"a": rows_of(30), "b": rows_of(10, 100), "c": rows_of(20, 200)}
    weights = {"a": 1.0, "b": 0.5, "c": 0.0}
    counts = Counter()
    for batch in take(stream(datasets, weights, pack=False), 50):
        counts.update(number_of(row[0]) // 100 for row in samples(batch))
    assert counts == {0: 200, 1: 100}


@pytest.mark.parametrize("shards,global_batch", [(1, 16), (8, 8), (32, 32), (32, 64)])
@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 2, "b": 16}, {"a": 3, "b": 2, "c": 1}])
def test_every_step_has_the_shares_of_the_mixture(weights, shards, global_batch):
    datasets = {name: rows_of(64, 100 * i) for i, name in enumerate(weights)}
    made = stream(datasets, weights, pack=False, shards=shards, global_batch=global_batch)
    wanted = global_batch * np.array([*weights.values()]) / sum(weights.values())
    for batch in take(made, 30):
        found = np.bincount([number_of(row[0]) // 100 for row in samples(batch)], minlength=3)
        assert np.abs(found[: len(wanted)] - wanted).max() < (1 if shards == global_batch else 3)


def test_sequences_that_are_packed_together_have_the_shares_of_the_mixture():
    long = [conversation(chr(1000 + i) + "q" * 9, "a" * 9) for i in range(164)]  # one a sequence
    datasets = {"a": long[:64], "b": long[100:]}
    made = stream(datasets, {"a": 1, "b": 9}, shards=32, global_batch=32)
    for _ in range(8):
        together = [row for batch in take(made, batches.PACK_BINS) for row in samples(batch)]
        found = sum(number_of(row) < 100 for parts in together for row in parts)
        assert len(together) == 160 and abs(found - 16) < 3


def test_shards_with_rows_of_a_mixture_see_all_of_their_rows():
    datasets = {"a": rows_of(32), "b": rows_of(32, 100)}
    made = stream(datasets, {"a": 1, "b": 1}, pack=False, shards=8, global_batch=8)
    order = np.array([[number_of(row[0]) for row in samples(batch)] for batch in take(made, 14)])
    for shard, column in enumerate(order.T.tolist()):
        own = {*range(shard, 32, 8), *range(100 + shard, 132, 8)}
        assert set(column) == own


def test_no_weights_means_each_row_of_all_once():
    datasets = {"a": rows_of(31), "b": rows_of(9, 100)}
    counts = Counter()
    for batch in take(stream(datasets, pack=False, shards=1, global_batch=4), 10):
        counts.update(number_of(row[0]) for row in samples(batch))
    assert counts == dict.fromkeys([*range(31), *range(100, 109)], 1)


@pytest.mark.parametrize("shares", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[2, 0], [3, 1]]])
def test_processes_share_the_same_global_rows(shares):
    whole = take(stream(shards=4, global_batch=8), 9)
    for mine in shares:
        own = [row for row in range(8) if row % 4 in mine]
        part = take(stream(shards=4, global_batch=8, shard_ids=mine), 9)
        assert equal(part, [{k: v[own] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize("pack", [True, False])
def test_resume_at_every_batch(pack):
    # 3 rows of each shard a batch, 32 rows a pack: most states lie inside a pack.
    datasets = {"a": ROWS, "b": rows_of(25, 100, seed=1)}
    make = {"datasets": datasets, "weights": {"a": 2, "b": 1}, "pack": pack}
    original = stream(**make)
    states, given = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(original.get_state())))
        given.append((next(original), original.counters()))
    for start in (0, 1, 10, 11, 12, 24):
        resumed = stream(**make)
        resumed.set_state(states[start])
        for batch, counters in given[start:]:
            assert equal([next(resumed)], [batch])
            assert resumed.counters() == counters
    original.set_state(states[5])
    assert equal(take(original, 3), [batch for batch, _ in given[5:8]])


@pytest.mark.parametrize("order", [None, 1])
def test_a_state_of_another_order_is_refused(order):
    """Before states told their order there was none in them; then sequences came shuffled."""
    made = stream()
    state = made.get_state()
    made.set_state(state)
    state["1"]["order"] = order
    with pytest.raises(UserError, match=r"state is of another version .* or remove its folder"):
        made.set_state(state)


def test_resume_with_another_number_of_processes():
    parts = [stream(shards=4, global_batch=8, shard_ids=[i, i + 2]) for i in (0, 1)]
    for part in parts:
        take(part, 7)
    merged = parts[0].get_state() | parts[1].get_state()
    alone = stream(shards=4, global_batch=8)
    whole = take(alone, 9)
    resumed = stream(shards=4, global_batch=8)
    resumed.set_state(merged)
    assert equal(take(resumed, 2), whole[7:])
    assert resumed.counters() == alone.counters()
    for part in parts:
        take(part, 2)
    both = parts[0].counters(lambda states: states | parts[1].get_state())
    assert both == alone.counters() != parts[0].counters()
    quarter = stream(shards=4, global_batch=8, shard_ids=[3])
    quarter.set_state(merged)
    assert equal(take(quarter, 2), [{k: v[[3, 7]] for k, v in b.items()} for b in whole[7:]])
    with pytest.raises(UserError, match=r"lacks shard 1, 3 \(it has 0, 2\)"):
        resumed.set_state(parts[0].get_state())


def test_counters_are_those_of_the_batches():
    s = stream()
    given = take(s, 15)
    assert s.counters() == {
        "rows": sum(int(b["segment_ids"].max(axis=1).sum()) for b in given),
        "tokens": sum(int((b["segment_ids"] > 0).sum()) for b in given),
        "target_tokens": sum(int(b["loss_mask"].sum()) for b in given),
        "truncated_rows": 0,
        "rows_without_target": 0,
    }


def test_first_token_is_never_a_target():
    class NoBos(Characters):
        bos_id = None

    rows = [conversation("", f"{i}abc") for i in range(4)]
    batch = next(stream({"a": rows}, tokenizer=NoBos()))
    assert not batch["loss_mask"][batch["positions"] == 0].any()
    assert batch["loss_mask"].sum() == (batch["segment_ids"] > 0).sum() - sum(
        len(parts) for parts in samples(batch)
    )


def test_language_ids():
    batch = next(stream(languages={"de": 5}))
    for row, parts in zip(batch["language_ids"], samples(batch), strict=True):
        wanted = [5 if number_of(s) % 2 else -1 for s in parts for _ in s[0]]
        assert row.tolist() == wanted + [-1] * (LENGTH - len(wanted))


def test_steps_per_epoch():
    assert stream(pack=False).steps_per_epoch() == math.ceil(40 / 6)
    order = [
        row[0]
        for batch in take(stream(shards=1, global_batch=1, pack=False), 40)
        for row in samples(batch)
    ]
    groups, rest = first_fit([len(tokens) for tokens, _ in order], LENGTH, batches.PACK_BINS)
    sequences = len(rest) + sum(map(len, groups))
    one = stream(shards=1, global_batch=3)
    assert one.steps_per_epoch() == math.ceil(sequences / 3) < 14
    seen = []
    for shard in (0, 1):
        half = stream(shards=2, shard_ids=[shard])
        half.steps_per_epoch(lambda counts: seen.append(counts) or counts)
    assert [list(counts) for counts in seen] == [["0"], ["1"]]
    half = stream(shards=2, shard_ids=[1])
    assert half.steps_per_epoch(lambda counts: seen[0] | counts) == stream().steps_per_epoch()
    before = one.get_state()
    one.steps_per_epoch()
    assert one.get_state() == before


def test_a_small_memory_changes_nothing(monkeypatch):
    wanted = take(stream(), 12)
    monkeypatch.setattr(encoded_rows, "CACHE_BYTES", 3 * encoded_rows.ROW_OVERHEAD)
    assert equal(take(stream(), 12), wanted)


def test_rows_are_encoded_once(monkeypatch):
    calls = Counter()
    encode = Encoder.rows

    def counted(self, row):
        calls[row["conversations"][0]["content"]] += 1
        return encode(self, row)

    monkeypatch.setattr(Encoder, "rows", counted)
    s = stream()
    s.steps_per_epoch()
    take(s, 30)
    assert set(calls.values()) == {1}
    assert len(calls) == 40


def test_epoch_batches():
    whole = list(batches.epoch_batches(encoded(ROWS), 6))
    assert [batch["tokens"].shape for batch in whole] == [(6, LENGTH)] * 7
    found = [parts for batch in whole for parts in samples(batch)]
    assert found == [[expected_sample(row)] for row in ROWS] + [[]] * 2
    part = list(batches.epoch_batches(encoded(ROWS), 6, shards=3, shard_ids=[2]))
    assert equal(part, [{k: v[[2, 5]] for k, v in batch.items()} for batch in whole])


def test_an_error_in_the_thread_reaches_the_reader(monkeypatch):
    s = stream()

    def broken(*_):
        raise ValueError("robot")

    monkeypatch.setattr(batches, "_assemble", broken)
    with pytest.raises(ValueError, match="robot"):
        take(s, batches.AHEAD + 2)


def test_a_row_that_cannot_be_used_is_named_before_any_batch():
    rows = [*ROWS[:5], {"conversations": [{"role": "tool", "content": "?"}], "language": ""}]
    with pytest.raises(
        UserError, match=r"row 5: this built-in template has no place for role 'tool"
    ):
        stream({"a": rows})


BAD = [
    ({"weights": {"a": 0.0}}, "the mixture is empty"),
    ({"weights": {"a": -1.0}}, "mixture weight of 'a' is -1.0"),
    ({"weights": {"a": float("nan")}}, "mixture weight of 'a' is nan"),
    ({"weights": {"b": 1.0}}, "must have the same names; see 'a', 'b'"),
    ({"shards": 4}, r"global batch \(6\) must be a multiple of the data shards \(4\)"),
    ({"shards": 0}, "must be a multiple"),
    ({"datasets": {"a": ROWS[:1]}}, "'a' has 1 rows, fewer than the 2 data shards"),
    ({"shard_ids": [2]}, "expected distinct numbers from 0 to 1"),
    ({"shard_ids": [1, 1]}, "expected distinct numbers"),
    ({"shard_ids": []}, "expected distinct numbers"),
    ({"length": 1}, "length: 1 is below 2"),
    ({"mask": "none"}, "mask: 'none' is none of"),
]


@pytest.mark.parametrize("changes,message", BAD)
def test_bad_requests(changes, message):
    with pytest.raises(UserError, match=message):
        stream(**changes)
