"""Stage checkpoints: exact round trips, and what is left after damage, kills and full disks."""

import dataclasses
import errno
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from medmoe_jax.checkpoints import stages
from medmoe_jax.checkpoints.fingerprint import tree_fingerprint
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import check_folder
from medmoe_jax.checkpoints.manifest import BankEntry, Manifest
from medmoe_jax.checkpoints.stages import CheckpointError, StageCheckpoints
from medmoe_jax.errors import UserError
from tests import quick
from tests.several import free_port

MANIFEST = Manifest(
    stage="second",
    after="first",
    recipe_fingerprint="r",
    base_fingerprint="b",
    parent_fingerprint="p",
    operations=[{"op": "merge", "bank": "attention"}],
    banks={"lora": BankEntry("frozen", {"attn.q/lora_a": [2, 3]})},
    steps=7,
    metrics={"loss": 1.5},
    versions={"jax": "0"},
)


def make_state(seed: int, sharding=None) -> dict:
    """Banks, an optimiser's state, a typed key, a scalar, an empty and an absent branch."""
    banks = {
        "lora": {
            "a": jax.random.normal(jax.random.key(seed), (8, 6)),
            "b": jax.random.normal(jax.random.key(seed + 1), (8, 16)).astype(jnp.bfloat16),
        }
    }
    if sharding is not None:
        banks = jax.device_put(banks, sharding)
    return {
        "banks": banks,
        "optimiser": optax.adamw(1e-3).init(banks),
        "key": jax.random.key(seed),
        "step": jnp.int32(seed),
        "empty": {},
        "none": None,
    }


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding if sharding and x.ndim == 2 else x.sharding
        ),
        state,
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype, path
        if jax.dtypes.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes(), path


def save_steps(directory, steps, keep=3):
    with StageCheckpoints(StageFolder(directory), keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"data": {"0": [step, 0.1]}, "rows": step})


def restore(directory, like=0):
    with StageCheckpoints(StageFolder(directory)) as checkpoints:
        return checkpoints.restore(abstract(make_state(like)))


def step_folders(directory) -> list[str]:
    return sorted(path.name for path in (Path(directory) / "steps").iterdir())


def test_round_trip_is_bit_exact_and_extra_comes_back(tmp_path):
    save_steps(tmp_path, [10, 20])
    restored = restore(tmp_path)
    assert restored.step == 20 and restored.skipped == ()
    assert restored.extra == {"data": {"0": [20, 0.1]}, "rows": 20}
    assert_same(restored.state, make_state(20))
    with pytest.raises(AssertionError):
        assert_same(restored.state, make_state(10))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = {"a": jnp.arange(2.0**16)}
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
        bump(state)
        restored = checkpoints.restore({"a": jax.ShapeDtypeStruct((2**16,), jnp.float32)})
    np.testing.assert_array_equal(restored.state["a"], np.arange(2.0**16))


def test_a_sharded_state_is_restored_onto_another_sharding(tmp_path):
    assert jax.device_count() == 8
    rows = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    grid = jax.NamedSharding(jax.make_mesh((2, 2), ("x", "y")), jax.P("x", "y"))
    state = make_state(3, rows)
    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        checkpoints.save(3, state, {})
        restored = checkpoints.restore(abstract(state, grid))
    assert restored.state["banks"]["lora"]["a"].sharding == grid
    assert restored.state["optimiser"][0].mu["lora"]["b"].sharding == grid
    assert_same(restored.state, state)


def writable_signs(folder) -> str:
    """Signs of ASCII that a work directory may have in its name; the others are refused."""
    found = ""
    for sign in " " + string.punctuation.replace("/", ""):
        try:
            check_folder(folder / f"a{sign}")
        except UserError as error:
            assert f"has the sign {sign}, with which checkpoints cannot be written" in str(error)
        else:
            found += sign
    return found


def test_checkpoints_come_back_from_every_path_that_is_not_refused(tmp_path, monkeypatch):
    signs = writable_signs(tmp_path)
    assert set(string.punctuation) - set(signs) == set("/*?[\\")
    folder = tmp_path / f"é {signs}" / "stages" / "one"
    save_steps(folder, [10])
    assert_same(restore(folder).state, make_state(10))
    # Also where the path is not given whole, and where s3:// is written through another one.
    (tmp_path / "run[1]").mkdir()
    monkeypatch.chdir(tmp_path / "run[1]")
    with pytest.raises(UserError, match=r"workdir: '.*/run\[1\]/here' has the sign \["):
        check_folder("here")
    check_folder("s3://bucket/run[1]")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "run[1]"))
    with pytest.raises(UserError, match=r"TMPDIR: '.*/run\[1\]' has the sign \["):
        check_folder("s3://bucket/run")


def test_what_orbax_left_unjoined_is_not_sealed(tmp_path):
    with pytest.raises(CheckpointError, match=r"ocdbt\.process_0 is not joined to a whole"):
        save_steps(tmp_path / "run[1]", [10])
    assert restore(tmp_path / "run[1]") is None
    with pytest.raises(CheckpointError, match=r"ocdbt\.process_0 is not joined to a whole"):
        stages.save_final(StageFolder(tmp_path / "end[1]"), {"a": jnp.ones(2)}, MANIFEST)
    assert not StageFolder(tmp_path / "end[1]").is_finished()


def test_an_empty_folder_restores_nothing(tmp_path):
    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None


@pytest.mark.parametrize(
    "keep, left", [(1, ["40", "50"]), (2, ["40", "50"]), (3, ["30", "40", "50"])]
)
def test_only_the_newest_are_kept(tmp_path, keep, left):
    save_steps(tmp_path, [10, 20, 30, 40, 50], keep)
    assert step_folders(tmp_path) == left


def test_a_step_is_not_saved_twice(tmp_path):
    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        with pytest.raises(ValueError, match="step 1 is already saved"):
            checkpoints.save(1, make_state(1), {})
        with pytest.raises(ValueError, match="JSON-able"):
            checkpoints.save(2, make_state(2), {"x": object()})


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_any_damaged_file_sends_the_run_to_the_checkpoint_before(tmp_path, damage, caplog):
    save_steps(tmp_path / "whole", [10, 20])
    newest = tmp_path / "whole" / "steps" / "20"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    files = [name for name in files if (newest / name).stat().st_size or damage is Path.unlink]
    assert len(files) > 8
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / "steps" / "20" / name)
        caplog.clear()
        with StageCheckpoints(StageFolder(copy)) as checkpoints:
            restored = checkpoints.restore(abstract(make_state(0)))
            assert restored.step == 10, name
            assert_same(restored.state, make_state(10))
            assert len(restored.skipped) == 1 and str(copy / "steps" / "20") in restored.skipped[0]
            assert restored.skipped[0] in caplog.text
            # The run goes on and saves the damaged step again.
            checkpoints.save(20, make_state(21), {})
            assert checkpoints.restore(abstract(make_state(0))).step == 20
        assert_same(restore(copy).state, make_state(21))


def test_damaged_steps_go_only_when_a_newer_one_is_whole(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    flip(tmp_path / "steps" / "30" / "state" / "_METADATA")
    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))).step == 20
        assert step_folders(tmp_path) == ["10", "20", "30"]
        checkpoints.save(25, make_state(25), {})
    assert step_folders(tmp_path) == ["10", "20", "25"]


def test_a_stage_does_not_start_over_when_every_checkpoint_is_damaged(tmp_path):
    save_steps(tmp_path, [10, 20])
    for step in ("10", "20"):
        truncate(tmp_path / "steps" / step / "extra" / "data.json")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .*steps is usable.*data.json"):
        restore(tmp_path)
    for step in ("10", "20"):
        (tmp_path / "steps" / step / "SEAL.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        restore(tmp_path)


def test_the_first_checkpoint_killed_before_its_seal_is_not_used(tmp_path, caplog):
    """Nothing tells whether it is whole: the stage begins again, and saves it anew."""
    save_steps(tmp_path, [10])
    (tmp_path / "steps" / "10" / "SEAL.json").unlink()
    assert restore(tmp_path) is None
    assert "its seal SEAL.json is not there" in caplog.text
    assert not (tmp_path / "steps" / "10" / "SEAL.json").exists()
    save_steps(tmp_path, [10])
    assert restore(tmp_path).step == 10


def test_a_checkpoint_of_another_place_is_refused(tmp_path):
    """It is of another step, stage or recipe: swapped, renamed, or from another run."""
    of = {"stage": "first", "recipe": "r"}

    def saved(folder, steps=(10, 20), of=of):
        with StageCheckpoints(StageFolder(folder), 3, of) as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), {})

    def refused(folder, words):
        with (
            StageCheckpoints(StageFolder(folder), 3, of) as checkpoints,
            pytest.raises(CheckpointError, match=f"{words}.*put the checkpoints.*or remove"),
        ):
            checkpoints.restore(abstract(make_state(0)))

    saved(tmp_path / "a")
    steps = tmp_path / "a" / "steps"
    (steps / "20").rename(steps / "30")
    refused(tmp_path / "a", r"steps/30 is not of this place: .* says step 20 and not 30")
    (steps / "10").rename(steps / "20")
    (steps / "30").rename(steps / "10")
    refused(tmp_path / "a", "steps/20 is not of this place: .* says step 10 and not 20")
    for other in ({**of, "stage": "second"}, {**of, "recipe": "q"}, {}):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        saved(tmp_path / "b", of=other)
        refused(tmp_path / "b", "steps/20 is not of this place")


def test_an_edited_seal_is_damage(tmp_path):
    save_steps(tmp_path, [10, 20])
    path = tmp_path / "steps" / "20" / "SEAL.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 30'))
    restored = restore(tmp_path)
    assert restored.step == 10 and "was changed after it was written" in restored.skipped[0]
    (tmp_path / "steps" / "10" / "state" / "more").write_text("")
    with pytest.raises(CheckpointError, match="state/more is damage: no such file was written"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": jax.ShapeDtypeStruct((2,), jnp.int32)}, r"step is int32\[\] .* int32\[2\]"),
        ({"step": jax.ShapeDtypeStruct((), jnp.float32)}, r"step is int32\[\] .* float32\[\]"),
        ({"more": jax.ShapeDtypeStruct((), jnp.int32)}, "more is absent in the checkpoint"),
        ({"empty": None, "step": None}, r"step is int32\[\] in the checkpoint and absent"),
    ],
)
def test_another_state_than_the_saved_one_is_refused(tmp_path, change, message):
    save_steps(tmp_path, [1, 2])
    with (
        StageCheckpoints(StageFolder(tmp_path)) as checkpoints,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoints.restore({**abstract(make_state(0)), **change})


SAVE_FOR_EVER = """
import signal, sys, jax, jax.numpy as jnp
from pathlib import Path
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.stages import StageCheckpoints
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
with StageCheckpoints(StageFolder(Path(sys.argv[1])), keep=2) as checkpoints:
    restored = checkpoints.restore({"a": jax.ShapeDtypeStruct((300_000,), jnp.float32)})
    step = restored.step if restored else 0
    while True:
        step += 1
        checkpoints.save(step, {"a": jnp.full((300_000,), step, jnp.float32)}, {"step": step})
        print(step, flush=True)
"""


def start_saving(directory):
    return subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def check_after_kill(directory) -> int:
    with StageCheckpoints(StageFolder(directory), keep=2) as checkpoints:
        restored = checkpoints.restore({"a": jax.ShapeDtypeStruct((300_000,), jnp.float32)})
    assert restored is not None
    assert set(np.asarray(restored.state["a"])) == {restored.step}
    assert restored.extra == {"step": restored.step}
    return restored.step


@pytest.mark.processes
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_process_ended_while_it_saves_loses_at_most_that_save(tmp_path, sent):
    last = 0
    for turn in range(4):
        process = start_saving(tmp_path)
        begun = last
        while begun < last + 3:
            begun = int(process.stdout.readline())
        time.sleep(0.013 * turn)
        process.send_signal(sent)
        begun = int((process.communicate(timeout=600)[0].split() or [begun])[-1])
        assert process.returncode != 0
        restored = check_after_kill(tmp_path)
        assert last < begun - 2 <= restored <= begun + 1  # begun: the last save call to return
        last = restored


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_middle_of_a_save_is_heard_and_the_save_made(tmp_path, monkeypatch):
    save_async = ocp.training.Checkpointer.save_checkpointables_async

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save_async(*args, **kwargs)

    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        checkpoints.save(10, make_state(10), {})
        monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(20, make_state(20), {})
    assert restore(tmp_path).step == 20


def test_a_write_error_names_the_folder_once_and_leaves_the_earlier_ones(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with StageCheckpoints(StageFolder(tmp_path)) as checkpoints:
        checkpoints.save(10, make_state(10), {})
        checkpoints.wait()
        monkeypatch.setattr(stages, "seal", full)
        checkpoints.save(20, make_state(20), {})
        with pytest.raises(CheckpointError, match=r"step 20 .*steps: .*No space.*steps \[10\]"):
            checkpoints.wait()
        assert step_folders(tmp_path)[0] == "10"
    monkeypatch.undo()
    restored = restore(tmp_path)
    assert restored.step == 10 and "20 was interrupted" in restored.skipped[0]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("again", ["the same process", "the next one"])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_later(small_disk, again):
    def big(step):
        return {"a": jax.random.normal(jax.random.key(step), (2**18,))}

    with StageCheckpoints(StageFolder(small_disk), keep=2) as checkpoints:
        checkpoints.save(1, big(1), {})
        checkpoints.save(2, big(2), {})
        checkpoints.wait()
        (small_disk / "filler").write_bytes(bytes(700_000))
        with pytest.raises(CheckpointError, match=r"step 3 .*No space left.*steps \[1, 2\]"):
            checkpoints.save(3, big(3), {})
            checkpoints.wait()
        (small_disk / "filler").unlink()
        if again == "the same process":
            checkpoints.save(3, big(3), {})
            checkpoints.wait()
            assert step_folders(small_disk) == ["2", "3"]
            return
    with StageCheckpoints(StageFolder(small_disk), keep=2) as checkpoints:
        like = {"a": jax.ShapeDtypeStruct((2**18,), jnp.float32)}
        assert checkpoints.restore(like).step == 2
        checkpoints.save(3, big(3), {})
        assert_same(checkpoints.restore(like).state, big(3))
    assert step_folders(small_disk) == ["2", "3"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot open the checkpoints in"):
        StageCheckpoints(StageFolder(tmp_path / "file"))
    with pytest.raises(ValueError, match="keep is 0"):
        StageCheckpoints(StageFolder(tmp_path), keep=0)


def test_a_finished_stage_comes_back_with_its_manifest(tmp_path):
    folder = StageFolder(tmp_path)
    banks = make_state(5)["banks"]
    assert not folder.is_finished()
    with pytest.raises(CheckpointError, match="no finished stage"):
        stages.load_final(folder)
    stages.save_final(folder, banks, MANIFEST)
    assert folder.is_finished()
    got, manifest = stages.load_final(folder)
    assert manifest == dataclasses.replace(MANIFEST, seal=manifest.seal) and manifest.seal
    assert_same(got, banks)
    assert stages.abstract_final(folder) == jax.eval_shape(lambda: make_state(5)["banks"])
    rows = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    got, _ = stages.load_final(folder, lambda _: abstract(banks, rows))
    assert got["lora"]["a"].sharding == rows
    assert_same(got, banks)
    with pytest.raises(ValueError, match="finished already"):
        stages.save_final(folder, banks, MANIFEST)
    with pytest.raises(CheckpointError, match="lora/a"):
        stages.load_final(folder, lambda _: {"lora": {"b": abstract(banks)["lora"]["b"]}})


def test_an_interrupted_end_is_made_again_and_a_damaged_one_is_refused(tmp_path, monkeypatch):
    folder = StageFolder(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "seal", full)
    with pytest.raises(CheckpointError, match=r"could not be written to .*final: .*No space"):
        stages.save_final(folder, make_state(1)["banks"], MANIFEST)
    assert not folder.is_finished()
    monkeypatch.undo()
    stages.save_final(folder, make_state(2)["banks"], dataclasses.replace(MANIFEST, steps=8))
    got, manifest = stages.load_final(folder)
    assert manifest.steps == 8
    assert_same(got, make_state(2)["banks"])
    flip(tmp_path / "final" / "banks" / "_METADATA")
    with pytest.raises(CheckpointError, match="_METADATA is damaged"):
        stages.load_final(folder)


TWO_PROCESSES = """
import json, os, sys
import jax, jax.numpy as jnp, numpy as np
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from pathlib import Path
from medmoe_jax.checkpoints.fingerprint import tree_fingerprint
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.stages import StageCheckpoints, load_final, save_final
from medmoe_jax.checkpoints.lease import check_folder
from medmoe_jax.checkpoints.manifest import Manifest
rows = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
columns = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P(None, "x"))
value = np.arange(128.0, dtype=np.float32).reshape(8, 16)
a = jax.make_array_from_callback(value.shape, rows, lambda part: value[part])
state = {"a": a, "r": jax.device_put(value, jax.NamedSharding(rows.mesh, jax.P()))}
like = lambda s: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state)
with StageCheckpoints(StageFolder(Path(folder)), keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"step": step})
if index == 0:
    os.remove(os.path.join(folder, "steps", "3", "state", "_METADATA"))
with StageCheckpoints(StageFolder(Path(folder)), keep=2) as checkpoints:
    restored = checkpoints.restore(like(columns))
save_final(StageFolder(Path(folder)), state, Manifest("s", "", "", "", "", [], {}, 3, {}, {}))
banks, manifest = load_final(StageFolder(Path(folder)), lambda _: like(columns))
print(restored.step, restored.extra["step"], len(restored.skipped), manifest.steps,
      *(tree_fingerprint(tree) for tree in (state, restored.state, banks)))
"""


@pytest.mark.processes
def test_two_processes_save_and_restore_together(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(port), str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": quick.flags(4)},
        )
        for index in range(2)
    ]
    try:
        answers = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    value = np.arange(128.0, dtype=np.float32).reshape(8, 16)
    fingerprint = tree_fingerprint({"a": value, "r": value})
    for process, (out, err) in zip(processes, answers, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert out.splitlines()[-1].split() == [
            "2",
            "2",
            "1",
            "3",
            fingerprint,
            fingerprint,
            fingerprint,
        ]
