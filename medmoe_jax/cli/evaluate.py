"""Score a model on tasks.

  medmoe eval --list
  medmoe eval --config=FILE --workdir=DIR --tasks=cmedtc,pubmedqa@test,tico19:fr
  medmoe eval --config=FILE --workdir=DIR --tasks=suite:medcare-exams --shots=3 --answer=reason
  medmoe eval --config=FILE --workdir=DIR --stage=aggregate --off=noise --tasks=mine.jsonl

A task is the name of a known set, with a language or part after `:` and a split after `@`; a suite
of them; a JSONL file of {"prompt", "answer"[, "choices"]}; or a TOML file of sets. Writes
report.json and records.jsonl (a line an item) after every task and report.html at the end, and
prints a table with 95% intervals beside chance and the commonest answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medmoe_jax.checkpoints.manifest import library_versions
from medmoe_jax.cli.session import (
    add_language_argument,
    add_model_arguments,
    check_items,
    language_model,
    no_rest,
    note_cut,
    open_run,
    open_stage,
)
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import page, readings, records
from medmoe_jax.evaluation.html import report_html
from medmoe_jax.evaluation.report import Report
from medmoe_jax.evaluation.run import evaluate
from medmoe_jax.evaluation.shots import FORMS, Fitter, Shots
from medmoe_jax.evaluation.tasks import Task, expand, list_tasks, load_task, suites
from medmoe_jax.evaluation.ways import ANSWERS, SCORES, Way
from medmoe_jax.parallel import processes
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE
from medmoe_jax.storage.places import make_folder, place
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.terminal import console, note, say
from medmoe_jax.training.trained import Trained, content_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    add = parser.add_argument
    add("--list", action="store_true", help="print the known tasks, one a line")
    add("--list-suites", action="store_true", help="print the suites with their tasks")
    add("--tasks", default="", help="names or files, comma-separated")
    add("--split", help="of the sets (default: dev, or test where no dev is there)")
    add("--limit", type=int, help="items a task, a seeded sample (default: all)")
    add("--seed", type=int, default=0, help="of samples, shots and intervals")
    add("--bare", action="store_true", help="prompts as training rows have them, without a guide")
    add("--shots", type=int, help="examples before each item, from rows that are not asked")
    add("--shots-as", default="prompt", choices=FORMS, help="in one prompt, or as turns before it")
    add("--answer", choices=ANSWERS, help="how choices are answered (default: letter)")
    add("--free", dest="answer", action="store_const", const="free", help="as --answer=free")
    add("--score", default="sum", choices=SCORES, help="of a choice's log probability")
    add("--ending", action="store_true", help="count the mark that ends a turn in it")
    add("--samples", type=int, default=1, help="written answers an item; most of them decide")
    add("--temperature", type=float, default=0.0, help="of written answers")
    add("--max-tokens", type=int, help="of a written answer (default: as the task says)")
    add("--compat", help=f"as a paper's code does it: {', '.join(_compat_names())}")
    add("--output", help="folder of the report (default: the work directory)")


def _compat_names() -> list[str]:
    return [name for entry in readings.READINGS.values() for name in entry["aliases"]]


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    if arguments.list or arguments.list_suites:
        no_rest(rest)
        _print_known(arguments.list_suites)
        return
    if arguments.limit is not None:
        COUNT.check("limit", arguments.limit)
    NOT_NEGATIVE.check("seed", arguments.seed)
    names = expand([name for name in arguments.tasks.split(",") if name])
    if not names:
        raise UserError("--tasks is empty; `medmoe eval --list` prints the known ones")
    output = arguments.output or arguments.workdir
    if not output:
        raise UserError("give --output (or --workdir) for report.json")
    way, few = _way(arguments)
    opened = open_run(rest, arguments.workdir)
    setup = opened.setup
    tasks, failures = _load(setup, names, arguments, way, few)
    trained = open_stage(opened, arguments.stage)
    model = language_model(setup, trained, arguments.off, arguments.language)
    folder = place(output)
    make_folder(folder)
    report = evaluate(
        model,
        tasks,
        way=way,
        limit=arguments.limit,
        seed=arguments.seed,
        batch=8 * model.engine.batch,
        written=folder / "records.jsonl",
        finished=lambda so_far: so_far.save(folder / "report.json"),
        about=_about(opened, trained, arguments),
        failures=failures,
    )
    note_cut(model)
    _show(report, folder)


def _way(arguments) -> tuple[Way, Shots]:
    """How items are answered: as a paper's code does it, where nothing else is said."""
    name = readings.find(arguments.compat) if arguments.compat else ""
    preset = readings.READINGS.get(name, {})
    count = arguments.shots if arguments.shots is not None else preset.get("shots", 0)
    most = arguments.max_tokens if arguments.max_tokens is not None else preset.get("max_tokens")
    way = Way(
        answer=arguments.answer or preset.get("answer", "letter"),
        score=arguments.score,
        ending=arguments.ending,
        samples=arguments.samples,
        temperature=arguments.temperature,
        reading=name,
        max_tokens=most,
    )
    return way, Shots(count, arguments.shots_as)


def _load(
    setup: Setup, names: list[str], arguments, way: Way, few: Shots
) -> tuple[list[Task], list[dict]]:
    """The tasks, before any weight is read, and those of several that cannot be had."""
    longest = setup.base.config.max_positions
    tasks, failures, errors = [], [], []
    for name in names:
        try:
            fit = Fitter(setup.encoder, longest, way.max_tokens, way.least, way.asks)
            task = load_task(
                name,
                arguments.limit,
                arguments.seed,
                split=arguments.split,
                few=few,
                guided=not arguments.bare,
                fit=fit,
            )
            check_items(setup, task)
            tasks.append(task)
        except (UserError, FileNotFoundError) as error:
            errors.append(error)
            failures.append({"task": name, "error": str(error)})
    if not tasks:
        raise errors[0]
    for failure in failures:
        note(f"left out: {failure['error']}")
    return tasks, failures


def _about(opened: Run, trained: Trained, arguments) -> dict:
    """The model and what it ran on, for the report."""
    config = opened.setup.config
    return {
        "base": config.base.path or config.base.preset,
        "template": config.data.template,
        "stage": trained.stage or "base",
        "fingerprint": content_of(opened, trained),
        "off": list(arguments.off),
        "guided": not arguments.bare,
        "versions": library_versions(),
    }


def _show(report: Report, folder: Path) -> None:
    """Prints the report and writes its page."""
    if report.results:
        console.print(report.table())
    for line in report.notes():
        note(line)
    if not report.results:
        raise UserError("no task could be done; the notes above say why")
    if processes.index() == 0:
        found = records.read(folder / "records.jsonl")
        report_html(folder / "report.html", page.of_report(report, found), "Evaluation")
    say(f"written to {folder / 'report.json'}")


def _print_known(of_suites: bool) -> None:
    if of_suites:
        for name, entry in suites().items():
            say(f"suite:{name}: {entry['about']}\n  {', '.join(entry['tasks'])}")
        return
    for task in list_tasks():
        say(task.name)
