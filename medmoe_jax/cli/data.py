"""Build and look at data sets.

  medmoe data build --input rows.jsonl more.json.gz --output data/mine --name mine
  medmoe data inspect --dataset data/mine --tokenizer DIR --template chatml --length 3072

Rows are {"conversations": [{"from": "human"|"gpt", "value": ...}, ...]} or {"prompt", "response"},
in JSON, JSONL or either with .gz.
"""

from __future__ import annotations

from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.builder import build_from_files
from medmoe_jax.data.preview import inspect


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


def run(arguments, rest) -> None:
    """Run the command."""
    no_rest(rest)
    if arguments.action == "build":
        folder = build_from_files(
            arguments.input, arguments.output, arguments.name, arguments.language
        )
        print(f"built {folder}")
        return
    inspect(
        arguments.dataset,
        arguments.tokenizer,
        arguments.template,
        arguments.mask,
        arguments.length,
        arguments.row,
    )
