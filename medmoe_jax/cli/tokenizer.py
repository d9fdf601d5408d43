"""Train a sentencepiece tokenizer.

  medmoe tokenizer train --input rows.jsonl --vocab-size 32000 --output tokenizer.model

The template's markers become tokens of their own; unknown characters fall back to bytes.
"""

from __future__ import annotations

import argparse

from medmoe_jax.cli.data import add_row_arguments, row_reader
from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.preview import train_tokenizer
from medmoe_jax.training.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train a model on rows or built data sets")
    train.add_argument("--input", nargs="+", required=True, help="files of rows, or data sets")
    train.add_argument("--output", required=True, help="the .model file to write")
    train.add_argument("--vocab-size", type=int, required=True, help="pieces in all")
    train.add_argument("--template", default="chatml", help="whose markers to add (%(default)s)")
    add_row_arguments(train)


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    made = train_tokenizer(
        arguments.input,
        arguments.vocab_size,
        arguments.output,
        arguments.template,
        row_reader(arguments, learned=False),
        arguments.split,
    )
    say(f"{made.vocab_size} pieces, written to {arguments.output}")
