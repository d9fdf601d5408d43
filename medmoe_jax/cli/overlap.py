"""Look for items of tasks that stand in training rows.

  medmoe overlap --train=rows.jsonl --train=medquad --tasks=medqa@test,suite:cblue --output=overlap

Training rows are files (of whose rows --ignore leaves out keys and --column names others), or known
sets by name. An item whose text shares a run of --words words (of
signs, in scripts without spaces) with a row is counted, and written with that row to overlap.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.cli.data import add_key_arguments, row_reader
from medmoe_jax.cli.session import no_rest
from medmoe_jax.data import medical
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import open_path
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.overlap import RUN, overlaps, row_text
from medmoe_jax.evaluation.tasks import expand, load_items
from medmoe_jax.ranges import COUNT
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import exists, place
from medmoe_jax.training.terminal import console, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--train", action="append", default=[], help="a file or set; repeatable")
    parser.add_argument("--tasks", default="", help="as of medmoe eval")
    parser.add_argument("--split", help="of the tasks' sets")
    parser.add_argument("--words", type=int, default=RUN, help="in a run that counts")
    parser.add_argument("--output", required=True, help="folder of overlap.jsonl")
    add_key_arguments(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    no_rest(rest)
    names = expand([name for name in arguments.tasks.split(",") if name])
    if not names or not arguments.train:
        raise UserError("give --tasks to look for, and --train to look in")
    COUNT.check("words", arguments.words)
    items = load_items(names, arguments.split)
    reader = row_reader(arguments, learned=False)
    texts = [pair for source in arguments.train for pair in _texts(source, reader)]
    found = overlaps(items, (text for _, text in texts), arguments.words)
    counts = Counter(one.task for one in found)
    rows = [
        (name, str(len(of)), str(counts[name]), f"{100 * counts[name] / len(of):.1f}%")
        for name, of in items.items()
    ]
    console.print(ScreenTable(("task",), ("items", "in training rows", "share"), rows))
    places = [where for where, _ in texts]
    lines = (
        {**asdict(one), "row": places[one.row], "also": [places[row] for row in one.also]}
        for one in found
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = place(arguments.output) / "overlap.jsonl"
    write_text(path, text)
    say(f"written to {path}")


def _texts(source: str, reader: RowReader) -> Iterator[tuple[str, str]]:
    """`(where, text)` of every row of a file or a set."""
    if is_name(source) or exists(source):
        rows = open_path(source, reader).rows
        for number, row in enumerate(rows):
            yield rows.place(number), row_text(row)
        return
    for number, row in enumerate(medical.training_rows(source, "train"), 1):
        yield f"{source}: row {number}", f"{row.prompt} {row.response}"
