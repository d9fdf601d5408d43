"""Scoring a model on tasks: `medmoe_jax.evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax import interrupts
from medmoe_jax.api.model import Model, load, open_source
from medmoe_jax.api.plot import FOLDER, PAGE
from medmoe_jax.api.tasks import check_items, note_cut
from medmoe_jax.checkpoints.files import remove
from medmoe_jax.checkpoints.manifest import library_versions
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.evaluation import page, readings, run
from medmoe_jax.evaluation.html import TableSection, report_html
from medmoe_jax.evaluation.report import COLUMNS, Report, Result, reasons
from medmoe_jax.evaluation.shots import Fitter, Shots
from medmoe_jax.evaluation.tasks import Task, check_titles, expand, load_task
from medmoe_jax.evaluation.ways import Way
from medmoe_jax.parallel import processes
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE
from medmoe_jax.screen import plain
from medmoe_jax.storage.places import check_makeable, make_folder, place
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.terminal import note
from medmoe_jax.training.trained import content_of

_FILES = _REPORT, _RECORDS, _SHOWN = "report.json", "records.jsonl", "report.html"


@dataclass(frozen=True)
class Scores:
    """Scores of tasks with their 95% intervals, shown as a table; `scores[TASK]` is one of them.

    Attributes:
      report: results, settings, and tasks that could not be done.
      records: one dictionary an item: what was asked, what was said, whether it was right.
    """

    report: Report
    records: list[dict[str, Any]]

    def __getitem__(self, task: str) -> Result:
        for result in self.report.results:
            if task in (result.title, result.task):
                return result
        raise KeyError(task)

    def __repr__(self) -> str:
        return "\n".join([plain(self.report.table(), 80), *self.report.notes()])

    def _repr_html_(self) -> str:
        cells = [result.cells() for result in self.report.results]
        return TableSection("", COLUMNS, cells).body()


class _Asked(NamedTuple):
    """How tasks are had; see `evaluate`."""

    split: str | None
    limit: int | None
    seed: int
    guided: bool
    way: Way
    shots: Shots


@interrupts.never_lost()
def evaluate(
    model: Model | Run | str | os.PathLike[str],
    tasks: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    stage: str | None = None,
    off: Sequence[str] = (),
    language: str = "",
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    guided: bool = True,
    shots: int | None = None,
    shots_as: str = "prompt",
    answer: str | None = None,
    score: str = "sum",
    ending: bool = False,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    compat: str = "",
    output: str | os.PathLike[str] | None = None,
) -> Scores:
    """Score a model on tasks, as `medmoe eval` does (docs/tasks.md).

    Args:
      model: a model, or what `load` takes; then its tasks are read before its weights.
      tasks: a name, or several: a known set (`cmedtc`, `tico19:fr`, `mmlu@test`), a suite
        (`suite:cblue`), a JSONL file of `{"prompt", "answer"[, "choices"]}`, a TOML file of sets.
      stage, off, language: as of `load`; not with a model, which has its own.
      split: of the sets; None = dev, or test where no dev is there.
      limit: items a task, a seeded sample; None = all.
      seed: of samples, shots and intervals.
      guided: prompts begin with what a model must be told that was not trained on the set.
      shots, shots_as: examples before each item, and whether they stand in one prompt ("prompt")
        or as turns ("turns").
      answer: how choices are answered: letter, text, constrained, free, reason; None = letter.
      score: of a choice's log-probability: sum, token, byte, unconditional.
      ending: count the mark that ends a turn in it.
      samples, temperature, max_tokens: of written answers; the most frequent one decides.
      compat: as a paper's code does it, where nothing else is said.
      output: a folder for report.json, records.jsonl and report.html; None = nothing is written.

    Raises:
      UserError: no such model or task, none of the tasks can be had, or `output` is no folder.
    """
    if isinstance(model, Model) and (stage is not None or off or language):
        raise ParameterError("model: a loaded one has its stage, off and language already")
    if limit is not None:
        COUNT.check_whole("limit", limit)
    NOT_NEGATIVE.check_whole("seed", seed)
    if output is not None:
        check_makeable(place(output))
    named = [tasks] if isinstance(tasks, str | os.PathLike) else tasks
    names = expand([os.fspath(task) for task in named])
    if not names:
        raise ParameterError("tasks: none is named; `medmoe eval --list` prints the known ones")
    preset_name = readings.find(compat) if compat else ""
    preset = readings.READINGS.get(preset_name, {})
    way = Way(
        answer=answer or preset.get("answer", "letter"),
        score=score,
        ending=ending,
        samples=samples,
        temperature=temperature,
        reading=preset_name,
        max_tokens=preset.get("max_tokens") if max_tokens is None else max_tokens,
    )
    few = Shots(preset.get("shots", 0) if shots is None else shots, shots_as)
    opened = model.run if isinstance(model, Model) else open_source(model)
    asked = _Asked(split, limit, seed, guided, way, few)
    loaded, failures = _load(opened.setup, names, asked)
    if not isinstance(model, Model):
        model = load(opened, stage=stage, off=off, language=language)
    return _evaluate(model, loaded, failures, asked, output)


def _load(setup: Setup, names: list[str], asked: _Asked) -> tuple[list[Task], list[dict]]:
    """The tasks, before any weight is read, and those of several that cannot be had."""
    longest, way = setup.base.config.max_positions, asked.way
    tasks: dict[str, Task] = {}
    failures, errors = [], []
    for name in names:
        try:
            fit = Fitter(setup.encoder, longest, way.max_tokens, way.least, way.asks)
            task = load_task(
                name,
                asked.limit,
                asked.seed,
                split=asked.split,
                few=asked.shots,
                guided=asked.guided,
                fit=fit,
            )
            check_items(setup, task)
            tasks[name] = task
        except (UserError, FileNotFoundError) as error:
            errors.append(error)
            failures.append({"task": name, "error": str(error)})
    told = [f"{names}: {error}" for names, error in reasons(failures)]
    if not tasks:
        if len(errors) == 1:
            raise errors[0]
        raise UserError("\n  ".join(["none of the tasks can be had", *told]))
    check_titles(tasks)
    for text in told:
        note(f"left out: {text}")
    return list(tasks.values()), failures


def _evaluate(
    model: Model,
    tasks: Sequence[Task],
    failures: Sequence[dict],
    asked: _Asked,
    output: str | os.PathLike[str] | None,
) -> Scores:
    """The scores; where there is an `output`, its files too."""
    folder: Path | None = None
    if output is not None:
        folder = place(output)
        make_folder(folder)
        for name in _FILES:  # all that lies there is of one evaluation, wherever this one ends
            remove(folder / name)
    answers, records = model.language_model, []
    before = answers.shortened
    report = run.evaluate(
        answers,
        tasks,
        way=asked.way,
        limit=asked.limit,
        seed=asked.seed,
        batch=8 * answers.engine.batch,
        written=folder and folder / _RECORDS,
        lines=records,
        finished=lambda so_far: so_far.save(folder / _REPORT) if folder else None,
        about=_about(model, asked),
        failures=failures,
    )
    note_cut(answers, before)
    if folder and records and processes.index() == 0:
        drawn = {"How it was trained": f"{FOLDER}/{PAGE}"}
        links = drawn if (folder / FOLDER / PAGE).is_file() else {}
        report_html(folder / _SHOWN, page.of_report(report, records), "Evaluation", links)
    return Scores(report, records)


def _about(model: Model, asked: _Asked) -> dict[str, Any]:
    """The model, how its prompts were made and what it ran on, for the report."""
    config = model.run.setup.config
    return {
        "base": config.base.path or config.base.preset,
        "template": config.data.template,
        "stage": model.stage or "base",
        "fingerprint": content_of(model.run, model.trained),
        "off": list(model.off),
        "guided": asked.guided,
        **({"shots_as": asked.shots.form} if asked.shots.count else {}),
        "versions": library_versions(),
    }
