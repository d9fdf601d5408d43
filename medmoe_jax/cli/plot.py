"""Draw what runs have logged: losses, scores by stage, experts, ranks, angles between banks.

  medmoe plot runs/a
  medmoe plot runs/a runs/b --output=both

Writes plots.html, a page whose drawings answer the pointer, and a PNG file a picture. Several runs
are drawn together. A run may still be training.
"""

from __future__ import annotations

import argparse

from medmoe_jax.api.plot import FOLDER, plot
from medmoe_jax.cli.session import no_rest
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import place
from medmoe_jax.training.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("runs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument(
        "--output", help=f"folder to write into (default: {FOLDER} in the only work directory)"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    if len(arguments.runs) > 1 and not arguments.output:
        raise UserError("--output is missing: the folder for pictures of several runs")
    drawn = plot(*arguments.runs)
    page = drawn.save(arguments.output or place(arguments.runs[0]) / FOLDER)
    say(f"{len(drawn.pictures)} pictures, written to {page}")
