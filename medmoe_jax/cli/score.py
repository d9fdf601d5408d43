"""Log-probabilities of given completions.

  medmoe score --config=base_only --config.base.path=DIR \\
      --input=rows.jsonl --output=scored.jsonl

Reads {"prompt", "completion"} rows and adds "logprob", the sum over the completion's tokens (the
text and the mark that ends the turn, if the template has one), and "tokens", their number.
"""

from __future__ import annotations

import argparse
import json

from medmoe_jax.api.model import load
from medmoe_jax.api.tasks import check_prompts
from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.cli.session import add_language_argument, add_model_arguments, open_run, read_rows
from medmoe_jax.storage.places import check_file
from medmoe_jax.training.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    parser.add_argument("--input", required=True, help="JSONL of prompt and completion")
    parser.add_argument("--output", required=True, help="JSONL to write")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    check_file(arguments.output)
    rows, places = read_rows(arguments.input, ("prompt", "completion"))
    prompts, completions = [r["prompt"] for r in rows], [r["completion"] for r in rows]
    opened = open_run(rest, arguments.workdir)
    check_prompts(opened.setup, prompts, places.__getitem__, completions)
    model = load(opened, stage=arguments.stage, off=arguments.off, language=arguments.language)
    scores = model.score(prompts, [[one] for one in completions])
    scored = [{**row, **one._asdict()} for row, (one,) in zip(rows, scores, strict=True)]
    write_text(
        arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    )
    say(f"{len(scored)} rows scored, written to {arguments.output}")
