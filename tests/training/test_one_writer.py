"""Two runs in one work directory: one writes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from medmoe_jax.checkpoints import lease as lib
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import LeaseError, only_writer
from medmoe_jax.cli.main import main
from medmoe_jax.training.hooks.protocol import Hook
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import several, tiny

CURVE = ("step", "loss", "rows_hash", "tokens")


def curve(workdir, name):
    rows = read_metrics(StageFolder.of(workdir, name).metrics)
    return [[row[key] for key in CURVE] for row in rows]


@pytest.mark.processes
def test_two_starts_at_once(tmp_path):
    """The one that writes is frozen until the other was refused: its sleep costs it nothing."""
    _, reference = tiny.trained()
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    workdir = tmp_path / "w"
    command = ["train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={workdir}"]
    program = [sys.executable, *several.MAIN, *command]
    running = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        until = time.monotonic() + 300
        while (found := max(lib._entries(workdir / "lease"), default=lib._NONE)).holder is None:
            assert time.monotonic() < until and all(p.poll() is None for p in running)
            time.sleep(0.005)
        (writer,) = (p for p in running if p.pid == found.holder.process)
        (other,) = (p for p in running if p is not writer)
        writer.send_signal(signal.SIGSTOP)
        said = other.communicate(timeout=300)[1]
        assert other.returncode == 1 and "Traceback" not in said
        assert f"medmoe train: error: process {writer.pid} on {os.uname().nodename} writes" in said
        writer.send_signal(signal.SIGCONT)
        said = writer.communicate(timeout=300)[1]
        assert writer.returncode == 0, said
    finally:
        for process in running:
            process.kill()
            process.communicate()
    for name in ("aggregate", "align"):
        assert curve(workdir, name) == curve(reference, name)
    assert not (workdir / "lease").exists()


class Stolen(Hook):
    """Another program takes the work directory over after a step."""

    def __init__(self, workdir, step):
        self.place, self.step = workdir / "lease", step

    def on_step(self, progress):
        if progress.step == self.step:
            holder = lib._own()._replace(host="far")
            (self.place / "2.json").write_text(json.dumps(holder._asdict()))
        return {}


@pytest.mark.slow
def test_a_run_whose_directory_was_taken_over_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "_DEAD", -1)  # no sign of life is ever fresh
    config = tiny.medcare_config()
    config.run.save_every = 3
    with pytest.raises(LeaseError, match=r"on far writes into .* without writing more"):
        train(Run(open_setup(config), tmp_path), more_hooks=lambda _: [Stolen(tmp_path, 6)])
    folder = StageFolder.of(tmp_path, "aggregate")
    # The metrics of a step are read while the next one is made.
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5]
    assert [path.name for path in folder.steps.iterdir()] == ["3"]
    assert sorted(os.listdir(tmp_path / "lease")) == ["1.json", "2.json"]


@pytest.mark.slow
def test_who_writes_is_refused_and_who_reads_is_not(tmp_path, capsys):
    """A finished stage is read beside a running one."""
    _, workdir = tiny.trained()
    (tmp_path / "recipe.py").write_text(several.CONFIG)
    command = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={workdir}"]
    with only_writer(workdir):
        assert main(["train", *command]) == 1
        assert f"process {os.getpid()} on" in capsys.readouterr().err
        assert main(["generate", *command, "--max-tokens=1", "What is aspirin for?"]) == 0
