"""Streams of files that are never read whole: blocks, order, mixing, resume and bad rows."""

import io
import json
from collections import Counter
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmoe_jax.data import batches, blocks, streamed_rows
from medmoe_jax.data.batches import StreamSpec
from medmoe_jax.data.blocks import File, deal, make_blocks, open_files
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.files import read_items
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.streamed_rows import StreamedRows
from medmoe_jax.errors import UserError
from tests.data import chat_templates
from tests.data import test_data_batches as plain
from tests.data.samples import conversation
from tests.data.test_data_batches import Characters, equal, expected_sample, number_of, take
from tests.data.test_jinja_template import encoder as jinja_encoder

ROWS = plain.rows_of(61)

pytestmark = pytest.mark.usefixtures("few_bins")


def write(path, rows=None, group=7):
    """A file of rows, by its ending."""
    rows = ROWS if rows is None else rows
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["rows.jsonl", "rows.parquet", "folder"])
def path(request, tmp_path):
    if request.param != "folder":
        return write(tmp_path / request.param)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:20])
    write(folder / "b.parquet", ROWS[20:45])
    write(folder / "c.ndjson", ROWS[45:])
    return folder


def streamed(path, shards=2, window=8, read=None):
    encoder = Encoder(Characters(), TEMPLATES["plain"])
    files = open_files(str(path), "train")
    return StreamedRows("s", files, read or RowReader(), encoder, plain.LENGTH, window, shards)


def stream(path, weights=None, others=None, window=512, **spec):
    spec = StreamSpec(**{"global_batch": 6, "shards": 2, "seed": 3, **spec})
    rows = {"s": streamed(path, spec.shards, window), **(others or {})}
    return batches.make_stream(rows, weights or {"s": 1.0}, spec)


def numbers(stream, steps):
    """Numbers of the rows of single-row sequences, [steps, B]."""
    return np.array([[number_of(r[0]) for r in plain.samples(next(stream))] for _ in range(steps)])


def test_every_row_is_in_one_block_whatever_the_blocks(path, monkeypatch):
    wanted = [item for _, item in read_items(path)]
    places = [place for place, _ in read_items(path)]
    for size in (64, 333, 10**6):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        for least in (1, 30):
            found = [
                (block.place(row), block.decode(row))
                for block in make_blocks(open_files(str(path), "train"), least)
                for row in block.read()
            ]
            assert [item for _, item in found] == wanted
            assert [place for place, _ in found] == places


def test_lines_of_any_kind(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xe6\x97\xa5"}\n{"a": 3}')
    wanted = list(read_items(path))
    for size in range(1, 45):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        parts = make_blocks(open_files(str(path), "train"), 1)
        found = [(part.place(row), part.decode(row)) for part in parts for row in part.read()]
        assert found == wanted


def test_rows_of_a_group_are_found_at_any_place(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_READ_ROWS", 4)
    path = write(tmp_path / "rows.parquet", group=61)
    (part, last) = make_blocks(open_files(str(path), "train"), 2)
    rows = last.read()
    assert (len(part.read()), len(rows)) == (30, 31)
    for index in (0, 1, 2, 17, 30, 5, 5, 0):
        assert rows[index] == (30 + index, pq.read_table(path).to_pylist()[30 + index])
    with pytest.raises(IndexError):
        rows[31]


def test_every_epoch_has_each_row_once_in_a_new_order(path):
    make = {"shards": 1, "global_batch": 1, "pack": False, "window": 61}
    epochs = numbers(stream(path, **make), 61 * 3).reshape(3, 61).tolist()
    assert all(sorted(epoch) == list(range(61)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    assert numbers(stream(path, **make), 61)[:, 0].tolist() == epochs[0]
    assert numbers(stream(path, **make, seed=4), 61)[:, 0].tolist() != epochs[0]


def test_a_window_reaches_so_far(tmp_path):
    path = write(tmp_path / "rows.jsonl", plain.rows_of(200))
    order = numbers(stream(path, shards=1, global_batch=1, pack=False, window=50), 200)[:, 0]
    parts = order.reshape(4, 50).tolist()
    assert [sorted(part) for part in parts] == np.arange(200).reshape(4, 50).tolist()
    assert all(part != sorted(part) for part in parts)


def test_shards_own_their_blocks(path):
    whole = numbers(stream(path, shards=3, global_batch=3, pack=False), 180)
    owned = [set(column) for column in whole.T.tolist()]
    assert set.union(*owned) == set(range(61)) and sum(map(len, owned)) == 61


# Rows of the row groups of each file; one file is much larger, or all are, or groups are few.
SIZES = {
    "one large file": [[80], [80], [8000], [80], [80], [80], [80], [80]],
    "more groups than shards": [[100] * 9],
    "large and small groups": [[3, 500, 2, 2], [700], [1] * 30, [1000, 1]],
    "groups of no row": [[0, 50, 0], [0], [7]],
    "as many rows as shards": [[1, 3], [4]],
}


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_shards_own_equally_many_rows_of_tables(tmp_path, sizes, shards):
    first, wanted = 0, []
    for number, groups in enumerate(sizes):
        table = pa.table({"number": pa.array(range(first, first + sum(groups)))})
        with pq.ParquetWriter(tmp_path / f"{number}.parquet", table.schema) as file:
            for rows in groups:
                file.write_table(table[:rows])
                wanted += range(first, first + rows)
                table, first = table[rows:], first + rows
    made = make_blocks(open_files(str(tmp_path), "train"), shards)
    dealt = deal(made, shards)
    found = [[row["number"] for block in own for _, row in block.read()] for own in dealt]
    assert sorted(chain(*found)) == wanted
    assert {len(own) for own in found} <= {len(wanted) // shards, -(-len(wanted) // shards)}
    # Blocks are not many more than there must be.
    assert sum(map(len, dealt)) <= len(made) + shards <= 18 * shards + sum(map(len, sizes))


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("counts", [[12 * 64], [500, 3, 3, 40], [2] * 50, [30]])
def test_shards_own_equally_many_lines(tmp_path, monkeypatch, counts, shards):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * 100)
    monkeypatch.setattr(blocks, "_FEW_BYTES", 4 * 100)
    for number, count in enumerate(counts):
        line = json.dumps({"number": number}).ljust(99) + "\n"
        (tmp_path / f"{number}.jsonl").write_text(line * count)
    dealt = deal(make_blocks(open_files(str(tmp_path), "train"), shards), shards)
    read = ((block.decode(row) for block in own for row in block.read()) for own in dealt)
    found = [[item["number"] for item in items] for items in read]
    assert Counter(chain(*found)) == dict(enumerate(counts))
    part = sum(counts) / shards
    # A line belongs to the block in which it begins: each end of a block gives or takes one.
    ends = 2 * max(map(len, dealt))
    assert all(abs(len(own) - part) < ends for own in found)
    bytes_of = [sum(block.stop - block.start for block in own) for own in dealt]
    assert max(bytes_of) - min(bytes_of) <= 1


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("pack", [False, True])
def test_files_weigh_by_their_rows(tmp_path, monkeypatch, ending, pack):
    """Whatever their size, and the length of their rows: each row comes as often as any other."""
    monkeypatch.setattr(blocks, "_FEW_BYTES", 4 * 100)
    sizes, first, lengths = [30, 30, 900, 60], 0, [1, 9, 3, 18]
    for number, (count, length) in enumerate(zip(sizes, lengths, strict=True)):
        rows = [conversation(chr(1000 + first + i), "a" * length) for i in range(count)]
        write(tmp_path / f"{number}.{ending}", rows, group=count)
        first += count
    made = stream(tmp_path, shards=5, global_batch=5, window=100, pack=pack)
    seen = Counter()
    while sum(seen.values()) < 4 * first:
        seen.update(number_of(row) for parts in plain.samples(next(made)) for row in parts)
    files = np.split([seen[number] for number in range(first)], np.cumsum(sizes)[:-1])
    assert all(abs(own.mean() - 4) < 0.5 for own in files), [own.mean() for own in files]


@pytest.mark.parametrize("window", [7, 61, 62, 10_000])
def test_a_window_ends_with_the_epoch_of_its_shard(path, window):
    shards = 3
    owned = [
        sorted(ROWS.index(block.decode(row)) for block in own for row in block.read())
        for own in streamed(path, shards).blocks
    ]
    assert sorted(chain(*owned)) == list(range(61))
    whole = numbers(stream(path, shards=3, global_batch=3, pack=False, window=window), 120).T
    for own, column in zip(owned, whole.tolist(), strict=True):
        epochs = [column[start : start + len(own)] for start in range(0, 120, len(own))][:-1]
        assert len(epochs) > 4 and all(sorted(epoch) == own for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_rows_are_encoded_as_others_are(path):
    known = {expected_sample(row) for row in ROWS}
    for batch in take(stream(path), 20):
        for parts in plain.samples(batch):
            assert parts and known.issuperset(parts)


def test_mixed_with_rows_in_memory(path):
    others = {"a": plain.encoded(plain.rows_of(30, 100)), "b": plain.encoded(plain.rows_of(5, 200))}
    weights = {"s": 1.0, "a": 0.5, "b": 0.0}
    found = numbers(stream(path, weights, others, pack=False), 50) // 100
    assert Counter(found.flatten().tolist()) == {0: 200, 1: 100}
    found = numbers(stream(path, weights, others, pack=False, shards=6), 50) // 100
    assert all(sorted(step) == [0, 0, 0, 0, 1, 1] for step in found.tolist())
    with pytest.raises(UserError, match="'s' is streamed, so it needs a mixture weight"):
        batches.make_stream({"s": streamed(path)}, None, StreamSpec(6, 2))


@pytest.mark.parametrize("pack", [True, False])
def test_resume_at_every_batch(path, pack):
    others = {"a": plain.encoded(plain.rows_of(400, 100, seed=1))}
    make = {"weights": {"s": 2.0, "a": 1.0}, "others": others, "pack": pack}
    original = stream(path, **make)
    states, given = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(original.get_state())))
        given.append((next(original), original.counters()))
    for start in (0, 1, 5, 11):
        resumed = stream(path, **make)
        resumed.set_state(states[start])
        for batch, counters in given[start:]:
            assert equal([next(resumed)], [batch])
            assert resumed.counters() == counters


@pytest.mark.parametrize("window", [10, 512])
def test_resume_around_the_end_of_an_epoch(path, window):
    make = {"pack": False, "window": window}
    original = stream(path, **make)
    states, given = [], []
    for _ in range(30):  # of 11 batches an epoch
        states.append(json.loads(json.dumps(original.get_state())))
        given.append(next(original))
    for start in range(6, 25):
        resumed = stream(path, **make)
        resumed.set_state(states[start])
        assert equal(take(resumed, 5), given[start : start + 5])


def test_resume_with_another_number_of_processes(path):
    spec = {"shards": 4, "global_batch": 8}
    parts = [stream(path, shard_ids=[i, i + 2], **spec) for i in (0, 1)]
    whole = take(stream(path, **spec), 12)
    for part, mine in zip(parts, ([0, 2, 4, 6], [1, 3, 5, 7]), strict=True):
        assert equal(take(part, 7), [{k: v[mine] for k, v in b.items()} for b in whole[:7]])
    merged = parts[0].get_state() | parts[1].get_state()
    resumed = stream(path, **spec)
    resumed.set_state(merged)
    assert equal(take(resumed, 5), whole[7:])
    quarter = stream(path, shard_ids=[3], **spec)
    quarter.set_state(merged)
    assert equal(take(quarter, 5), [{k: v[[3, 7]] for k, v in b.items()} for b in whole[7:]])


def test_a_state_of_before_is_refused(path):
    """One in which windows reached over the end of an epoch, and shards owned other blocks."""
    rows = {"parent": {"next_index": 0}, "next_index_in_buffer": 0}
    windows = {"parent": {"parent": rows, "index_for_rng": 0}, "next_index_in_buffer": 2}
    mixed = {"parents": [{"parent": windows, "next_index_in_buffer": 1}], "index": 3, "stop": False}
    sequences = {"parent": mixed, "next_row": 0, "counter": 3}
    before = {str(shard): {"sequences": sequences, "counts": [3, 37, 20, 0, 0]} for shard in (0, 1)}
    with pytest.raises(UserError, match=r"the saved data state is of another version"):
        stream(path, pack=False).set_state(before)


def test_it_is_made_for_so_many_shards(path):
    with pytest.raises(UserError, match="'s' is streamed in 2 data shards, not 3"):
        batches.make_stream({"s": streamed(path, 2)}, {"s": 1.0}, StreamSpec(6, 3))


def test_a_conversation_may_be_several_rows(tmp_path, byte_level_tokenizer):
    rows = [conversation("q", "a", f"r{i}", "b") for i in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    own = jinja_encoder(byte_level_tokenizer, chat_templates.THINKING)
    files = open_files(str(path), "train")
    found = StreamedRows("s", files, RowReader(), own, 64, 9, 1)
    spec = StreamSpec(1, pack=False)
    original = batches.make_stream({"s": found}, {"s": 1.0}, spec)
    given = take(original, 18)
    wanted = Counter(tuple(part.tokens.tolist()) for row in rows for part in own.rows(row))
    seen = Counter(tuple(b["tokens"][b["segment_ids"] > 0].tolist()) for b in given)
    assert seen == wanted and original.counters()["rows"] == 18
    for start in (1, 2, 3, 4, 5):
        resumed = batches.make_stream({"s": found}, {"s": 1.0}, spec)
        take(resumed, start)
        state = resumed.get_state()
        resumed = batches.make_stream({"s": found}, {"s": 1.0}, spec)
        resumed.set_state(state)
        assert equal(take(resumed, 4), given[start : start + 4])


def test_only_some_blocks_are_read_at_a_time(tmp_path, monkeypatch):
    """What a step needs does not grow with the file."""
    path = write(tmp_path / "rows.jsonl", plain.rows_of(3000))
    read = []

    class Opened(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(blocks, "_READ_BYTES", 512)
    (file,) = open_files(str(path), "train")
    file = File(file.shown, lambda: Opened(path), file.size, file.digest)
    encoder = Encoder(Characters(), TEMPLATES["plain"])
    rows = StreamedRows("s", [file], RowReader(), encoder, plain.LENGTH, 64, 2)
    one = batches.make_stream({"s": rows}, {"s": 1.0}, StreamSpec(2, 2, pack=False))
    take(one, 20)
    one.close()
    assert 0 < sum(read) < file.size / 10


def test_only_some_pages_of_a_row_group_are_read(tmp_path, monkeypatch):
    path, read = tmp_path / "rows.parquet", []
    rows = [{"prompt": f"{i} " + "q" * 50, "response": "a" * 50} for i in range(4000)]
    pq.write_table(
        pa.Table.from_pylist(rows),
        path,
        use_dictionary=False,
        compression=None,
        data_page_size=1024,
        write_batch_size=16,
    )

    class Opened(io.FileIO):
        def read(self, size=-1):
            read.append(len(found := super().read(size)))
            return found

    (file,) = open_files(str(path), "train")
    file = File(file.shown, lambda: Opened(path), file.size, file.digest)
    (block,) = make_blocks([file], 1)
    monkeypatch.setattr(blocks, "_READ_BYTES", 4096)
    monkeypatch.setattr(blocks, "_READ_ROWS", 16)
    del read[:]
    found = block.read()
    assert [found[i][1] for i in range(100)] == rows[:100]
    assert 100 * 100 < sum(read) < file.size / 4


def test_bad_rows_are_named_when_they_come(tmp_path):
    good = [json.dumps(row) + "\n" for row in ROWS]
    for line, message in (
        ('{"prompt": "q"}\n', r"rows\.jsonl, line 31: needs one conversation"),
        ('{"prompt": }\n', r"rows\.jsonl, line 31: not valid JSON \(Expecting value, column 12\)"),
        ('{"a": 1, "a": 2}\n', r"rows\.jsonl, line 31: the key 'a' stands twice"),
        ('{"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}, '
         '{"role": "assistant", "content": "x"}]}\n',
         r"line 31: this built-in template has no place for role 'tool'"),
    ):  # fmt: skip
        path = tmp_path / "rows.jsonl"
        path.write_text("".join([*good[:30], line, *good[30:]]))
        with pytest.raises(UserError, match=message):
            streamed(path, shards=1)  # it is among the first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streamed_rows, "_TRIED", 3)
            found = stream(path, shards=1, global_batch=2, window=64)
            with pytest.raises(UserError, match=message):
                take(found, 60)
    path.write_bytes(b"".join(x.encode() for x in good[:3]) + b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 4: not UTF-8 text"):
        streamed(path, shards=1)
    table = write(tmp_path / "rows.parquet", [*ROWS[:9], {**ROWS[9], "language": "x\ud83d"}][:9])
    whole = table.read_bytes()
    table.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"rows\.parquet: not a Parquet file that can be read"):
        streamed(table)
    table.write_bytes(whole[:4] + bytes(40) + whole[44:])
    with pytest.raises(UserError, match=r"rows\.parquet: not a Parquet file that can be read"):
        streamed(table)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    cases = {
        "rows.jsonl.gz": "only files that end in .jsonl, .ndjson, .parquet can be streamed",
        "rows.csv": "only files that end in",
    }
    for name, message in cases.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=message):
            streamed(tmp_path / name)
    path = tmp_path / "rows.jsonl"
    path.write_text(' \n [{"prompt": "q", "response": "a"}]')
    with pytest.raises(UserError, match="is one JSON list; write one object a line"):
        streamed(path)
    for nothing in ("", "\n \n"):
        path.write_text(nothing)
        with pytest.raises(UserError, match=r"source 's': .*rows\.jsonl: no row in it"):
            streamed(path)
    write(path, ROWS[:1])
    with pytest.raises(UserError, match="fewer rows than the 2 data shards; use fewer data shards"):
        streamed(write(tmp_path / "rows.parquet", ROWS[:1]))
    lonely = stream(path, shards=2, window=2)
    with pytest.raises(UserError, match=r"data shard \d of 2 holds no row; use fewer data shards"):
        take(lonely, 9)
    with pytest.raises(UserError, match="of TensorFlow Datasets cannot be streamed"):
        streamed("tfds://name")


def test_the_digest_is_that_of_content_and_window(tmp_path):
    one = streamed(write(tmp_path / "a.jsonl"))
    assert streamed(write(tmp_path / "b.jsonl")).digest == one.digest
    assert streamed(tmp_path / "b.jsonl", window=9).digest != one.digest
    assert streamed(write(tmp_path / "c.jsonl", ROWS[::-1])).digest != one.digest
