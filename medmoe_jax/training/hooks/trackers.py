"""Experiment trackers: the metrics of a run told to Weights & Biases, Trackio or MLflow.

A work directory is one run of each tracker: W/trackers.json keeps its id, and a restart goes on
with it. Metrics have the names that TensorBoard has, `STAGE/METRIC`, over the steps of the stage.
Where a tracker writes, and for whom, its own environment variables say (docs/trackers.md).
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import httpx

from medmoe_jax.checkpoints.records import read_record, write_record
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import place
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.terminal import note

NAME = "trackers.json"
_PROJECT = "medmoe_jax"  # unless the tracker's own variable names another
_Errors = tuple[type[Exception], ...]
_FINISHED, _FAILED, _STOPPED = "finished", "failed", "stopped"


class Tracker(Protocol):
    """One tracker's run.

    Attributes:
      errors: what its library raises where it cannot be reached or told.
    """

    errors: _Errors

    def begin(self, name: str, config: Mapping[str, Any], known: str) -> str:
        """Begin a run of this name, or go on with the one of id `known`; gives its id."""
        ...

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell it the metrics of a step."""
        ...

    def end(self, how: str) -> None:
        """End the run: it is `finished`, it `failed`, or it was `stopped` and will go on."""
        ...


class WandB:
    """Weights & Biases."""

    def __init__(self) -> None:
        import wandb

        self._library, self._stages = wandb, set()
        self.errors: _Errors = (wandb.errors.Error, OSError)

    def begin(self, name: str, config: Mapping[str, Any], known: str) -> str:
        """As of `Tracker`."""
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            config=dict(config),
            allow_val_change=True,  # what is free to change between restarts
            settings=self._library.Settings(console="off"),
        )
        return self._run.id

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`; each stage counts its own steps, on an axis of its own."""
        axis = f"{stage}/step"
        if stage not in self._stages:
            self._run.define_metric(axis)
            self._run.define_metric(f"{stage}/*", step_metric=axis)
            self._stages.add(stage)
        self._run.log({**_named(stage, metrics), axis: step})

    def end(self, how: str) -> None:
        """As of `Tracker`."""
        if how == _STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(how != _FINISHED))


class Trackio:
    """Trackio, which keeps no state of a run's end."""

    def __init__(self) -> None:
        import trackio

        self._library = trackio
        self.errors: _Errors = (httpx.HTTPError, OSError, ValueError)

    def begin(self, name: str, config: Mapping[str, Any], known: str) -> str:
        """As of `Tracker`; a run is known by its name, so that has to be like no other."""
        named = known or f"{name}-{uuid.uuid4().hex[:8]}"
        self._run = self._library.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=named,
            config=dict(config),
            resume="allow",
            embed=False,
        )
        return named

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        self._run.log(_named(stage, metrics), step=step)

    def end(self, how: str) -> None:
        """As of `Tracker`."""
        self._run.finish()


class MLflow:
    """MLflow."""

    _STATUS: Mapping[str, str] = {_FINISHED: "FINISHED", _FAILED: "FAILED", _STOPPED: "KILLED"}
    _PARAMETERS = 100  # that one request takes
    _LONGEST = 6000  # characters of a parameter

    def __init__(self) -> None:
        from mlflow import entities, exceptions
        from mlflow.tracking import MlflowClient

        self._client, self._entities = MlflowClient, entities
        self.errors: _Errors = (exceptions.MlflowException, OSError)

    def begin(self, name: str, config: Mapping[str, Any], known: str) -> str:
        """As of `Tracker`; parameters are those that the run began with: none can be changed."""
        client = self._tracking = self._client()
        if known:
            client.update_run(known, status="RUNNING")
            self._id = known
            return known
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment)
        self._id = client.create_run(number, run_name=name).info.run_id
        fields = [
            self._entities.Param(_allowed(field), str(value)[: self._LONGEST])
            for field, value in _fields(config)
        ]
        for first in range(0, len(fields), self._PARAMETERS):
            client.log_batch(self._id, params=fields[first : first + self._PARAMETERS])
        return self._id

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        now = int(time.time() * 1000)
        told = [
            self._entities.Metric(_allowed(name), value, now, step)
            for name, value in _named(stage, metrics).items()
        ]
        self._tracking.log_batch(self._id, metrics=told)

    def end(self, how: str) -> None:
        """As of `Tracker`."""
        self._tracking.set_terminated(self._id, self._STATUS[how])


# By name in `run.trackers`, which is also that of its package and of the extra that brings it.
TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is not known; names the closest that is."""
    for name in names:
        if name not in TRACKERS:
            close = difflib.get_close_matches(str(name), TRACKERS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(TRACKERS)}"
            raise UserError(f"run.trackers: no tracker is called '{name}'; {hint}")


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.trackers: {name} is not installed: pip install 'medmoe_jax[{name}]'"
            )


class Trackers:
    """All trackers of a run, in all processes alike; the first one alone tells them anything.

    A context manager, whose end is that of their runs. A tracker that cannot be told any more is
    left out from then on: a note says so, and the training goes on.
    """

    def __init__(
        self, names: Sequence[str], workdir: str | Path, config: Mapping[str, Any]
    ) -> None:
        """Begin nothing yet.

        Args:
          names: of `TRACKERS`.
          workdir: of the run.
          config: told when a tracker's run begins.

        Raises:
          UserError: an unknown name, or a package that is not installed.
        """
        check_names(names)
        check_installed(names)
        self._names = tuple(dict.fromkeys(names)) if processes.index() == 0 else ()
        self._record, self._config = place(workdir) / NAME, config
        self._title = Path(os.path.abspath(workdir)).name
        self._begun: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        return self

    def begin(self) -> None:
        """Begin their runs, or go on with them, unless that is done.

        Raises:
          UserError: one of them does not begin.
        """
        if self._begun or not self._names:
            return
        known = read_record(self._record, "runs")[0]["runs"] if self._record.exists() else {}
        for name in self._names:
            tracker = TRACKERS[name]()
            try:
                runs = {name: tracker.begin(self._title, self._config, known.get(name, ""))}
            except tracker.errors as error:
                old = f"; {self._record} names its run" if name in known else ""
                raise UserError(f"run.trackers: {name} does not begin: {error}{old}") from error
            self._begun[name] = tracker
            note(f"{name} {'goes on with' if name in known else 'begins'} run {runs[name]}")
            if known != (known := known | runs):
                write_record(self._record, {"runs": known})

    def hooks(self, every: int) -> list[Hook]:
        """What tells them the metrics of every few steps of a stage."""
        return [Tracked(self, every)] if self._names else []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell all of them the metrics of a step."""
        self._each(lambda tracker: tracker.log(stage, step, metrics), f"step {step}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        how = _FINISHED if kind is None else _STOPPED if stopped else _FAILED
        self._each(lambda tracker: tracker.end(how), "the run's end")

    def _each(self, tell: Callable[[Tracker], None], what: str) -> None:
        for name, tracker in tuple(self._begun.items()):
            try:
                tell(tracker)
            except tracker.errors as error:
                del self._begun[name]
                note(f"{name} could not be told {what} and is told nothing more: {error}")


class Tracked(Hook):
    """The metrics of every few steps, for trackers."""

    def __init__(self, trackers: Trackers, every: int) -> None:
        """Tell these trackers every so many steps."""
        self._trackers, self._every = trackers, every

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Tell a step's metrics where that is due, or they hold what comes seldom."""
        if record.rare or progress.is_due(record.step, self._every):
            self._trackers.log(progress.stage, record.step, record.metrics)


def _named(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes in one."""
    return re.sub(r"[^\w\-. /:]", "_", name)
