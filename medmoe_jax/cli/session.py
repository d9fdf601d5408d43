"""Arguments that several commands have, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.api import opening
from medmoe_jax.cli.configs import load_config
from medmoe_jax.data.conversation import check_json
from medmoe_jax.errors import UserError
from medmoe_jax.inference.chat import check_room
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import COUNT
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.training.run import Run


def open_run(arguments: Sequence[str], workdir: str) -> Run:
    """The run that command-line arguments name, the same in every process.

    Args:
      arguments: about the configuration (`load_config`).
      workdir: of the run; "" = there is none.

    Raises:
      UserError: see `api.opening.open_run`.
    """
    return opening.open_run(load_config(arguments, workdir), workdir)


def no_rest(rest: Sequence[str]) -> None:
    """Raise UserError for arguments that nobody asked for."""
    if rest:
        raise UserError(f"unknown argument '{rest[0]}'; see --help")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that opens a model."""
    parser.add_argument("--workdir", default="", help="of the run; not needed for a bare base")
    parser.add_argument("--stage", help="whose end is used; 'base' = no bank (default: the last)")
    parser.add_argument(
        "--off", action="append", default=[], metavar="BANK", help="leave out a bank; repeatable"
    )


def add_language_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of every command that answers."""
    parser.add_argument(
        "--language",
        default="",
        metavar="CODE",
        help="of the texts, for routers that always force its expert (default: detected)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that draws tokens."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus size (%(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from so many tokens; 0 = all (%(default)s)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="least share of the likeliest's (%(default)s)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")


def add_length_argument(parser: argparse.ArgumentParser, most: int) -> None:
    """The argument of every command that writes answers; `most` tokens where it is not given."""
    text = f"of an answer (default: {most}, or half of a shorter context)"
    parser.add_argument("--max-tokens", type=int, help=text)
    parser.set_defaults(most=most)


def check_length(arguments: argparse.Namespace) -> None:
    """Raise ParameterError for a number of tokens that no context has room for."""
    if arguments.max_tokens is not None:
        COUNT.check("max_tokens", arguments.max_tokens)


def length_of(arguments: argparse.Namespace, context: int) -> int:
    """The most tokens of an answer, by the argument of `add_length_argument`.

    Raises:
      ParameterError: they leave no room for a question in a context of that many tokens.
    """
    if arguments.max_tokens is None:
        return max(1, min(arguments.most, context // 2))
    check_room(arguments.max_tokens, context)
    return arguments.max_tokens


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the arguments of `add_sampling_arguments`, by the names of `Sampling`."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(arguments, name) for name in names}


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How tokens are drawn, by the arguments of `add_sampling_arguments`."""
    return Sampling(**sampling_arguments(arguments))


def read_rows(path: str, fields: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Rows of a JSONL file, each with the given text fields, and the file and line of each.

    Raises:
      UserError: a row is not JSON (NaN and infinity are not) or lacks a field, or the file is not
        UTF-8; names file and line.
    """
    file = fetched(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    rows, places = [], []
    for place, row in json_text.lines(file.read_bytes(), path):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f'{place}: the row needs a text field "{field}"')
        check_json(row, place)
        rows.append(row)
        places.append(place)
    if not rows:
        raise UserError(f"{path}: no row in the file")
    return rows, places
