"""Score a model on tasks.

  medmoe eval --list
  medmoe eval --config=FILE --workdir=DIR --tasks=cmedtc,pubmedqa
  medmoe eval --config=FILE --workdir=DIR --stage=aggregate --off=noise --tasks=mine.jsonl

A task is the name of a known set, or a JSONL file of {"prompt", "answer"[, "choices"]}. Writes
report.json and prints a table with 95% intervals beside the majority baseline.
"""

from __future__ import annotations

from pathlib import Path

from medmoe_jax.cli.session import (
    add_language_argument,
    add_model_arguments,
    no_rest,
    open_model,
    open_run,
    run_tasks,
)
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.tasks import list_tasks
from medmoe_jax.ranges import COUNT
from medmoe_jax.training.terminal import console


def add_arguments(parser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    parser.add_argument("--list", action="store_true", help="print the known tasks, one a line")
    parser.add_argument("--tasks", default="", help="names or files, comma-separated")
    parser.add_argument("--limit", type=int, help="items a task, a seeded sample (default: all)")
    parser.add_argument("--free", action="store_true", help="answer choices in free text")
    parser.add_argument("--output", help="folder of report.json (default: the work directory)")


def run(arguments, rest) -> None:
    """Run the command."""
    if arguments.list:
        no_rest(rest)
        for task in list_tasks():
            print(task.name)
        return
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise UserError("--tasks is empty; `medmoe eval --list` prints the known ones")
    if arguments.limit is not None:
        COUNT.check("limit", arguments.limit)
    output = arguments.output or arguments.workdir
    if not output:
        raise UserError("give --output (or --workdir) for report.json")
    opened = open_run(rest, arguments.workdir)
    model = open_model(opened, arguments.stage, arguments.off, arguments.language)
    Path(output).mkdir(parents=True, exist_ok=True)
    report = run_tasks(
        opened.setup,
        model,
        names,
        arguments.limit,
        records=Path(output) / "records.jsonl",
        free=arguments.free,
    )
    path = report.save(Path(output) / "report.json")
    console.print(report.table())
    print(f"written to {path}")
