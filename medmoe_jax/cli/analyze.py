"""Look into a trained model.

  medmoe analyze routing --config=FILE --workdir=DIR --data=rows.jsonl --out=DIR

`routing` runs rows through the model and shows which experts each language uses, by layer and site:
routing.json, routing.html, and the page's pictures as PNG files. Rows are of the language they
name, or of a detected one (data.detect_language).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from medmoe_jax.api.opening import open_model
from medmoe_jax.api.routing import measure, read
from medmoe_jax.cli.session import add_model_arguments, open_run
from medmoe_jax.evaluation import routing
from medmoe_jax.ranges import COUNT
from medmoe_jax.screen import ScreenTable
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
    texts = read(opened.setup, arguments.data, arguments.limit)  # bad rows load no model
    found = measure(opened.setup, open_model(opened, arguments.stage, arguments.off), texts)
    written = found.save(arguments.out)
    for gate in found.gates:
        console.print(_table(gate, found.texts))
    say(f"written to {written['html']} and {written['json']}")


def _table(gate: routing.Gate, texts: Sequence[routing.Texts]) -> ScreenTable:
    """A gate's figures in its first and its last layer."""
    stop = gate.first_layer + gate.use_GxNxE.shape[1]
    ends = f"layer {gate.first_layer} → {stop - 1}"
    rows = []
    for g, one in enumerate(texts):
        effective, own = gate.effective_GxN[g], gate.own_GxN[g]
        rows.append(
            (
                one.name,
                f"{int(gate.tokens_G[g]):,}",
                f"{effective[0]:.2f} → {effective[-1]:.2f}",
                f"{own[0]:.0%} → {own[-1]:.0%}" if gate.own_G[g] >= 0 else "–",
            )
        )
    numbers = ("tokens", f"effective experts, {ends}", f"own expert, {ends}")
    return ScreenTable(("language",), numbers, rows, gate.name)
