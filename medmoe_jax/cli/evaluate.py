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

from medmoe_jax.api.evaluate import evaluate
from medmoe_jax.cli.session import add_language_argument, add_model_arguments, no_rest, open_run
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import readings
from medmoe_jax.evaluation.shots import FORMS
from medmoe_jax.evaluation.tasks import SUITE, list_tasks, suites
from medmoe_jax.evaluation.ways import ANSWERS, SCORES
from medmoe_jax.storage.places import place
from medmoe_jax.training.terminal import console, note, say


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
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise UserError("--tasks is empty; `medmoe eval --list` prints the known ones")
    output = arguments.output or arguments.workdir
    if not output:
        raise UserError("give --output (or --workdir) for report.json")
    asked = ("stage", "off", "language", "split", "limit", "seed", "shots", "shots_as", "answer")
    asked += ("score", "ending", "samples", "temperature", "max_tokens")
    report = evaluate(
        open_run(rest, arguments.workdir),
        names,
        guided=not arguments.bare,
        compat=arguments.compat or "",
        output=output,
        **{name: getattr(arguments, name) for name in asked},
    ).report
    if report.results:
        console.print(report.table())
    for line in report.notes():
        note(line)
    if not report.results:
        raise UserError("no task could be done; the notes above say why")
    say(f"written to {place(output) / 'report.json'}")


def _print_known(of_suites: bool) -> None:
    if of_suites:
        for name, entry in suites().items():
            say(f"{SUITE}{name}: {entry['about']}\n  {', '.join(entry['tasks'])}")
        return
    for task in list_tasks():
        say(task.name)
