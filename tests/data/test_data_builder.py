"""Data sets on disk: contents, order, digest, and nothing half-written."""

import json
import pickle
import shutil

import pytest
import tensorflow_datasets as tfds

from medmoe_jax.data import builder
from medmoe_jax.data.rows import RowReader
from medmoe_jax.errors import UserError
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
