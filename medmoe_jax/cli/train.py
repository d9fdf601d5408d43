"""Run a recipe: every stage in order; the same command resumes.

  medmoe train --config=configs/medcare.py:qwen2-1.5b --workdir=runs/medcare
  medmoe train --config=configs/trial.py --workdir=runs/trial --config.run.save_every=50

Any field of the configuration can be set with --config.FIELD=VALUE.
"""

from __future__ import annotations

from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.session import stage_evaluator
from medmoe_jax.training.run import train
from medmoe_jax.training.setup import open_setup


def add_arguments(parser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", required=True, help="where everything is kept and resumed")


def run(arguments, rest) -> None:
    """Run the command."""
    setup = open_setup(load_config(rest))
    train(setup, arguments.workdir, stage_evaluator(setup, arguments.workdir))
