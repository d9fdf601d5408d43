"""Answer a prompt, or every row of a JSONL.

  medmoe generate --config=FILE --workdir=DIR "What does a lack of vitamin C cause?"
  medmoe generate --config=FILE --workdir=DIR --input=prompts.jsonl --output=answers.jsonl

Rows hold "prompt"; "response" is added, and "reasoning" where the template has a place for it. What
a row had by these two names makes way; its other fields stay.
"""

from __future__ import annotations

import argparse
import json

from medmoe_jax.api.model import load
from medmoe_jax.api.tasks import check_prompts
from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.cli.session import (
    add_language_argument,
    add_length_argument,
    add_model_arguments,
    add_sampling_arguments,
    check_length,
    length_of,
    open_run,
    read_rows,
    sampling_arguments,
    sampling_of,
)
from medmoe_jax.data.conversation import check_text
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import check_file
from medmoe_jax.training.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    add_model_arguments(parser)
    add_language_argument(parser)
    parser.add_argument("prompt", nargs="?", help="one prompt; its answer is printed")
    parser.add_argument("--input", help="JSONL of prompts")
    parser.add_argument("--output", help="JSONL to write")
    add_length_argument(parser, 256)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; repeatable"
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    if (arguments.prompt is None) == (arguments.input is None):
        raise UserError("give either a prompt or --input=FILE")
    if (arguments.input is None) != (arguments.output is None):
        raise UserError("--input and --output go together")
    check_length(arguments)
    sampling_of(arguments)  # a bad number shows before anything is opened
    rows, places = [{"prompt": arguments.prompt}], ["the prompt"]
    check_text(rows, "the prompt")
    if arguments.input is not None:
        check_file(arguments.output)
        rows, places = read_rows(arguments.input, ("prompt",))
    prompts = [row["prompt"] for row in rows]
    opened = open_run(rest, arguments.workdir)
    length = length_of(arguments, opened.setup.base.config.max_positions)
    check_prompts(opened.setup, prompts, places.__getitem__)
    model = load(opened, stage=arguments.stage, off=arguments.off, language=arguments.language)
    answers = model.answer(prompts, length, stops=arguments.stop, **sampling_arguments(arguments))
    if arguments.input is None:
        say(answers[0].text)
        return
    answered = []
    for row, answer in zip(rows, answers, strict=True):
        row.pop("reasoning", None)  # that of another answer
        thought = {"reasoning": answer.reasoning} if answer.reasoning else {}
        answered.append({**row, **thought, "response": answer.text})
    write_text(
        arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
    )
    say(f"{len(answered)} rows answered, written to {arguments.output}")
