"""The table of docs/trial.md: every task on a model before and after it was adapted.

  python benchmarks/trial_tasks.py BEFORE AFTER    # two folders of medmoe eval --output
  python benchmarks/trial_tasks.py                 # the table from the results alone

It writes benchmarks/results/trial_tasks.json and puts the table into the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pages import markdown, put
from medmoe_jax.evaluation.report import percent
from medmoe_jax.evaluation.tasks import list_tasks

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PART = ROOT / "benchmarks/results/trial_tasks.json", ROOT / "docs/trial.md", "tasks"
# What is kept of a task's line in a report.
FIELDS = ("task", "language", "split", "metric", "score", "low", "high", "n", "chance", "majority")
COUNTED = ("unparsed", "cut", "shortened")
HEADER = ("task", "language", "split", "metric", "n", "chance", "majority", "before", "after")


def cell(line: Mapping[str, Any]) -> str:
    """A score with its interval."""
    return f"{percent(line['score'])} ({percent(line['low'])}–{percent(line['high'])})"


def beyond(line: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the interval lies above the score before and above the commonest answer's."""
    return line["low"] > max(before["high"], line["majority"] or 0.0)


def table(results: Mapping[str, Any]) -> str:
    """The table; a score that is `beyond` is bold."""
    after = {line["task"]: line for line in results["after"]}
    lines = []
    for was in results["before"]:
        now = after[was["task"]]
        told = f"**{cell(now)}**" if beyond(now, was) else cell(now)
        names = (was["task"], was["language"], was["split"], was["metric"], str(was["n"]))
        guessed = (percent(was[name]) or "–" for name in ("chance", "majority"))
        lines.append([*names, *guessed, cell(was), told])
    return markdown(HEADER, lines)


def read(folder: Path) -> dict[str, Any]:
    """What of a report the table is made of, tasks in the order of `medmoe eval --list`."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if report["failures"]:
        raise SystemExit(f"{folder}: not all tasks were done: {report['failures']}")
    order = [task.name for task in list_tasks()]
    lines = [{name: line[name] for name in (*FIELDS, *COUNTED)} for line in report["results"]]
    lines.sort(key=lambda line: order.index(line["task"].split("@")[0].split(":")[0]))
    return {"about": report["about"], "settings": report["settings"], "lines": lines}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are the process's own if not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="of the reports before and after")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    if args.folders:
        before, after = map(read, args.folders)
        if [x["task"] for x in before["lines"]] != [x["task"] for x in after["lines"]]:
            raise SystemExit("the two reports are not of the same tasks")
        results = {
            "versions": before["about"]["versions"],
            "limit": before["settings"]["limit"],
            "before": before["lines"],
            "after": after["lines"],
        }
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        args.output.write_text(text, encoding="utf-8")
    text = table(json.loads(args.output.read_text(encoding="utf-8")))
    print(text)
    put(args.page, PART, text)


if __name__ == "__main__":
    main()
