"""Asking a model the items of tasks, and scoring what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.evaluation import metrics, records, ways
from medmoe_jax.evaluation.intervals import interval
from medmoe_jax.evaluation.items import Item
from medmoe_jax.evaluation.report import Report, Result
from medmoe_jax.evaluation.tasks import Task, load_task
from medmoe_jax.evaluation.ways import EvaluatedModel, Response, Way
from medmoe_jax.parallel import processes
from medmoe_jax.screen import TerminalBar


def evaluate(
    model: EvaluatedModel,
    tasks: Sequence[Task | str | os.PathLike],
    *,
    way: Way = Way(),
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    written: str | Path | None = None,
    lines: list[dict] | None = None,
    progress: bool = True,
    resamples: int = 1000,
    stop: Callable[[], bool] = lambda: False,
    finished: Callable[[Report], object] = lambda report: None,
    about: dict | None = None,
    failures: Sequence[dict] = (),
) -> Report:
    """Scores a model on tasks, given as such or by name (then `limit` and `seed` hold).

    A task that the model cannot be asked (UserError, say for want of context) is a failure in the
    report, and the others go on. A further metric that ranks choices is left out where none is
    scored.

    Args:
      way: how items are answered.
      written: a file that gets a JSON line an item, whole after every task.
      lines: a list that gets the same, a dictionary an item.
      resamples: bootstrap draws for the intervals of scores that are no plain share.
      batch: items that are asked at once where answers are written; those that are scored are
        batches of the model's own.
      stop: asked after every batch of items, whether to end there.
      finished: called after every task with the report so far.
      about, failures: for the report: the model, and tasks that failed before.

    Raises:
      ValueError: the model's scores are NaN.
      Stopped: `stop` said so.
    """
    loaded = [t if isinstance(t, Task) else load_task(t, limit, seed) for t in tasks]
    settings = {"seed": seed, "limit": limit, "resamples": resamples, **asdict(way)}
    report = Report([], settings, about or {}, list(failures))
    lines = [] if lines is None else lines
    quiet = not progress or processes.index() > 0
    with TerminalBar(total=sum(len(t.items) for t in loaded), quiet=quiet) as bar:
        for task in loaded:
            bar.set_description(task.name)
            before = model.shortened
            try:
                given = _answers(model, task, way, seed, batch, bar, stop)
            except UserError as error:
                failure = {"task": task.title, "error": str(error)}
                report = Report(report.results, settings, report.about, [*report.failures, failure])
            else:
                # Each sample asks all prompts anew.
                cut = (model.shortened - before) // way.samples
                result, rows_N = _score(task, given, cut, seed, resamples)
                results = [*report.results, result]
                report = Report(results, settings, report.about, report.failures)
                lines += records.records(task, given, rows_N, way)
            if written is not None:  # without lines too, in place of what an earlier one has left
                records.write(written, lines)
            finished(report)
    return report


def _answers(model, task: Task, way: Way, seed: int, batch: int, bar, stop) -> list[Response]:
    def done(items: int) -> None:
        bar.update(items)
        if stop():
            raise Stopped(f"evaluation was asked to stop, in task '{task.name}'")

    given: list[Response] = []
    size = max(len(task.items), 1) if way.scored(task) else batch
    for items in _batches(task.items, size):
        given += ways.ask(model, task, items, way, seed, len(given), done)
    return given


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _score(task: Task, given: Sequence[Response], cut: int, seed: int, resamples: int):
    """The result of a task, of whose prompts the model has cut some, and its metric's rows."""
    metric = metrics.find(task.metric)
    rows_N = rows(metric, given, task.items)
    low, high = interval(metric, rows_N, seed, resamples)
    also = {}
    for name in task.also:
        further = metrics.find(name)
        if all(answer.ranking for answer in given) or not further.ranked:
            also[name] = further.reduce(rows(further, given, task.items))
    result = Result(
        task=task.name,
        language=task.language,
        group=task.group,
        kind=task.kind,
        metric=task.metric,
        score=metric.reduce(rows_N),
        low=low,
        high=high,
        majority=task.majority,
        n=len(given),
        also=also,
        split=task.split,
        chance=task.chance,
        shots=task.shots,
        duplicates=task.duplicates,
        unparsed=sum(not answer.parsed for answer in given),
        cut=sum(answer.cut for answer in given),
        shortened=task.shortened + cut,
        missing=list(task.missing),
    )
    return result, rows_N


def rows(metric: metrics.Metric, given: Sequence[Response], items: Sequence[Item]) -> np.ndarray:
    """What a metric sees of answers to items, before it reduces them to a score."""
    said = [answer.ranking if metric.ranked else answer.text for answer in given]
    golds = list(items) if metric.whole else [item.answer for item in items]
    return metric.prepare(said, golds)
