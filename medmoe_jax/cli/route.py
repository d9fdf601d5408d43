"""Fit the weights with which a task mixes the skills, on a few of its rows.

  medmoe route --config=sa_mdkif:qwen1.5-1.8b,global,triage,coding \\
      --workdir=runs/sa_mdkif --data=triage=triage.jsonl --data=coding=coding.jsonl

A task is a stage of the recipe that stacks skills and trains nothing but their mixing weights; the
stages before it are finished. It is finished with the fitted weights: eval, generate, score and
export take it by --stage=TASK. Prints the weights, and writes them to mixing.json and, as a heat
map of tasks and skills, to mixing.png. A task that was fitted alike before is only shown again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from medmoe_jax.checkpoints.files import write_json
from medmoe_jax.cli.session import open_run
from medmoe_jax.data.hub import is_name
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.html import HeatMapSection, save_png
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import exists, place
from medmoe_jax.training.fit import Fit, find, fit_stage
from medmoe_jax.training.fit_methods import METHODS
from medmoe_jax.training.terminal import console, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", required=True, help="of the run that trained the skills")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="TASK=FILE",
        help="a task and its rows, a JSON or JSONL file or a built data set; repeatable",
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default="gradient",
        help="gradient: the stage's own optimiser; cma: CMA-ES, which needs none (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="updates, or generations of cma (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of cma's draws (%(default)s)")
    parser.add_argument("--output", help="folder of mixing.json and .png (default: --workdir)")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    files = _files(arguments.data)
    COUNT.check("steps", arguments.steps)
    NOT_NEGATIVE.check("seed", arguments.seed)
    opened = open_run(rest, arguments.workdir)
    for task in files:
        find(opened, task)
    fits = {
        task: fit_stage(
            opened,
            task,
            file,
            arguments.method,
            arguments.steps,
            arguments.seed,
        )
        for task, file in files.items()
    }
    output = place(arguments.output or arguments.workdir)
    write_json(output / "mixing.json", {task: asdict(fit) for task, fit in fits.items()})
    save_png(output / "mixing.png", _heat_map(fits))
    for table in _tables(fits):
        console.print(table)
    say(f"written to {output / 'mixing.json'} and {output / 'mixing.png'}")


def _files(given: Sequence[str]) -> dict[str, str]:
    """The file of each task."""
    files: dict[str, str] = {}
    for argument in given:
        task, _, file = argument.partition("=")
        if not task or not file:
            raise UserError(f"--data: '{argument}' is not TASK=FILE")
        if task in files:
            raise UserError(f"--data: task '{task}' is given twice")
        if not is_name(file) and not exists(file):
            raise UserError(f"--data: {task}: there is no file or folder '{file}'")
        files[task] = file
    return files


def _means(fit: Fit) -> list[float]:
    """Each skill's weight, averaged over the layers where they have their own."""
    return np.mean(fit.weights, axis=0).tolist()


def _heat_map(fits: Mapping[str, Fit]) -> HeatMapSection:
    skills = list(dict.fromkeys(skill for fit in fits.values() for skill in fit.skills))
    found = [dict(zip(fit.skills, _means(fit), strict=True)) for fit in fits.values()]
    matrix = [[weights.get(skill, np.nan) for skill in skills] for weights in found]
    return HeatMapSection("Mixing weights", matrix, list(fits), skills, x="skill", y="task")


def _tables(fits: Mapping[str, Fit]) -> list[ScreenTable]:
    """The weights, skill by skill, and what they gain."""
    section = _heat_map(fits)
    weights = [
        (skill, *(f"{weight:.3f}" for weight in column))
        for skill, column in zip(section.columns, np.transpose(section.matrix), strict=True)
    ]
    losses = [
        (task, str(fit.rows), f"{fit.loss_before:.4f}", f"{fit.loss:.4f}")
        for task, fit in fits.items()
    ]
    return [
        ScreenTable(("skill",), list(fits), weights, "mixing weights (means over the layers)"),
        ScreenTable(("task",), ("rows", "before", "after"), losses, "loss a target token"),
    ]
