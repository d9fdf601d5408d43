"""Build and look at data sets.

  medmoe data build --input rows.jsonl more.parquet --output data/mine --name mine
  medmoe data build --input rows.jsonl --output data/clean --dedupe --against suite:cblue
  medmoe data inspect --dataset rows.jsonl --tokenizer DIR --template chatml --length 3072
  medmoe data languages --input rows.jsonl data/mine --table families

Rows of many forms are read, from files of many kinds, folders and named data sets: docs/data.md.
`build` leaves out rows that repeat earlier ones (--dedupe), and those that stand in data held out
for evaluation (--against); what it left out is written beside the data.
`inspect` shows the first rows as they will be trained, targets in green, and what all rows hold.
`languages` counts the rows of each language, named or detected, and shows its expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.checkpoints.bases import open_tokenizer
from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.builder import REMOVED, build_from_files, read_rows
from medmoe_jax.data.duplicates import (
    HELD_OUT,
    SIMILARITY,
    Placed,
    Repeat,
    Repeats,
    find_repeats,
)
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.languages import census, detector
from medmoe_jax.data.preview import inspect
from medmoe_jax.data.rows import RowReader, SettingNames
from medmoe_jax.data.sources import open_path
from medmoe_jax.data.templates import load_template
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.items import Item
from medmoe_jax.evaluation.overlap import ItemIndex, row_text
from medmoe_jax.evaluation.tasks import expand, load_items
from medmoe_jax.routing.languages import read_languages
from medmoe_jax.screen import Screen, ScreenTable
from medmoe_jax.storage.places import exists
from medmoe_jax.training.terminal import say

_NAMED = SettingNames("--ignore (in a recipe: data.ignore)", "--column=")
_TASK = "task:"  # before a file of items, as one of rows has the same ending


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="rows to an array_record data set")
    build.add_argument("--input", nargs="+", required=True, help="files, folders, named data sets")
    build.add_argument("--output", required=True, help="folder to write into")
    build.add_argument("--name", default="", help="of the data set (default: the first file's)")
    build.add_argument("--language", default="", help="of rows that name none")
    build.add_argument(
        "--dedupe", action="store_true", help="leave out exact and near duplicates of earlier rows"
    )
    look = actions.add_parser("inspect", help="rows with their loss mask, and what all hold")
    look.add_argument("--dataset", required=True, help="a file, folder or named data set")
    look.add_argument("--tokenizer", required=True, help="file or folder, or a .gguf file")
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
    for one in (build, look):
        one.add_argument(
            "--against",
            action="append",
            default=[],
            metavar="PATH|TASK",
            help="held out for evaluation: rows in a file, folder or named data set; or a task as "
            "of medmoe eval (medqa@test, suite:NAME, cards.toml, task:FILE.jsonl); repeatable",
        )
        one.add_argument(
            "--similarity",
            type=float,
            default=SIMILARITY,
            help="Jaccard similarity at which two rows are near duplicates (%(default)s)",
        )
    for one in (build, look, count):
        add_row_arguments(one)


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads rows of people's files."""
    parser.add_argument("--split", default="train", help="of a data set (%(default)s)")
    add_key_arguments(parser)


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes rows with other keys readable: arguments for `row_reader`."""
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


def row_reader(
    arguments: argparse.Namespace, language: str = "", learned: bool = True
) -> RowReader:
    """What these arguments make of a row. Raises UserError."""
    pairs = _pairs("--column", arguments.column)
    return RowReader(language, pairs, arguments.ignore, _NAMED, learned)


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    if arguments.action == "build":
        _build(arguments)
    elif arguments.action == "languages":
        _print_languages(arguments)
    else:
        words = open_tokenizer(arguments.tokenizer)
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
            repeats=_repeats(arguments, source.rows.placed, within=True),
        )


def _build(arguments) -> None:
    inputs, split = arguments.input, arguments.split
    reader = row_reader(arguments, arguments.language)
    repeats = None
    if arguments.dedupe or arguments.against:
        repeats = _repeats(
            arguments, lambda: read_rows(inputs, reader.again(), split), arguments.dedupe
        )
    folder = build_from_files(inputs, arguments.output, arguments.name, reader, split, repeats)
    for key, count in reader.ignored.items():
        say(f"left out: {key} ({count:,})")
    if repeats is not None:
        counts = ", ".join(f"{kind} {count:,}" for kind, count in repeats.counts.items())
        say(f"left out of {repeats.rows:,} rows: {counts}; see {folder / REMOVED}")
    say(f"built {folder}")


def _repeats(arguments, rows: Callable[[], Placed], within: bool) -> Repeats:
    """The rows that repeat others, or what --against names."""
    # Of held-out rows all keys are known enough: only what they say is compared.
    columns = _pairs("--column", arguments.column)
    reader = RowReader("", columns, (*arguments.ignore, "*"), _NAMED, learned=False)
    paths = [name for name in arguments.against if _holds_rows(name)]
    tasks = [name.removeprefix(_TASK) for name in arguments.against if name not in paths]
    leaks = _leaks(load_items(expand(tasks)), rows()) if tasks else {}
    return find_repeats(rows(), read_rows(paths, reader), leaks, arguments.similarity, within)


def _holds_rows(name: str) -> bool:
    if name.startswith(_TASK) or name.endswith(".toml"):
        return False
    return is_name(name) or exists(name)


def _leaks(tasks: Mapping[str, Sequence[Item]], rows: Placed) -> dict[int, Repeat]:
    """The rows in which items of tasks stand, as `medmoe overlap` finds them."""
    index, found = ItemIndex(tasks), {}
    for number, (place, row) in enumerate(rows):
        items = index.found_in(row_text(row))
        if items:
            (task, item), (share, _) = max(items.items(), key=lambda one: one[1][0])
            found[number] = Repeat(place, HELD_OUT, f"{task}, item {item}", share)
    return found


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    for one in given:
        if "=" not in one:
            raise UserError(f"{option}: '{one}' is not NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


def _value(text: str) -> Any:
    """A value of an option: JSON, or a text as it is."""
    try:
        return json_text.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def _print_languages(arguments) -> None:
    experts = read_languages(arguments.table) if arguments.table else None
    detect = detector(arguments.detect)
    counted = []
    for path in arguments.input:
        rows = open_path(path, row_reader(arguments), arguments.split).rows
        for code, (named, detected) in census(rows, detect).items():
            expert = ""
            if experts and code:
                known = code in experts.ids
                expert = experts.experts[experts.ids[code]] if known else "not in the table"
            counted.append((path, code or "unknown", expert, f"{named:,}", f"{detected:,}"))
    words, numbers = ("input", "language", "expert"), ("rows that name it", "detected")
    Screen().print(ScreenTable(words, numbers, counted))
