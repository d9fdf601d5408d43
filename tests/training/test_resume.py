"""A run that is stopped, however often and wherever, ends where an undisturbed one ends."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.data.batches import BatchStream
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.parallel.processes import Notice
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import open_trained
from tests import tiny
from tests.crash import Stop, crash_in_batch

pytestmark = pytest.mark.slow

STAGES = ("aggregate", "align")
# Of a line of metrics: what the machine's clock does not enter.
CURVE = ("step", "loss", "gradient_norm", "target_tokens", "tokens", "learning_rate")


def curve(workdir, name):
    rows = read_metrics(StageFolder.of(workdir, name).metrics)
    return [[row[key] for key in CURVE] for row in rows]


def assert_same_run(workdir, reference):
    """Loss curves, counts, banks and base, bit for bit."""
    setup = open_setup(tiny.medcare_config())
    for name in STAGES:
        assert curve(workdir, name) == curve(reference, name)
        counts = [
            json.loads((StageFolder.of(w, name).manifest).read_text())["metrics"]["rows"]
            for w in (workdir, reference)
        ]
        assert counts[0] == counts[1]
        models = [open_trained(Run(setup, w), name) for w in (workdir, reference)]
        for part in ("banks", "base"):
            jax.tree.map(np.testing.assert_array_equal, *(getattr(m, part) for m in models))


def disturb_save(monkeypatch, step, action):
    """Do something while the checkpoint of a step is being written."""
    real = store.seal

    def seal(path, of):
        if path.name == str(step):
            action()
        return real(path, of)

    monkeypatch.setattr(store, "seal", seal)


def disk_full():
    raise OSError(28, "No space left on device")


def control_c(monkeypatch, step, number):
    """Ctrl-C when the batch of this number is asked for, while a step's checkpoint is written."""
    writing, given, real = threading.Event(), [], BatchStream.__next__
    disturb_save(monkeypatch, step, lambda: (writing.set(), time.sleep(0.3)))

    def pressed(stream):
        given.append(0)
        if len(given) == number:
            assert writing.wait(timeout=600)
            raise KeyboardInterrupt
        return real(stream)

    monkeypatch.setattr(BatchStream, "__next__", pressed)


def steps_on_disk(workdir, name):
    folder = StageFolder.of(workdir, name).steps
    return sorted(int(p.parent.name) for p in folder.glob("*/SEAL.json"))


def test_a_run_stopped_four_times(tmp_path, monkeypatch, capsys):
    """A crash, Ctrl-C during a save, a full disk, and a crash between the last save and the end."""
    _, reference = tiny.trained()

    disturbances = {"crash": crash_in_batch, "save": disturb_save, "control_c": control_c}

    def attempt(error, **kind):
        with monkeypatch.context() as patch, pytest.raises(error) as caught:
            for disturb, arguments in kind.items():
                disturbances[disturb](patch, *arguments)
            train(Run(open_setup(tiny.medcare_config()), tmp_path))
        capsys.readouterr()
        return str(caught.value)

    attempt(Stop, crash=(7,))
    assert steps_on_disk(tmp_path, "aggregate") == [4]
    attempt(KeyboardInterrupt, control_c=(8, 4 + 1))  # it goes on after step 4
    assert steps_on_disk(tmp_path, "aggregate") == [4, 8]
    message = attempt(store.CheckpointError, save=(12, disk_full))
    assert "No space left on device" in message and "Earlier checkpoints are intact" in message
    assert 8 in steps_on_disk(tmp_path, "aggregate")
    assert not (StageFolder.of(tmp_path, "aggregate").manifest).exists()
    attempt(Stop, crash=(4 + 6,))  # four are left of stage 1
    assert (StageFolder.of(tmp_path, "aggregate").manifest).exists()
    assert steps_on_disk(tmp_path, "align") == [4]
    train(Run(open_setup(tiny.medcare_config()), tmp_path))
    assert "stage 'align' continues after step 4 of 12" in capsys.readouterr().err
    assert_same_run(tmp_path, reference)


def test_a_notice_then_storage_that_is_slow_and_lost(tmp_path, monkeypatch):
    """SIGTERM, every checkpoint taking longer than its steps; then the disk is gone for a while."""
    _, reference = tiny.trained()
    given, real = [], BatchStream.__next__

    def noticed(stream):
        given.append(0)
        if len(given) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(stream)

    with monkeypatch.context() as patch, Notice() as notice:
        patch.setattr(BatchStream, "__next__", noticed)
        disturb_save(patch, 4, lambda: time.sleep(0.5))
        with pytest.raises(
            Stopped, match="stage 'aggregate' was asked to stop and is saved at step 6"
        ):
            train(Run(open_setup(tiny.medcare_config()), tmp_path), stop=notice)
    assert steps_on_disk(tmp_path, "aggregate") == [4, 6]
    steps, elsewhere = StageFolder.of(tmp_path, "aggregate").steps, tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        disturb_save(patch, 8, lambda: steps.rename(elsewhere))
        with pytest.raises(store.CheckpointError, match=r"step 8 could not be written.*8 is gone"):
            train(Run(open_setup(tiny.medcare_config()), tmp_path))
    shutil.rmtree(steps, ignore_errors=True)
    elsewhere.rename(steps)
    train(Run(open_setup(tiny.medcare_config()), tmp_path))
    assert_same_run(tmp_path, reference)


def nothing_is_held():
    """For `more_hooks`: fails where the base of one stage is alive when the next one trains."""
    held = []

    def make(prepared):
        gc.collect()
        assert not any(array() is not None for array in held), prepared.stage.name
        held.extend(map(weakref.ref, jax.tree.leaves(prepared.frozen["base"])))
        return ()

    return make


def test_two_undisturbed_runs_are_equal(tmp_path):
    """The control: without it the tests above would compare luck. One of them is traced."""
    _, reference = tiny.trained()
    config = tiny.medcare_config()
    config.run.profile = (2, 3)
    train(Run(open_setup(config), tmp_path), more_hooks=nothing_is_held())
    assert_same_run(tmp_path, reference)
    for name in STAGES:
        trace = "profile/plugins/profile/*/*.xplane.pb"
        assert len(list(StageFolder.of(tmp_path, name).path.glob(trace))) == 1
        assert not StageFolder.of(reference, name).profile.exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch):
    _, reference = tiny.trained()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        crash_in_batch(patch, 10)
        train(Run(open_setup(tiny.medcare_config()), tmp_path))
    assert steps_on_disk(tmp_path, "aggregate") == [4, 8]
    newest = StageFolder.of(tmp_path, "aggregate").steps / "8"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    train(Run(open_setup(tiny.medcare_config()), tmp_path))
    assert_same_run(tmp_path, reference)


CHILD = """
from tests import tiny
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
import sys
train(Run(open_setup(tiny.medcare_config()), sys.argv[1]))
"""


def start_child(workdir):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(workdir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.processes
def test_killed_in_the_middle_of_each_stage(tmp_path):
    """SIGKILL, as a preempted machine does it."""
    _, reference = tiny.trained()
    workdir = tmp_path / "w"
    for name in STAGES:
        child = start_child(workdir)
        deadline = time.monotonic() + 600
        while not steps_on_disk(workdir, name):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (StageFolder.of(workdir, name).manifest).exists()
        assert steps_on_disk(workdir, name)[-1] < tiny.STEPS
        shutil.copytree(workdir, tmp_path / name)
    child = start_child(workdir)
    assert child.wait(timeout=600) == 0, child.stderr.read()
    assert_same_run(workdir, reference)
    train(Run(open_setup(tiny.medcare_config()), tmp_path / "aggregate"))
    assert_same_run(tmp_path / "aggregate", reference)


def test_a_streamed_source_is_trained_and_resumed_bit_for_bit(tmp_path):
    def setup(steps=6):
        config = tiny.medcare_config()
        config.stages.order = ("aggregate",)
        config.stages.aggregate.steps = steps
        config.stages.aggregate.epochs = 1.0
        config.data.sources.knowledge.window = 2048
        return open_setup(config)

    with pytest.raises(UserError, match=r"stages\.aggregate\.steps is 0, but the rows of source"):
        train(Run(setup(0), tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    train(Run(setup(), tmp_path / "whole"))
    asked = []
    with pytest.raises(Stopped):
        train(Run(setup(), tmp_path / "cut"), stop=lambda: asked.append(0) or len(asked) == 3)
    train(Run(setup(), tmp_path / "cut"))
    assert curve(tmp_path / "cut", "aggregate") == curve(tmp_path / "whole", "aggregate")
    assert len(curve(tmp_path / "cut", "aggregate")) == 6
    changed = setup()
    changed.config.data.sources.knowledge.window = 1024
    with pytest.raises(UserError, match="another recipe"):
        train(Run(changed, tmp_path / "whole"))
