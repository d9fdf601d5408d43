"""Look into a trained model.

  medmoe analyze routing --config=FILE --workdir=DIR --data=rows.jsonl --out=DIR

`routing` runs rows through the model and shows which experts each language uses, by layer and site:
routing.json, routing.html, and the page's pictures as PNG files. Rows are of the language they
name, or of a detected one (data.detect_language).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from rich.table import Table

from medmoe_jax.api.opening import open_model
from medmoe_jax.base import trees
from medmoe_jax.cli.session import add_model_arguments, open_run
from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.languages import detector, row_languages
from medmoe_jax.data.sources import RowFitter, open_source
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import routing, routing_report
from medmoe_jax.ranges import COUNT
from medmoe_jax.storage.places import exists
from medmoe_jax.training.config import source
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.terminal import console, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("routing", help="experts by language, layer and site")
    add_model_arguments(one)
    one.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a source of the config, or a file or built data set of rows; repeatable",
    )
    one.add_argument("--limit", type=int, help="rows a language, the first ones (default: all)")
    one.add_argument("--out", required=True, help="folder to write into")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    if arguments.limit is not None:
        COUNT.check("limit", arguments.limit)
    opened = open_run(rest, arguments.workdir)
    setup = opened.setup
    rows = list(_rows(setup, arguments.data))
    texts = routing.by_language(rows, setup.languages, arguments.limit)
    engine = open_model(opened, arguments.stage, arguments.off).engine
    gates = routing.measure(
        engine.config,
        trees.overlay(engine.base, engine.trained),
        engine.banks,
        setup.mesh,
        texts,
        setup.encoder,
        setup.config.data.length,
        engine.batch,
        setup.languages,
    )
    written = routing_report.save(arguments.out, texts, gates, "Routing by language")
    for gate in gates:
        console.print(_table(gate, texts))
    say(f"written to {written['html']} and {written['json']}")


def _rows(setup: Setup, names: Sequence[str]) -> Iterator[tuple[Conversation, str, str]]:
    """Rows of sources of the config, or of paths, with their languages and places."""
    data = setup.config.data
    detect = detector(data.detect_language)
    fit = RowFitter(setup.encoder, data.length)
    for name in names:
        if name not in data.sources and not (is_name(name) or exists(name)):
            known = ", ".join(data.sources) or "none"
            raise UserError(f"--data: '{name}' is no file and no source of the config ({known})")
        fields = data.sources[name] if name in data.sources else source(name)
        rows = open_source(name, fields.to_dict(), data.ignore, fit).rows
        found = row_languages(rows, detect)
        for number, (row, (code, _)) in enumerate(zip(rows, found, strict=True)):
            yield row, code, rows.place(number)


def _table(gate: routing.Gate, texts: Sequence[routing.Texts]) -> Table:
    """A gate's figures in its first and its last layer."""
    stop = gate.first_layer + gate.use_GxNxE.shape[1]
    ends = f"layer {gate.first_layer} → {stop - 1}"
    table = Table(title=gate.name, title_justify="left")
    for column in ("language", "tokens", f"effective experts, {ends}", f"own expert, {ends}"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for g, one in enumerate(texts):
        effective, own = gate.effective_GxN[g], gate.own_GxN[g]
        table.add_row(
            one.name,
            f"{int(gate.tokens_G[g]):,}",
            f"{effective[0]:.2f} → {effective[-1]:.2f}",
            f"{own[0]:.0%} → {own[-1]:.0%}" if gate.own_G[g] >= 0 else "–",
        )
    return table
