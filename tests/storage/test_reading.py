"""Bases, tokenizers and rows that lie on object storage; copies on this machine's disk."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.data import builder, tokenizers
from medmoe_jax.data.blocks import make_blocks, open_files
from medmoe_jax.data.files import read_items
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import check_source, open_path
from medmoe_jax.errors import StorageError, UserError
from medmoe_jax.storage import fetched as lib
from medmoe_jax.storage import objects
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import cache_folder
from medmoe_jax.training.config import source
from tests import tiny

ROWS = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.slow
def test_a_base_and_its_tokenizer_are_those_of_the_disk(cloud):
    objects.upload(tiny.base_path(), cloud / "base")
    objects.upload(tiny.tokenizer().path.parent, cloud / "words")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = []
    for path in (str(tiny.base_path()), str(cloud / "base")):
        base = open_base(path, "", {}, 0)
        shardings = jax.tree.map(lambda _: sharding, base.abstract("float32"))
        loaded.append(base.load("float32", shardings))
    jax.tree.map(np.testing.assert_array_equal, *loaded)
    words = tokenizers.load(str(cloud / "words" / tiny.tokenizer().path.name))
    assert words.digest == tiny.tokenizer().digest
    for path in (cloud / "other", cloud.parent.with_name("nobody") / "x"):
        with pytest.raises(UserError, match="there is no file or folder"):
            open_base(str(path), "", {}, 0)
        with pytest.raises(UserError, match=r"train.path: there is no file or folder '.*x\.jsonl'"):
            check_source("train", source(f"{path}/x.jsonl").to_dict())


def test_rows_are_read_from_files_folders_streams_and_built_sets(cloud, tmp_path):
    objects.write(cloud / "a" / "train.jsonl", LINES)
    built = builder.build(
        (row for _, row in builder.read_rows([str(cloud / "a")], RowReader())), tmp_path, "x"
    )
    objects.upload(built, cloud / "built")
    for path in (cloud / "a", cloud / "a" / "train.jsonl"):
        found = list(read_items(str(path)))
        assert [row for _, row in found] == ROWS
        assert found[1][0] == f"{cloud}/a/train.jsonl, line 2"
        (file,) = open_files(str(path), "train")
        assert file.shown == f"{cloud}/a/train.jsonl" and file.size == len(LINES)
        blocks = make_blocks([file], 2)
        assert [block.decode(row) for block in blocks for row in block.read()] == ROWS
    there, here = open_path(str(cloud / "built"), RowReader()), open_path(built, RowReader())
    assert there.built and there.digest == here.digest and list(there.rows) == list(here.rows)
    objects.write(cloud / "a" / "train.jsonl", LINES + LINES)
    with pytest.raises(StorageError, match="is not what it was when it was listed"):
        blocks[0].read()


def copies():
    """The copies in the cache."""
    return {path for path in (cache_folder() / "objects").iterdir() if path.is_dir()}


def test_a_copy_is_made_once_and_anew_where_the_content_changed(cloud, monkeypatch):
    objects.write(cloud / "a.txt", b"one")
    first = fetched(str(cloud / "a.txt"))
    made = copies()
    monkeypatch.setattr(lib, "_bring", pytest.fail)
    assert fetched(str(cloud / "a.txt")) == first and first.read_bytes() == b"one"
    monkeypatch.undo()
    objects.write(cloud / "a.txt", b"two")
    assert fetched(str(cloud / "a.txt")).read_bytes() == b"two"
    assert first.read_bytes() == b"one" and len(copies() - made) == 1


def test_a_copy_that_is_cut_short_or_changes_meanwhile_is_none(cloud, monkeypatch):
    objects.write(cloud / "d" / "a", b"one")
    objects.write(cloud / "d" / "b", b"two")
    files, before = objects.system(cloud), copies()

    def replaced(source, target):
        type(files).get_file(files, source, target)
        objects.write(cloud / "d" / "b", b"new")

    def cut(source, target):
        Path(target).write_bytes(b"o")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "get_file", replaced)
    with pytest.raises(StorageError, match="changed while it was copied"):
        fetched(str(cloud / "d"))
    monkeypatch.setattr(files, "get_file", cut)
    with pytest.raises(KeyboardInterrupt):
        fetched(str(cloud / "d"))
    assert copies() == before
    monkeypatch.undo()
    found = fetched(str(cloud / "d"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {"a": b"one", "b": b"new"}


@pytest.mark.parametrize("name", ["../../b", "a/../b", "/b", "a//b", "./b"])
def test_an_object_whose_name_leads_out_of_its_folder_is_refused(emulators, monkeypatch, name):
    found = [objects.Listed("a", 1, "x"), objects.Listed(name, 1, "x")]
    monkeypatch.setattr(objects, "listing", lambda path: found)
    with pytest.raises(UserError, match="has no name that a file can have"):
        fetched("s3://bucket/d")


def test_copies_that_nobody_uses_make_room(cloud, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MEDMOE_CACHE_GB", "25e-9")
    for number, name in enumerate("abc"):
        objects.write(cloud / name, b"%d" % number * 10)
    paths = [fetched(str(cloud / name)) for name in "ab"]
    for number, path in enumerate(paths):
        os.utime(path.parents[1], ns=(number, number))
    with pytest.raises(UserError, match="set MEDMOE_CACHE_GB higher"):
        fetched(str(cloud / "c"))
    assert all(path.exists() for path in paths)  # this process uses both
    for path in paths:
        lib._held.pop(path.parents[1]).close()
    fetched(str(cloud / "c"))
    assert [path.exists() for path in paths] == [False, True]
