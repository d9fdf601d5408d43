"""Build and look at data sets.

  medmoe data build --input rows.jsonl more.parquet --output data/mine --name mine
  medmoe data inspect --dataset rows.jsonl --tokenizer DIR --template chatml --length 3072
  medmoe data languages --input rows.jsonl data/mine --table families

Rows of many forms are read, from files of many kinds, folders and named data sets: docs/data.md.
`inspect` shows the first rows as they will be trained, targets in green, and what all rows hold.
`languages` counts the rows of each language, named or detected, and shows its expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from medmoe_jax.cli.session import no_rest
from medmoe_jax.data import tokenizers
from medmoe_jax.data.builder import build_from_files
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.languages import census, detector
from medmoe_jax.data.preview import inspect
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import open_path
from medmoe_jax.data.templates import load_template
from medmoe_jax.errors import UserError
from medmoe_jax.routing.languages import read_languages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="rows to an array_record data set")
    build.add_argument("--input", nargs="+", required=True, help="files, folders, named data sets")
    build.add_argument("--output", required=True, help="folder to write into")
    build.add_argument("--name", default="", help="of the data set (default: the first file's)")
    build.add_argument("--language", default="", help="of rows that name none")
    look = actions.add_parser("inspect", help="rows with their loss mask, and what all hold")
    look.add_argument("--dataset", required=True, help="a file, folder or named data set")
    look.add_argument("--tokenizer", required=True, help="file or folder")
    look.add_argument("--template", default="chatml", help="(%(default)s)")
    look.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the template, such as enable_thinking=false; repeatable",
    )
    look.add_argument("--mask", default="completion", help="(%(default)s)")
    look.add_argument("--length", type=int, default=2048, help="limit in tokens (%(default)s)")
    look.add_argument("--row", type=int, default=0, help="the first row to show (%(default)s)")
    look.add_argument("--rows", type=int, default=3, help="how many to show (%(default)s)")
    count = actions.add_parser("languages", help="rows of each language, and its expert")
    count.add_argument("--input", nargs="+", required=True, help="files, folders, named data sets")
    count.add_argument("--table", default="", help="of languages: families, major, or a file")
    for one in (look, count):
        one.add_argument(
            "--detect",
            type=float,
            default=0.5,
            help="least probability of a language that a row does not name (%(default)s)",
        )
    for one in (build, look, count):
        add_row_arguments(one)


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads rows of people's files."""
    parser.add_argument("--split", default="train", help="of a data set (%(default)s)")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of rows to leave out, or a pattern of them; repeatable",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=NAME",
        help="what the rows call a key of ours, such as prompt=Question; repeatable",
    )


def row_reader(arguments: argparse.Namespace, language: str = "") -> RowReader:
    """What these arguments make of a row. Raises UserError."""
    pairs = _pairs("--column", arguments.column)
    try:
        return RowReader(language, pairs, arguments.ignore)
    except UserError as error:
        raise UserError(f"--column: {error}") from None


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    if arguments.action == "build":
        reader = row_reader(arguments, arguments.language)
        folder = build_from_files(
            arguments.input, arguments.output, arguments.name, reader, arguments.split
        )
        _print_ignored(reader)
        print(f"built {folder}")
    elif arguments.action == "languages":
        _print_languages(arguments)
    else:
        words = tokenizers.load(arguments.tokenizer)
        options = {k: _value(v) for k, v in _pairs("--option", arguments.option).items()}
        template = load_template(arguments.template, words, options)
        encoder = Encoder(words, template, arguments.mask)
        source = open_path(arguments.dataset, row_reader(arguments), arguments.split)
        inspect(
            source,
            encoder,
            arguments.length,
            arguments.row,
            arguments.rows,
            arguments.detect,
        )


def _print_ignored(reader: RowReader) -> None:
    for key, count in reader.ignored.items():
        print(f"left out: {key} ({count:,})")


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    for one in given:
        if "=" not in one:
            raise UserError(f"{option}: '{one}' is not NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


def _value(text: str) -> Any:
    """A value of an option: JSON, or a text as it is."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def _print_languages(arguments) -> None:
    experts = read_languages(arguments.table) if arguments.table else None
    detect = detector(arguments.detect)
    out = Table("input", "language", "expert", "rows that name it", "detected")
    for path in arguments.input:
        rows = open_path(path, row_reader(arguments), arguments.split).rows
        for code, (named, detected) in census(rows, detect).items():
            expert = ""
            if experts and code:
                known = code in experts.ids
                expert = experts.experts[experts.ids[code]] if known else "not in the table"
            out.add_row(path, code or "unknown", expert, f"{named:,}", f"{detected:,}")
    Console().print(out)
