"""The tasks that a stage's `evaluation` names, scored while it trains."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from medmoe_jax.api.opening import language_model
from medmoe_jax.api.tasks import note_cut, open_tasks
from medmoe_jax.errors import Stopped, UserError, within
from medmoe_jax.evaluation.report import Report
from medmoe_jax.evaluation.run import evaluate
from medmoe_jax.evaluation.tasks import Task
from medmoe_jax.training.hooks.evaluations import LOSS, MEAN, Measure
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.step import TrainState
from medmoe_jax.training.terminal import note


def task_scorer(run: Run, stop: Callable[[], bool]) -> Callable[[Prepared], Measure]:
    """What `train` asks for the scores of a stage's tasks; report and records lie in its folder.

    Args:
      run: the run. Its stages' tasks are read here, before any weight is.
      stop: asked after every batch of items, whether to end there.

    Raises:
      UserError: an unknown task, a bad item, or `best` names no score.
    """
    tasks = {}
    for stage in run.stages:
        with within(f"stages.{stage.name}.evaluation."):
            tasks[stage.name] = _tasks(stage)

    def scorer(prepared: Prepared) -> Measure:
        return partial(_score, prepared, tasks[prepared.stage.name], stop)

    return scorer


def _tasks(stage: StageRun) -> dict[str, Task]:
    """The tasks of a stage's evaluation, by the names of their scores."""
    section = stage.recipe.config.evaluation
    tasks: dict[str, Task] = {}
    with within("tasks: "):
        opened = open_tasks(stage.setup, section.tasks, section.limit or None)
    for name, task in opened.items():
        called = task.name if name.endswith((".jsonl", ".jsonl.gz")) else name
        if called in (MEAN, LOSS, *tasks):
            raise UserError(f"tasks: two scores would be called '{called}'; rename a file of tasks")
        tasks[called] = task
    known = [MEAN, *tasks, *([LOSS] if section.sources else [])]
    if tasks and section.best and section.best not in known:
        near = difflib.get_close_matches(section.best, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"best: '{section.best}' is no score; {hint}there are {', '.join(known)}")
    return tasks


def _score(
    prepared: Prepared,
    tasks: dict[str, Task],
    stop: Callable[[], bool],
    step: int,
    state: TrainState,
) -> dict[str, float]:
    """Scores of the tasks by name, and their mean, of the state after a step."""
    stage = prepared.stage
    model = language_model(stage.setup, prepared.trained(state))
    folder = stage.folder.evaluation(step)
    try:
        report = evaluate(
            model,
            list(tasks.values()),
            limit=stage.recipe.config.evaluation.limit or None,
            batch=8 * model.engine.batch,
            written=folder / "records.jsonl",
            progress=False,
            stop=stop,
            about={"stage": f"{stage.name}, step {step}"},
        )
    except Stopped:
        raise Stopped(
            f"stage '{stage.name}' was asked to stop while step {step} was scored; it goes on from "
            "its last checkpoint"
        ) from None
    report.save(folder / "report.json")
    note_cut(model)
    with within(f"stages.{stage.name}."):
        return _scores(tasks, report)


def _scores(tasks: dict[str, Task], report: Report) -> dict[str, float]:
    """By name, of the tasks that could be asked; the others are told, and training goes on."""
    failed = {failure["task"]: failure["error"] for failure in report.failures}
    for task, error in failed.items():
        note(f"task '{task}' cannot be scored: {error}")
    if not report.results:
        raise UserError("evaluation: none of its tasks can be scored")
    asked = [name for name, task in tasks.items() if task.title not in failed]
    scores = {name: float(result.score) for name, result in zip(asked, report.results, strict=True)}
    return {**scores, MEAN: sum(scores.values()) / len(scores)}
