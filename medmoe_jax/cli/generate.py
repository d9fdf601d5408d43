"""Answer a prompt, or every row of a JSONL.

  medmoe generate --config=FILE --workdir=DIR "What does a lack of vitamin C cause?"
  medmoe generate --config=FILE --workdir=DIR --input=prompts.jsonl --output=answers.jsonl

Rows hold "prompt"; "response" is added, and "reasoning" where the template has a place for it. What
a row had by these two names makes way; its other fields stay. Answers are kept as they come, in
OUTPUT.unfinished: after an interruption the same command goes on behind them, and OUTPUT appears
whole when all are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from medmoe_jax.api.model import Model, load
from medmoe_jax.api.tasks import check_prompts, note_cut
from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.checkpoints.fingerprint import json_fingerprint
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
from medmoe_jax.cli.unfinished import Unfinished
from medmoe_jax.data.conversation import check_text
from medmoe_jax.errors import UserError
from medmoe_jax.inference.language_model import Answer
from medmoe_jax.storage.places import check_file
from medmoe_jax.training.terminal import note, say
from medmoe_jax.training.trained import content_of


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
    if arguments.input is None:
        (answer,) = model.answer(
            prompts, length, stops=arguments.stop, **sampling_arguments(arguments)
        )
        say(answer.text)
        return
    with Unfinished(arguments.output, _asked(arguments, model, prompts, length), len(rows)) as kept:
        if kept.answers:
            note(f"{len(kept.answers)} of {len(rows)} answers are there, from {kept.path}")
        _answer(arguments, model, prompts, length, kept)
        answered = [_answered(row, kept.answers[number]) for number, row in enumerate(rows)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
        write_text(arguments.output, text)
        kept.remove()
    say(f"{len(answered)} rows answered, written to {arguments.output}")


def _asked(
    arguments: argparse.Namespace, model: Model, prompts: Sequence[str], length: int
) -> dict[str, Any]:
    """All that the answers depend on."""
    return {
        "model": content_of(model.run, model.trained),
        "off": sorted(model.off),
        "language": arguments.language,
        "prompts": json_fingerprint(prompts),
        "max_tokens": length,
        "stop": arguments.stop,
        **sampling_arguments(arguments),
    }


def _answer(
    arguments: argparse.Namespace,
    model: Model,
    prompts: Sequence[str],
    length: int,
    kept: Unfinished,
) -> None:
    """Ask what is not answered yet."""
    left = [number for number in range(len(prompts)) if number not in kept.answers]
    asked = model.language_model
    asked.answer(
        [prompts[number] for number in left],
        length,
        sampling_of(arguments),
        arguments.stop,
        left,
        lambda place, answer: kept.add(left[place], answer),
    )
    note_cut(asked)


def _answered(row: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """A row with its answer, and without the reasoning of another one."""
    others = {name: value for name, value in row.items() if name != "reasoning"}
    thought = {"reasoning": answer.reasoning} if answer.reasoning else {}
    return {**others, **thought, "response": answer.text}
