"""Experiment trackers: what they were told, read back from where they keep it without a network."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.training.hooks import trackers
from medmoe_jax.training.hooks.protocol import Progress, StepRecord
from medmoe_jax.training.hooks.trackers import Trackers
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import tiny

CONFIG = {"stages": {"order": ("learn", "align")}, "run": {"log_every": 2, "keep": 3}}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Every tracker keeps what it is told below the test's own folder."""
    for name, value in {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlruns'}",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)


def told(names, workdir, first, last, error=None):
    """Tell trackers of steps `first .. last` of a stage, in a run that ends so."""
    with Trackers(names, workdir, CONFIG) as all_:
        (hook,) = all_.hooks(2)
        all_.begin()
        progress = Progress("learn", last, last + 1, None)
        for step in range(first, last + 1):
            hook.on_metrics(progress, StepRecord(step, {}, {}, {"loss": 1 / step, "a/b": step}))
        if error:
            raise error


def test_mlflow_goes_on_with_its_run(tmp_path):
    from mlflow.tracking import MlflowClient

    workdir = tmp_path / "mine"
    with pytest.raises(Stopped):
        told(["mlflow"], workdir, 1, 4, Stopped("the machine"))
    client = MlflowClient()
    (one,) = client.search_experiments(filter_string="name = 'medmoe_jax'")
    (run,) = client.search_runs([one.experiment_id])
    assert run.info.status == "KILLED" and run.info.run_name == "mine"
    assert run.data.params == {
        "stages.order": "('learn', 'align')", "run.log_every": "2", "run.keep": "3",
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        told(["mlflow"], workdir, 5, 8, ZeroDivisionError())
    (run,) = client.search_runs([one.experiment_id])
    assert run.info.status == "FAILED"
    losses = client.get_metric_history(run.info.run_id, "learn/loss")
    assert [(each.step, each.value) for each in losses] == [(n, 1 / n) for n in (2, 4, 6, 8)]
    assert run.data.metrics["learn/a/b"] == 8


def wandb_records(folder):
    """What the offline files below a folder hold: a log in 32 KiB blocks, as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # no header fits the rest of a block
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            if at + 7 + size > len(content):  # it is being written
                break
            part += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(part)
                part = b""


def test_wandb_goes_on_with_its_run(tmp_path):
    workdir = tmp_path / "mine"
    told(["wandb"], workdir, 1, 2)
    begun = int(time.time())
    while int(time.time()) == begun:  # it names a start's folder by the second
        pass
    with pytest.raises(ZeroDivisionError):
        told(["wandb"], workdir, 3, 4, ZeroDivisionError())
    # Its service writes in a process of its own, which may be at it still.
    records, until = [], time.monotonic() + 120
    while sum(one.HasField("exit") for one in records) < 2 and time.monotonic() < until:
        records = list(wandb_records(tmp_path))
    runs = [one.run for one in records if one.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (runs[0].run_id, "medmoe_jax", "mine")
    }
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(config["run"]) == CONFIG["run"]
    rows = [
        {".".join(item.nested_key) or item.key: float(item.value_json) for item in one.history.item}
        for one in records
        if one.HasField("history")
    ]
    seen = [(row["learn/step"], row["learn/loss"], row["learn/a/b"]) for row in rows]
    assert seen == [(2, 0.5, 2), (4, 0.25, 4)]
    ends = [one.exit.exit_code for one in records if one.HasField("exit")]
    assert ends == [0, 1]
    axes = {one.metric.glob_name or one.metric.name: one.metric.step_metric for one in records}
    assert axes["learn/*"] == "learn/step"


def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    """With a stand-in of the same signatures: the package does not take our pillow."""
    calls = []

    class Run:
        def log(self, metrics, step=None):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    def init(project, name=None, *, config=None, resume="never", embed=True):
        calls.append((project, name, config, resume, embed))
        return Run()

    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(init=init, __spec__=SimpleNamespace())
    )
    told(["trackio"], tmp_path / "mine", 1, 2)
    told(["trackio"], tmp_path / "mine", 3, 4)
    name = calls[0][1]
    begun = ("medmoe_jax", name, CONFIG, "allow", False)
    assert name.startswith("mine-")
    assert calls == [
        begun, (2, {"learn/loss": 0.5, "learn/a/b": 2}), "finish",
        begun, (4, {"learn/loss": 0.25, "learn/a/b": 4}), "finish",
    ]  # fmt: skip


class Failing:
    """A tracker that cannot be reached from some call on."""

    errors = (ConnectionError,)
    fails = "begin"

    def begin(self, name, config, known):
        return self._unless("begin")

    def log(self, stage, step, metrics):
        self._unless("log")

    def end(self, how):
        self._unless("end")

    def _unless(self, what):
        if what == self.fails:
            raise ConnectionError("nobody is there")
        return "7"


def test_one_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """Before the first step that is an error; later a note, and the others are told on."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    with pytest.raises(UserError, match=r"run\.trackers: wandb does not begin: nobody is there$"):
        told(["wandb"], tmp_path, 1, 2)
    assert not (tmp_path / "trackers.json").exists()
    monkeypatch.setattr(Failing, "fails", "log")
    told(["wandb", "mlflow"], tmp_path, 1, 4)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("wandb could not be told step 2 and is told nothing more") == 1
    monkeypatch.setattr(Failing, "fails", "begin")
    with pytest.raises(UserError, match=r"nobody is there; .*trackers\.json names its run$"):
        told(["wandb"], tmp_path, 5, 6)


def test_names_and_packages(tmp_path, monkeypatch):
    config = tiny.medcare_config()
    config.run.trackers = ("wandbb",)
    with pytest.raises(UserError, match=r"run\.trackers: .* 'wandbb'; did you mean 'wandb'\?"):
        open_setup(config)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config.run.trackers = ("mlflow",)
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install 'medmoe_jax\[mlflo"):
        train(Run(open_setup(config), tmp_path))


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_what_the_metrics_log_has(tmp_path):
    from mlflow.tracking import MlflowClient

    config = tiny.medcare_config()
    config.stages.order, config.run.trackers = ("aggregate",), ("mlflow",)
    config.stages.aggregate.steps = 5
    run, asked = Run(open_setup(config), tmp_path / "w"), iter([False, False, True])
    with pytest.raises(Stopped):
        train(run, stop=lambda: next(asked))
    train(run)
    client = MlflowClient()
    (one,) = client.search_experiments(filter_string="name = 'medmoe_jax'")
    (kept,) = client.search_runs([one.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.data.params["stages.aggregate.steps"] == "5"
    lines = {line.pop("step"): line for line in read_metrics(run.stage("aggregate").folder.metrics)}
    names = set(lines[4]) - {"router"}
    assert {"loss", "learning_rate", "tokens_per_second", "gradient_norm"} <= names
    assert set(kept.data.metrics) == {f"aggregate/{name}" for name in names}
    losses = client.get_metric_history(kept.info.run_id, "aggregate/loss")
    assert [(each.step, each.value) for each in losses] == [
        (step, lines[step]["loss"]) for step in (2, 4, 5)
    ]
