"""A work directory on object storage: one writer, sealed checkpoints, the same run as on disk."""

import dataclasses
import json
import pickle
import string
import threading

import jax
import numpy as np
import pytest

from medmoe_jax.checkpoints import lease, staging
from medmoe_jax.checkpoints.agreement import check_shared
from medmoe_jax.checkpoints.files import (
    MetricsLog,
    read_json,
    read_metrics,
    write_json,
    write_text,
)
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import LeaseError, only_writer, take
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.saves import saves
from medmoe_jax.checkpoints.seals import SEAL, damage, seal
from medmoe_jax.checkpoints.stages import StageCheckpoints, WriteError, load_final, save_final
from medmoe_jax.cli import main
from medmoe_jax.errors import Stopped, StorageError, UserError
from medmoe_jax.storage import objects
from medmoe_jax.training.hooks.protocol import Progress
from medmoe_jax.training.hooks.writers import MetricsFile
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import several, tiny
from tests.checkpoints.test_lease import Clock
from tests.checkpoints.test_stages import writable_signs
from tests.clouds import BUCKET
from tests.several import Several

pytestmark = pytest.mark.slow


def test_of_many_that_start_at_once_one_writes(cloud):
    for _ in range(3):
        started, told = threading.Barrier(4), []

        def start(started=started, told=told):
            started.wait()
            try:
                told.append(take(cloud))
            except LeaseError as error:
                told.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [one for one in told if not isinstance(one, str)]
        assert len(held) == 1 and sum("writes into" in str(one) for one in told) == 3
        held[0].release()
    assert not objects.listing(cloud)


def test_what_is_saved_is_one_line_that_changes_with_every_save(cloud):
    folder, lines = StageFolder.of(cloud, "one"), [saves(str(cloud))]
    write_text(folder.metrics, "{}")
    assert saves(str(cloud)) == lines[0] == ""
    for path in (folder.steps / "2" / SEAL, folder.steps / "4" / SEAL, folder.manifest):
        write_text(path, "{}")
        lines.append(saves(str(cloud)))
    objects.remove(folder.steps / "2" / SEAL)
    lines.append(saves(str(cloud)))
    assert len(set(lines)) == 5 and not any("\n" in line for line in lines)


def test_a_holder_elsewhere_is_told_by_its_signs_of_life(cloud, monkeypatch):
    monkeypatch.setattr(lease, "system", lambda: "another")
    clock = Clock()
    first = take(cloud, clock, clock.sleep)
    monkeypatch.undo()
    monkeypatch.setattr(lease, "_LOOK", 50)
    with pytest.raises(LeaseError, match="last sign of life 20"):
        take(cloud, clock, Clock(first.beat).sleep)
    second = take(cloud, clock, clock.sleep)
    assert [one.name for one in objects.listing(cloud / "lease")] == ["2.json"]
    with pytest.raises(LeaseError, match="took over from this process"):
        first.beat()  # what is gone is not made again
    assert [one.name for one in objects.listing(cloud / "lease")] == ["2.json"]
    second.beat()
    objects.remove(cloud / "lease" / "2.json")
    with pytest.raises(StorageError, match="is gone or damaged"):
        second.beat()
    with only_writer(cloud) as check:
        check()


def test_a_bucket_that_is_not_there_is_a_fault_of_storage(cloud):
    with pytest.raises(StorageError, match="cannot be written"):
        take(cloud.parent.with_name("nobody") / "x")


def test_an_object_is_made_once(cloud):
    assert objects.create(cloud / "a", b"one") and objects.create(cloud / "a", b"one")
    assert not objects.create(cloud / "a", b"two") and objects.read(cloud / "a") == b"one"


def test_files_and_seals(cloud):
    write_json(cloud / "d" / "a.json", {"a": 1})
    with pytest.raises(UserError, match="no such file"):
        read_json(cloud / "b.json")
    seal(cloud / "d", {})
    assert read_json(cloud / "d" / "a.json") == {"a": 1} and damage(cloud / "d") == ""
    content = objects.read(cloud / "d" / "a.json")
    for other, words in (
        (content[:-1], "instead of"),
        (content.replace(b"1", b"2"), "its content"),
    ):
        objects.write(cloud / "d" / "a.json", other)
        assert f"{cloud}/d/a.json is damaged" in damage(cloud / "d") and words in damage(
            cloud / "d"
        )
    objects.remove(cloud / "d" / "a.json")
    assert damage(cloud / "d") == f"{cloud}/d/a.json is damaged: the file is gone"
    assert "SEAL.json is damaged" in damage(cloud / "e")


def test_a_log_of_metrics_grows_at_every_save(cloud):
    with MetricsLog(cloud / "m.jsonl") as log:
        log.write(1, {"x": 1})
        log.write(2, {})
        log.sync()
        log.write(3, {})
        assert [row["step"] for row in read_metrics(cloud / "m.jsonl")] == [1, 2]
    assert read_metrics(cloud / "m.jsonl")[0] == {"step": 1, "x": 1}
    with MetricsLog(cloud / "m.jsonl", after_step=2) as log:
        log.write(3, {"again": True})
    assert [row["step"] for row in read_metrics(cloud / "m.jsonl")] == [1, 2, 3]


def test_whoever_lost_the_lease_does_not_replace_the_log(cloud):
    def lost():
        raise LeaseError("lost")

    hook = MetricsFile(cloud / "m.jsonl", lost)
    hook.on_start(Progress("a", 0, 9, None))
    write_text(cloud / "m.jsonl", '{"step": 7}\n')  # its successor's
    with pytest.raises(LeaseError):
        hook.on_end(Progress("a", 0, 9, None))
    assert read_metrics(cloud / "m.jsonl") == [{"step": 7}]


def state(number):
    return {"w": jax.numpy.arange(6.0).reshape(2, 3) + number, "n": jax.numpy.int32(number)}


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


def restored(folder):
    with StageCheckpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(abstract())


def test_checkpoints_come_back_and_half_of_one_never_does(cloud, monkeypatch):
    folder = StageFolder(cloud)
    assert restored(folder) is None
    with StageCheckpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"data": step})
    found = restored(folder)
    assert (found.step, found.extra, found.skipped) == (3, {"data": 3}, ())
    jax.tree.map(np.testing.assert_array_equal, found.state, state(3))
    assert sorted(path.name for path in folder.steps.iterdir()) == ["2", "3"]
    # A flipped bit in the newest one, and one that was cut short after it.
    (name,) = [
        one.name for one in objects.listing(folder.steps / "3") if "/ocdbt.process_0/d/" in one.name
    ]
    content = objects.read(folder.steps / "3" / name)
    objects.write(folder.steps / "3" / name, content[:-1] + bytes([content[-1] ^ 1]))
    objects.write(folder.steps / "4" / "state" / "manifest.ocdbt", b"half")
    found = restored(folder)
    assert found.step == 2 and "is damaged: its content" in found.skipped[-1]
    jax.tree.map(np.testing.assert_array_equal, found.state, state(2))


def test_checkpoints_come_back_from_every_path_that_is_not_refused(cloud):
    signs = writable_signs(cloud)
    refused = set("*?[\\#") if cloud.as_uri().startswith("gs:") else set()
    assert set(string.punctuation) - set(signs) == {"/"} | refused
    signs = signs.replace(";", "")  # where the emulator of gs:// ends an address
    folder = StageFolder.of(cloud / f"é {signs}", "one")
    with StageCheckpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"data": step})
    jax.tree.map(np.testing.assert_array_equal, restored(folder).state, state(3))
    assert saves(str(folder.steps.parents[2]))


def test_a_save_that_is_cut_short_leaves_the_one_before(cloud, monkeypatch):
    """The connection is lost while the seal, the last of a checkpoint, is on its way."""
    folder = StageFolder(cloud)
    names = []

    def lost(path, to):
        names.append(to.name)
        if to.name == SEAL:
            raise OSError("lost")

    with StageCheckpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(objects, "upload_file", lost)
            patch.setattr(objects, "write", lambda path, content: lost(None, path))
            checkpoints.save(2, state(2), {})
            with pytest.raises(WriteError, match=r"step 2 could not be written .* \(steps \[1\]\)"):
                checkpoints.wait()
        assert names[-1] == SEAL
        found = checkpoints.restore(abstract())
        assert found.step == 1
        checkpoints.save(2, state(5), {})
    jax.tree.map(np.testing.assert_array_equal, restored(folder).state, state(5))


def test_the_first_save_cut_short_is_as_if_there_was_none(cloud):
    """There is no seal yet, and nothing else says that it is whole."""
    objects.write(cloud / "steps" / "1" / "state" / "manifest.ocdbt", b"half")
    assert restored(StageFolder(cloud)) is None and not objects.listing(cloud)


def test_the_end_of_a_stage_is_there_or_not(cloud, monkeypatch):
    folder = StageFolder(cloud)
    manifest = Manifest("a", "", "r", "b", "", [], {}, 1, {}, {})

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objects, "write", killed)
        save_final(folder, state(7), manifest)
    assert not folder.is_finished()
    save_final(folder, state(8), manifest)
    tree, read = load_final(folder)
    jax.tree.map(np.testing.assert_array_equal, tree, state(8))
    assert read == dataclasses.replace(manifest, seal=read.seal)


def test_several_processes_are_told_that_s3_is_not_for_them(monkeypatch, cloud):
    check_shared(cloud)
    monkeypatch.setattr("medmoe_jax.parallel.processes.count", lambda: 2)
    if staging.is_staged(cloud):
        with pytest.raises(UserError, match="several processes cannot write checkpoints to s3://"):
            staging.check_processes(cloud)
    else:
        staging.check_processes(cloud)


def config_on(cloud):
    """The first stage of the tiny recipe, with its base and rows on object storage too."""
    objects.upload(tiny.base_path(), cloud / "base")
    objects.upload_file(tiny.data("knowledge"), cloud / "rows.jsonl")
    config = tiny.medcare_config()
    config.base.path = str(cloud / "base")
    config.data.sources.knowledge.path = str(cloud / "rows.jsonl")
    config.stages.order = ("aggregate",)
    return config


CONFIG = """import pickle
import string

def get_config():
    return pickle.loads({!r})
"""


def test_a_stopped_run_ends_where_one_on_disk_ends(cloud, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, on_disk = tiny.trained()
    config = config_on(cloud)
    run = Run(open_setup(config), str(cloud / "w"))
    asked = iter([False] * 4 + [True])
    with pytest.raises(Stopped):
        train(run, stop=lambda: next(asked))
    train(run)
    there, here = (StageFolder.of(w, "aggregate") for w in (run.workdir, on_disk))
    for part in ("loss", "gradient_norm", "rows_hash"):
        curves = [[row[part] for row in read_metrics(f.metrics)] for f in (there, here)]
        assert len(curves[0]) == tiny.STEPS and curves[0] == curves[1]
    (banks, manifest), (expected, other) = load_final(there), load_final(here)
    jax.tree.map(np.testing.assert_array_equal, banks, expected)
    assert manifest.recipe_fingerprint == other.recipe_fingerprint
    names = {one.name.split("/")[0] for one in objects.listing(cloud / "w")}
    assert names == {"run.json", "stages", "tensorboard"} and not list(tmp_path.iterdir())

    item = {"prompt": "What is aspirin for?", "answer": "pain", "choices": ["pain", "fever"]}
    objects.write(cloud / "t.jsonl", json.dumps(item).encode())
    (tmp_path / "recipe.py").write_text(CONFIG.format(pickle.dumps(config)))
    line = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={cloud}/w"]
    assert main.main(["eval", *line, f"--tasks={cloud}/t.jsonl"]) == 0, capsys.readouterr().err
    assert read_json(cloud / "w" / "report.json")["results"][0]["n"] == 1


@pytest.mark.processes
def test_two_processes_write_one_checkpoint_to_gs(emulators, tmp_path):
    """Each its own shards, which the first one makes a whole; on s3:// both are told at once."""
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    config = [f"--config={tmp_path / 'recipe.py'}", "--config.stages.order=('aggregate',)"]
    workdir = f"gs://{BUCKET}/two"
    with Several(tmp_path, [["train", *config, f"--workdir={workdir}"]] * 2) as both:
        assert both.statuses() == [0, 0], both.printed(0)[-3000:]
    _, reference = tiny.trained()
    there, here = (StageFolder.of(w, "aggregate") for w in (workdir, reference))
    rows, wanted = read_metrics(there.metrics), read_metrics(here.metrics)
    assert [row["rows_hash"] for row in rows] == [row["rows_hash"] for row in wanted]
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in wanted], rtol=1e-3
    )
    assert there.is_finished() and not damage(there.final)
    with Several(tmp_path, [["train", *config, f"--workdir=s3://{BUCKET}/two"]] * 2) as both:
        assert both.statuses() == [1, 1]
        assert "several processes cannot write checkpoints to s3://" in both.printed(0)
