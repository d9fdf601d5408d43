"""Build and look at data sets.

  medmoe data build --input rows.jsonl more.json.gz --output data/mine --name mine
  medmoe data inspect --dataset data/mine --tokenizer DIR --template chatml --length 3072
  medmoe data languages --input rows.jsonl data/mine --table families

Rows are {"conversations": [{"from": "human"|"gpt", "value": ...}, ...]} or {"prompt", "response"},
in JSON, JSONL or either with .gz. `languages` counts the rows of each language, named or detected,
and shows its expert.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.builder import build_from_files, open_dataset
from medmoe_jax.data.languages import census, detector
from medmoe_jax.data.preview import inspect
from medmoe_jax.data.rows import read_file
from medmoe_jax.routing.languages import read_languages


def add_arguments(parser) -> None:
    """Declare the command's own arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="rows to an array_record data set")
    build.add_argument("--input", nargs="+", required=True, help="files of rows")
    build.add_argument("--output", required=True, help="folder to write into")
    build.add_argument("--name", default="", help="of the data set (default: the first file's)")
    build.add_argument("--language", default="", help="of rows that name none")
    look = actions.add_parser("inspect", help="a row with its loss mask, and lengths")
    look.add_argument("--dataset", required=True, help="a built data set")
    look.add_argument("--tokenizer", required=True, help="file or folder")
    look.add_argument("--template", default="chatml", help="(%(default)s)")
    look.add_argument("--mask", default="completion", help="(%(default)s)")
    look.add_argument("--length", type=int, default=2048, help="limit in tokens (%(default)s)")
    look.add_argument("--row", type=int, default=0, help="which row to show (%(default)s)")
    count = actions.add_parser("languages", help="rows of each language, and its expert")
    count.add_argument("--input", nargs="+", required=True, help="files of rows, built data sets")
    count.add_argument("--table", default="", help="of languages: families, major, or a file")
    count.add_argument(
        "--detect",
        type=float,
        default=0.5,
        help="least probability of a language that a row does not name (%(default)s)",
    )


def run(arguments, rest) -> None:
    """Run the command."""
    no_rest(rest)
    if arguments.action == "build":
        folder = build_from_files(
            arguments.input, arguments.output, arguments.name, arguments.language
        )
        print(f"built {folder}")
        return
    if arguments.action == "languages":
        _print_languages(arguments.input, arguments.table, arguments.detect)
        return
    inspect(
        arguments.dataset,
        arguments.tokenizer,
        arguments.template,
        arguments.mask,
        arguments.length,
        arguments.row,
    )


def _print_languages(inputs, table: str, least: float) -> None:
    experts = read_languages(table) if table else None
    detect = detector(least)
    out = Table("input", "language", "expert", "rows that name it", "detected")
    for path in inputs:
        rows = open_dataset(path) if Path(path).is_dir() else read_file(path)
        for code, (named, detected) in census(rows, detect).items():
            expert = ""
            if experts and code:
                known = code in experts.ids
                expert = experts.experts[experts.ids[code]] if known else "not in the table"
            out.add_row(path, code or "unknown", expert, f"{named:,}", f"{detected:,}")
    Console().print(out)
