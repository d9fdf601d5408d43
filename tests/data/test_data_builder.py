"""Data sets on disk: contents, order, digest, and nothing half-written."""

import json
import pickle
import shutil

import pytest
import tensorflow_datasets as tfds

from medmoe_jax.data import builder
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import first_rows, open_path, open_source
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import source
from tests.data.samples import conversation

ROWS = [conversation(f"Question {i} é日", f"Answer {i}", language="zh") for i in range(50)]


def test_rows_come_back_in_order_and_pickled(tmp_path):
    folder = builder.build(ROWS, tmp_path, "demo_1")
    assert folder == tmp_path / "demo_1" / "1.0.0"
    for place in (folder, tmp_path / "demo_1", tmp_path):
        data = builder.open_dataset(place)
        assert len(data) == 50
        assert list(data) == ROWS
    assert data[-1] == ROWS[-1]
    assert data[48:] == ROWS[48:] and data[::-20] == ROWS[::-20]
    with pytest.raises(IndexError):
        data[50]
    assert list(pickle.loads(pickle.dumps(data))) == ROWS


def test_tools_are_kept(tmp_path):
    row = {**ROWS[0], "tools": [{"name": "dose"}]}
    data = builder.open_dataset(builder.build([row, ROWS[1]], tmp_path, "demo"))
    assert list(data) == [row, ROWS[1]]


def test_tfds_reads_it_as_array_record(tmp_path):
    folder = builder.build(ROWS, tmp_path, "demo")
    read = tfds.builder_from_directory(folder)
    assert read.info.file_format.value == "array_record"
    record = read.as_data_source(split="train")[3]
    assert json.loads(record["conversation"]) == ROWS[3]["conversations"]


def test_digest_follows_the_content_only(tmp_path):
    first = builder.content_digest(builder.build(ROWS, tmp_path / "a", "demo"))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "a" / "demo", moved)
    assert builder.content_digest(moved) == first
    assert builder.content_digest(builder.build(ROWS, tmp_path / "b", "other")) == first
    changed = [*ROWS[:-1], conversation("Question 49 é日", "Answer 50", language="zh")]
    assert builder.content_digest(builder.build(changed, tmp_path / "c", "demo")) != first


def test_an_error_leaves_nothing(tmp_path):
    def broken():
        yield from ROWS
        raise UserError("row 51 is bad")

    with pytest.raises(UserError, match="row 51 is bad"):
        builder.build(broken(), tmp_path, "demo")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="row 51 is bad"):
        builder.build(broken(), tmp_path / "new" / "deeper", "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_not_taken_for_a_data_set(tmp_path):
    left = tmp_path / ".partial-demo-x" / "demo"
    left.mkdir(parents=True)
    (left / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="holds no data set"):
        builder.open_dataset(tmp_path)


def test_bad_requests(tmp_path):
    with pytest.raises(UserError, match="there is no row to write"):
        builder.build([], tmp_path, "demo")
    with pytest.raises(UserError, match="use lower-case letters"):
        builder.build(ROWS, tmp_path, "Demo set")
    assert list(tmp_path.iterdir()) == []
    builder.build(ROWS, tmp_path, "demo")
    with pytest.raises(UserError, match="already exists; choose another name"):
        builder.build(ROWS, tmp_path, "demo")
    builder.build(ROWS, tmp_path, "demo2")
    with pytest.raises(UserError, match="holds several data sets"):
        builder.open_dataset(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        builder.open_dataset(tmp_path / "absent")


def test_build_from_files(tmp_path):
    pairs = [{"prompt": "Q", "response": f"A{i}"} for i in range(3)]
    (tmp_path / "My data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    reader = RowReader("en")
    folder = builder.build_from_files([tmp_path / "My data.jsonl"], tmp_path / "out", "", reader)
    assert folder.parent.name == "my_data"
    assert [row["language"] for row in builder.open_dataset(folder)] == ["en"] * 3
    with pytest.raises(UserError, match="no input file"):
        builder.build_from_files([], tmp_path)


TURNS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A", "reasoning_content": "R"},
]
PLAIN = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TOOLS = [{"name": "dose"}]
MIXED = [
    {"messages": TURNS, "language": "fr"},
    {"messages": TURNS, "tools": TOOLS},
    {"messages": PLAIN, "language": ""},
]
IGNORE = ("reasoning_content", "tools", "absent", "*_id")


@pytest.fixture
def mixed(tmp_path):
    """Rows as a file, and the data set that was built of it."""
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, MIXED)))
    return path, builder.build_from_files([path], tmp_path, "mixed")


def test_what_is_set_for_rows_holds_for_built_ones(mixed, tmp_path):
    """Left out, counted once however often they are read, and given a language, as of files."""
    left = {"reasoning_content": 2, "tools": 1}
    of_file, of_built = [], []
    for path, found in zip(mixed, (of_file, of_built), strict=True):
        reader = RowReader("en", ignore=IGNORE)
        found += [row for _, row in builder.read_rows([path], reader)]
        opened = open_path(path, reader.again())
        assert list(opened.rows) == list(opened.rows) == found
        assert reader.ignored == opened.ignored == left
    assert of_file == of_built
    assert [row["language"] for row in of_built] == ["fr", "en", "en"]
    assert all(row["conversations"] == PLAIN and "tools" not in row for row in of_built)
    again = builder.build_from_files([mixed[1]], tmp_path, "again", RowReader("en", ignore=IGNORE))
    assert list(builder.open_dataset(again)) == of_built


def test_a_built_row_that_cannot_be_used_without_what_is_left_out(mixed, tmp_path):
    silent = [TURNS[0], {**TURNS[1], "content": ""}]
    folder = builder.build([{"conversations": silent, "language": ""}], tmp_path, "silent")
    for read in (open_path, lambda path, reader: list(builder.read_rows([path], reader))):
        with pytest.raises(UserError, match=f"^{folder}, row 0: an answer is empty"):
            read(folder, RowReader(ignore=("reasoning_content",)))


def test_a_source_of_built_rows_is_another_where_keys_are_left_out(mixed):
    fields = source(str(mixed[1])).to_dict()
    plain, ignoring = open_source("s", fields), open_source("s", fields, IGNORE)
    assert plain.digest == open_source("s", fields).digest != ignoring.digest
    assert ignoring.digest == open_source("s", fields, IGNORE).digest
    assert plain.ignored == {} and ignoring.ignored == {"reasoning_content": 2, "tools": 1}
    assert list(first_rows("s", fields, IGNORE, 2)) == ignoring.rows[:2]
    assert first_rows("s", fields, IGNORE, 2).place(1) == f"{mixed[1]}, row 1"
