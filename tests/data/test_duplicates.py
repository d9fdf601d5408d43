"""Exact and near duplicates, and held-out rows, against a comparison of all pairs of texts."""

import functools
import json
import random

import numpy as np
import pytest

from medmoe_jax.data import builder, sketches
from medmoe_jax.data.conversation import said
from medmoe_jax.data.duplicates import EXACT, HELD_OUT, NEAR, find_repeats
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.words import words
from medmoe_jax.errors import UserError
from tests.data.samples import conversation

VOCABULARY = [f"w{i}" for i in range(400)]


def grams(row):
    return ngrams(said(row))


@functools.cache
def ngrams(text):
    own = words(text)
    size = min(sketches.WORDS, len(own))
    return {tuple(own[at : at + size]) for at in range(len(own) - size + 1)} if own else set()


def jaccard(one, other):
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b) if a & b else 0.0


def naive(rows, held_out=(), similarity=0.8):
    """(numbers of rows that are held out, sets of the others that are linked)."""
    leaks = {
        number
        for number, row in enumerate(rows)
        if any(row == other or jaccard(row, other) >= similarity for other in held_out)
    }
    groups = [{number} for number in range(len(rows)) if number not in leaks]
    for a in range(len(rows)):
        for b in range(a):
            if {a, b} & leaks or not (
                rows[a] == rows[b] or jaccard(rows[a], rows[b]) >= similarity
            ):
                continue
            one, other = (next(g for g in groups if n in g) for n in (a, b))
            if one is not other:
                groups.remove(other)
                one |= other
    return leaks, groups


def made(seed, count=120):
    """Rows of which many are others with some words changed, cut, moved or said again."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        kind = generator.random()
        if rows and kind < 0.5:
            changed = said(generator.choice(rows)).replace("\n", " ").split()
            for _ in range(generator.choice([0, 1, 1, 2, 3, 8])):
                changed[generator.randrange(len(changed))] = generator.choice(VOCABULARY)
            cut = generator.choice([0, 0, 1, 9])
            changed = changed[cut:] or changed
        else:
            changed = generator.choices(VOCABULARY, k=generator.choice([1, 3, 5, 6, 40, 90, 160]))
        half = max(1, len(changed) // 2)
        rows.append(conversation(" ".join(changed[:half]), " ".join(changed[half:]) or "no"))
    return rows


def placed(rows):
    return [(f"row {number}", row) for number, row in enumerate(rows)]


def found_groups(found, rows):
    """Sets of rows that one of them stands for, of those that are not held out."""
    head = {}
    for number in range(len(rows)):
        repeat = found.by_number.get(number)
        if repeat is None:
            head[number] = number
        elif repeat.kind != HELD_OUT:
            head[number] = head[int(repeat.of.split()[1])]
    return {frozenset(n for n in head if head[n] == h) for h in head.values()}


@pytest.mark.parametrize("similarity", [0.5, 0.8, 1.0])
def test_groups_and_leaks_are_those_of_all_pairs(similarity):
    rows, held_out = made(0), made(0)[::9] + made(7)[:20]
    found = find_repeats(placed(rows), placed(held_out), similarity=similarity)
    leaks, groups = naive(rows, held_out, similarity)
    assert {n for n, r in found.by_number.items() if r.kind == HELD_OUT} == leaks
    assert found_groups(found, rows) == {frozenset(group) for group in groups}
    assert found.counts[EXACT] and (found.counts[NEAR] or similarity == 1.0)
    for number, (place, kind, of, share) in found.by_number.items():
        other = (held_out if kind == HELD_OUT else rows)[int(of.split()[1])]
        assert place == f"row {number}"
        same = rows[number] == other
        assert share == (1.0 if same else pytest.approx(jaccard(rows[number], other)))
        assert kind == HELD_OUT or same == (kind == EXACT)


def test_any_order_finds_the_same_and_keeps_the_first():
    rows = made(1)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    first = find_repeats(placed(rows))
    other = find_repeats(placed([rows[number] for number in order]))
    moved = {frozenset(order[n] for n in g) for g in found_groups(other, rows)}
    assert moved == found_groups(first, rows) and len(moved) < len(rows)
    kept = {min(group) for group in found_groups(first, rows)}
    assert kept == set(range(len(rows))) - set(first.by_number)
    assert find_repeats(placed(rows)).by_number == first.by_number


def test_what_counts_as_the_same():
    long = " ".join(VOCABULARY[:60])
    rows = [
        conversation("Fever?", long, language="en"),
        conversation("Fever?", long, language="de"),  # says the same
        conversation("fever", long.upper() + "!"),  # the same words
        conversation("Fever?", long, system="Be brief."),  # a system text is no part of it
        conversation("?", "!"),
        conversation("?", "…"),  # no words: only what is equal is the same
        conversation("头痛怎么办?", "多休息,多喝水,避免熬夜和饮酒。"),
        conversation("头痛怎么办?", "多休息,多喝水,避免熬夜和饮酒!"),
        conversation("Cough?", "No"),
        conversation("Cough?", "Yes"),  # a short answer is another row
    ]
    found = find_repeats(placed(rows))
    kinds = {number: repeat.kind for number, repeat in found.by_number.items()}
    assert kinds == {1: EXACT, 2: NEAR, 3: NEAR, 7: NEAR}
    assert all(repeat.similarity == 1 for repeat in found.by_number.values())
    call = {"type": "function", "function": {"name": "dose", "arguments": {"drug": "aspirin"}}}
    calls = [
        {"language": "", "conversations": [{"role": "assistant", "content": "", "tool_calls": [c]}]}
        for c in (call, {**call, "function": {"name": "dose", "arguments": {"drug": "iron"}}})
    ]
    assert not find_repeats(placed(calls)).by_number


def test_one_group_of_many_near_rows_is_found_at_once(monkeypatch):
    """A form that a thousand rows fill out is compared with one of them, not each with each."""
    form = VOCABULARY[:150]
    rows = [conversation(" ".join(form), f"case {i}") for i in range(1000)]
    read = []
    whole = sketches.Sketches.similarity
    monkeypatch.setattr(
        sketches.Sketches, "similarity", lambda *pair: read.append(pair) or whole(*pair)
    )
    found = find_repeats(placed(rows))
    assert len(found.by_number) == 999 and len(read) < 5_000


def test_bands_find_a_pair_at_the_threshold():
    widths = {s: sketches.band_width(s) for s in (0.5, 0.7, 0.8, 0.9, 1.0)}
    assert widths == {0.5: 3, 0.7: 5, 0.8: 7, 0.9: 12, 1.0: 256}
    for similarity, width in widths.items():
        missed = [(1 - similarity ** (width + more)) ** (256 // (width + more)) for more in (0, 1)]
        assert missed[0] <= 0.001 and (similarity == 1.0 or missed[1] > 0.001)


def test_shingles_are_sets_of_five_words():
    text = "a b c d e f a b c d e"
    assert len(sketches.shingles(text)) == 6  # the last of seven is the first again
    assert set(sketches.shingles("A, b c d e.")) < set(sketches.shingles(text))
    assert len(sketches.shingles("a b")) == 1 and not len(sketches.shingles("…"))
    assert set(sketches.shingles("a b c d")).isdisjoint(sketches.shingles("a b c d e"))
    assert len(np.unique(np.concatenate([sketches.shingles(w) for w in VOCABULARY]))) == 400


def test_nothing_is_left_on_the_disk_and_bad_thresholds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert find_repeats([]).counts == {EXACT: 0, NEAR: 0, HELD_OUT: 0}
    assert find_repeats(placed(made(2, 5)), []).rows == 5

    def broken():
        yield from placed(made(2, 5))
        raise UserError("line 6")

    with pytest.raises(UserError, match="line 6"):
        find_repeats(broken())
    assert list(tmp_path.iterdir()) == []
    for similarity in (0.4, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"give a number from 0\.5 to 1"):
            find_repeats([], similarity=similarity)


def test_a_built_data_set_lacks_them_and_says_which(tmp_path):
    rows = made(3, 40)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    repeats = find_repeats(builder.read_rows([path], RowReader()), placed(rows[5:8]))
    folder = builder.build_from_files([path], tmp_path / "out", "clean", repeats=repeats)
    kept = [row for number, row in enumerate(rows) if number not in repeats.by_number]
    assert list(builder.open_dataset(folder)) == kept and len(kept) < 37
    told = json.loads((folder / builder.CLEANED).read_text())
    assert told == {
        "rows": 40, "kept": len(kept), **repeats.counts, "similarity": 0.8, "words": 5,
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / builder.REMOVED).read_text().splitlines()]
    assert lines == [repeat._asdict() for repeat in repeats.by_number.values()]
    assert {"place": f"{path}, line 6", "kind": HELD_OUT, "of": "row 0", "similarity": 1} in lines
    again = find_repeats(builder.read_rows([folder], RowReader()))
    assert again.rows == len(kept) and not again.by_number
    bare = builder.build(kept, tmp_path, "bare")
    assert builder.content_digest(folder) == builder.content_digest(bare)


def test_inputs_that_changed_or_hold_nothing_new_are_refused(tmp_path):
    rows = made(4, 6)
    with pytest.raises(UserError, match=r"held 6 rows when .* and 5 when"):
        builder.build(rows[:5], tmp_path, "demo", find_repeats(placed(rows)))
    with pytest.raises(UserError, match="each of the 6 rows is held out"):
        builder.build(rows, tmp_path, "demo", find_repeats(placed(rows), placed(rows)))
    assert list(tmp_path.iterdir()) == []
