"""Compare evaluations of the same items.

  medmoe compare runs/a runs/b
  medmoe compare runs/base runs/stage1 runs/stage2 --output=compared

A run is a folder in which `medmoe eval` wrote records.jsonl and report.json. Every run is set
against the first: the difference of each task and of their mean with its 95% interval (paired
bootstrap), and McNemar's exact test. With --output, compared.json and one page, compared.html.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.cli.session import no_rest
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import page, records
from medmoe_jax.evaluation.compare import Difference, alone, apart, compare
from medmoe_jax.evaluation.html import report_html
from medmoe_jax.evaluation.report import Report
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import make_folder, place
from medmoe_jax.training.terminal import console, note, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of an evaluation")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap")
    parser.add_argument("--output", help="folder of compared.json and compared.html")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    if len(arguments.runs) < 2:
        raise UserError("give at least two runs to compare")
    if len(set(arguments.runs)) < len(arguments.runs):
        raise UserError("a run stands twice among those to compare")
    found = {name: records.read(place(name) / "records.jsonl") for name in arguments.runs}
    first, *others = arguments.runs
    differences = {
        name: compare(found[first], found[name], seed=arguments.seed, resamples=arguments.resamples)
        for name in others
    }
    for name, of in differences.items():
        note(f"A: {first}\nB: {name}")
        console.print(_table(of))
        for run, here, there in (("A", first, name), ("B", name, first)):
            if tasks := alone(found[here], found[there]):
                note(f"{run} alone was asked, and is not compared on: {', '.join(tasks)}")
        if tasks := apart(found[first], found[name]):
            note(f"asked of both, but no item in common, and not compared: {', '.join(tasks)}")
        if left := of[-1].unpaired:
            note(f"{left} items of these tasks are in one of the two runs only, and not compared")
    if arguments.output:
        _write(place(arguments.output), arguments.runs, differences)


def _table(found: list[Difference]) -> ScreenTable:
    """Differences for the terminal."""
    rows = [(task, *numbers) for task, _, *numbers in map(page.difference_cells, found)]
    return ScreenTable(page.COLUMNS[:1], page.COLUMNS[2:], rows)


def _write(folder: Path, runs: list[str], differences: dict[str, list[Difference]]) -> None:
    reports = {name: Report.load(place(name) / "report.json") for name in runs}
    make_folder(folder)
    plain = {name: [asdict(one) for one in of] for name, of in differences.items()}
    text = json.dumps({"against": runs[0], "runs": plain}, ensure_ascii=False, indent=2) + "\n"
    write_text(folder / "compared.json", text)
    report_html(folder / "compared.html", page.beside(reports, differences), "Compared")
    say(f"written to {folder / 'compared.json'}")
