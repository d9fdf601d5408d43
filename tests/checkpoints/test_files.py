"""Atomic files, JSON errors, and a metrics log without duplicates, gaps or torn lines."""

import os
import re
from pathlib import Path

import pytest

from medmoe_jax.checkpoints import files
from medmoe_jax.checkpoints.files import (
    MetricsLog,
    check_new,
    new_folder,
    read_json,
    read_metrics,
    write_json,
    write_text,
)
from medmoe_jax.data import tokenizers
from medmoe_jax.errors import UserError


def test_json_round_trip_and_replacement(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, None, "é"]})
    write_json(path, {"b": 2.5})
    assert read_json(path) == {"b": 2.5}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(TypeError):
        write_json(path, object())


@pytest.mark.parametrize(
    "content, message",
    [(b'{"a": 1,\n oops}', "a.json, line 2: not JSON"), (b"\xff", "a.json: not UTF-8")],
)
def test_a_bad_json_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path)
    with pytest.raises(UserError, match=r"absent.json: no such file"):
        read_json(tmp_path / "absent.json")


def export(folder):
    with new_folder(folder) as write:
        write(lambda there: write_json(there / "a.json", {"a": 1}))


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "out").symlink_to("link/out")
    export(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert read_json(tmp_path / "disk" / "out" / "a.json") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "out"]
    assert os.listdir(tmp_path / "disk") == ["out"]


def test_a_folder_that_cannot_come_is_refused_before_it_is_made(tmp_path, monkeypatch):
    for name in ("empty", "mounted", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "to_mounted").symlink_to("mounted")
    mounts = [tmp_path / "mounted"]
    monkeypatch.setattr(Path, "is_mount", lambda path: path in mounts)
    monkeypatch.chdir(tmp_path / "empty")
    new = "give the path of a new folder in it"
    for path, message in {
        ".": f".: is the current folder; {new}",
        "../empty": f"../empty: is the current folder; {new}",
        "..": "..: is there already; give the path of a new folder",
        "../mounted": f"../mounted: is a mount point; {new}",
        "../to_mounted": f"../to_mounted: is a mount point; {new}",
        "../full/file": "../full/file: is there already",
        "../full/file/deep": "../full/file: is not a folder",
        "../gone": "../gone: cannot be made: ../gone is a link to nowhere, which is not there",
        "../gone/deep": "gone is a link to nowhere, which is not there",
        "/": "/: is there already",
    }.items():
        for refuse in (check_new, export):
            with pytest.raises(UserError, match=re.escape(message)):
                refuse(path)
    assert not os.listdir(".") and not os.listdir("../mounted")
    assert len(os.listdir("..")) == 5
    export("new")
    export("../mounted/new/deeper")
    assert os.listdir(".") == ["new"] and os.listdir("../mounted/new/deeper") == ["a.json"]


def test_a_mount_of_the_same_disk_is_known_by_the_table_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "free").mkdir()
    point = str(tmp_path / "a b").replace(" ", r"\040")
    (tmp_path / "mounts").write_text(f"36 35 98:0 /src {point} rw,noatime master:1 - ext4 /d rw\n")
    monkeypatch.setattr(files, "_MOUNTS", tmp_path / "mounts")
    for refuse in (check_new, export):
        with pytest.raises(UserError, match="a b: is a mount point; give the path of a new folder"):
            refuse(tmp_path / "a b")
    export(tmp_path / "free")


def test_a_failed_folder_takes_those_above_it_away_that_were_new(tmp_path):
    def fail(folder):
        write_json(folder / "a.json", {})
        raise UserError("no")

    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="no"), new_folder(tmp_path / "old/new/deep/out") as write:
        write(fail)
    assert not os.listdir(tmp_path / "old")


def test_a_file_is_not_written_over_a_folder(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    for path in (".", "..", "../old", "/"):
        with pytest.raises(UserError, match=rf"{path}: is a folder; give the path of a file"):
            write_text(path, "x")
        with pytest.raises(UserError, match=rf"{path}: is a folder; give the path of a file"):
            tokenizers.train(["a b"] * 9, 270, path)
    assert not os.listdir(tmp_path / "old") and os.listdir(tmp_path) == ["old"]


def write_lines(path, steps, after_step=0):
    with MetricsLog(path, after_step) as log:
        for step in steps:
            log.write(step, {"loss": step / 2})


def test_nothing_takes_the_place_of_a_device_a_pipe_or_a_link(tmp_path):
    """As root, a file over `/dev/stdout` would be there for every program of the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("pipe")
    (tmp_path / "link").symlink_to("there")
    for path in ("pipe", "out"):
        with pytest.raises(UserError, match=rf"{path}: is no ordinary file; give the path of a"):
            files.write_text(tmp_path / path, "a")
    with pytest.raises(UserError, match="/dev/null: is no ordinary file"):
        files.check_file("/dev/null")
    for text in ("a", "b"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "there").read_text() == text
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out").is_symlink()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "out", "pipe", "there"]


def test_a_resumed_log_has_no_duplicates_and_no_gaps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 8))
    write_lines(path, range(5, 10), after_step=4)
    assert read_metrics(path) == [{"step": step, "loss": step / 2} for step in range(1, 10)]
    write_lines(path, [10], after_step=9)
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 11))
    write_lines(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4, "loss": 2.0}', b"{"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2, 3])
    with open(path, "ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    write_lines(path, [4], after_step=10)
    assert read_metrics(path)[-1] == {"step": 4, "loss": 2.0}
    assert len(read_metrics(path)) == 4


@pytest.mark.parametrize("line", ["oops", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_bad_line_inside_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        MetricsLog(path, after_step=5)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)
    assert path.read_text().endswith('{"step": 2}\n')


def test_lines_are_on_the_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan")})
    assert len(read_metrics(log.path)) == 1
    log.close()
    log.close()
