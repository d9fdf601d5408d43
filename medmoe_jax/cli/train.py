"""Run a recipe: every stage in order; the same command resumes.

  medmoe train --config=medcare:qwen2-1.5b --workdir=runs/medcare
  medmoe train --config=trial --workdir=runs/trial --config.run.save_every=50

SIGTERM, as a machine sends it that is about to be taken away, saves and ends with status 75.
Any field of the configuration can be set with --config.FIELD=VALUE.
"""

from __future__ import annotations

import argparse

from medmoe_jax.api.train import train_run
from medmoe_jax.cli.session import open_run
from medmoe_jax.parallel.processes import Notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", required=True, help="where everything is kept and resumed")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    opened = open_run(rest, arguments.workdir)
    with Notice() as notice:
        train_run(opened, notice)
