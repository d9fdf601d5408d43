"""Asking a model what the template takes: prompts, and the items of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from medmoe_jax.api.opening import language_model
from medmoe_jax.data.conversation import Turn, turns_of
from medmoe_jax.errors import UserError, within
from medmoe_jax.evaluation.report import Report
from medmoe_jax.evaluation.run import evaluate
from medmoe_jax.evaluation.shots import Fitter
from medmoe_jax.evaluation.tasks import Task, check_titles, expand, load_task
from medmoe_jax.inference.language_model import LanguageModel
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.terminal import console, note
from medmoe_jax.training.trained import Trained


def open_tasks(setup: Setup, names: Sequence[str], limit: int | None = None) -> dict[str, Task]:
    """Tasks by the names they are asked for, with prompts as training rows have them.

    Those too long for the context are shortened in their body.

    Raises:
      UserError: no such task, two would have one title, the template refuses an item, or one cannot
        be shortened so far.
    """
    fit = Fitter(setup.encoder, setup.base.config.max_positions)
    tasks = {name: load_task(name, limit, fit=fit) for name in expand(names)}
    check_titles(tasks)
    for task in tasks.values():
        check_items(setup, task)
    return tasks


def run_tasks(
    model: LanguageModel, tasks: Iterable[Task], limit: int | None = None, **options: Any
) -> Report:
    """Evaluate on tasks, and tell what is to know of it besides the scores.

    Args:
      limit: of the items that the tasks were read with, for the report.
      options: of `evaluate`.
    """
    report = evaluate(model, list(tasks), limit=limit, batch=8 * model.engine.batch, **options)
    for line in report.notes():
        note(line)
    note_cut(model)
    return report


def check_items(setup: Setup, task: Task) -> None:
    """Raise UserError, with its place, for an item of a task that the template refuses."""
    check_prompts(setup, [i.turns for i in task.items], f"task '{task.name}', item {{}}".format)


def check_prompts(
    setup: Setup,
    prompts: Sequence[str | Sequence[Turn]],
    place: Callable[[int], str],
    answers: Sequence[str] | None = None,
) -> None:
    """Raise UserError, with its `place`, for a prompt or answer that the template refuses."""
    for number, prompt in enumerate(prompts):
        try:
            if answers is None:
                setup.encoder.prompt(turns_of(prompt))
            else:
                said: Turn = {"role": "assistant", "content": answers[number]}
                setup.encoder({"conversations": [*turns_of(prompt), said], "language": ""})
        except UserError as error:
            raise UserError(f"{place(number)}: {error}") from None


def note_cut(model: LanguageModel, before: int = 0) -> None:
    """Say how many prompts a model had to cut; `before`: of those, how many were told of."""
    if model.shortened > before:
        told = f"{model.shortened - before} prompts were cut to fit {model.context} positions"
        note(f"{told} with their answers")


def stage_evaluator(run: Run, stop: Callable[[], bool]) -> Callable[[Trained], dict[str, Any]]:
    """What `train` calls at the end of a stage: the scores of `run.tasks`, kept in report.json.

    Args:
      run: the run.
      stop: asked after every batch of items, whether to end there (`Stopped`).
    """
    setup = run.setup
    limit = setup.config.run.task_limit or None
    with within("run.tasks: "):  # what is wrong with them shows now, not after the training
        tasks = open_tasks(setup, setup.config.run.tasks, limit).values()

    def evaluate_stage(trained: Trained) -> dict:
        if not tasks:
            return {}
        model = language_model(setup, trained)
        report = run_tasks(model, tasks, limit, stop=stop)
        report.save(run.stage(trained.stage).folder.report)
        console.print(report.table())
        return {r.title: {"score": r.score, "low": r.low, "high": r.high} for r in report.results}

    return evaluate_stage
