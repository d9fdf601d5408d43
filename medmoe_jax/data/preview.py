"""Looking at a data set before training on it, and training a tokenizer on one."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medmoe_jax.data import builder, rows, tokenizers
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.templates import Template, load_template, stops
from medmoe_jax.data.tokenizers import SentencePiece, Tokenizer
from medmoe_jax.errors import UserError

MARKER = re.compile(r"<\|?\w+\|?>")
TARGET, CONTEXT, CUT = "bold green", "dim", "red"
PERCENTILES = (0, 50, 90, 99, 100)


def inspect(
    dataset: str | Path,
    tokenizer: str | Path,
    template: str = "chatml",
    mask: str = "completion",
    length: int = 2048,
    row: int = 0,
    sample: int = 1000,
    console: Console | None = None,
) -> dict[str, float]:
    """Prints one row with its loss mask in colour, and statistics of up to `sample` rows.

    Green tokens are targets, red ones lie beyond `length`. Returns the statistics that it prints.
    Raises UserError for a row that does not exist and for what `open_dataset`, `load` and
    `load_template` refuse.
    """
    console = console or Console()
    data, words = builder.open_dataset(dataset), tokenizers.load(tokenizer)
    form = load_template(template, words)
    if not 0 <= row < len(data):
        raise UserError(f"row {row}: {dataset} has rows 0 to {len(data) - 1}")
    encoder = Encoder(words, form, mask)
    console.print(Text(f"row {row} of {len(data)}, language {data[row]['language'] or 'unknown'}"))
    console.print(coloured(data[row], encoder, length))
    console.print(Text(f"an answer ends at: {_stop_names(form, words)}"))
    chosen = np.unique(np.linspace(0, len(data) - 1, min(sample, len(data))).astype(int))
    statistics = length_statistics([data[int(i)] for i in chosen], encoder, length)
    table = Table("statistic", "value", title=f"{len(chosen)} rows, in tokens")
    for name, value in statistics.items():
        table.add_row(name, f"{value:,.1f}")
    console.print(table)
    return statistics


def coloured(row: dict, encoder: Encoder, length: int) -> Text:
    """A row's text, token by token: targets green, context dim, what will be cut off red."""
    text, used = Text(), 0
    for piece, ids, target in encoder.pieces(row["conversations"]):
        style = TARGET if target else CONTEXT
        kept = max(0, length - used)
        used += len(ids)
        if len(ids) <= kept:
            text.append(piece.text or encoder.tokenizer.text_of(ids[0] if ids else None), style)
        else:
            text.append(encoder.tokenizer.decode(ids[:kept]), style)
            text.append(encoder.tokenizer.decode(ids[kept:]), CUT)
    return text


def length_statistics(rows: Sequence[dict], encoder: Encoder, length: int) -> dict[str, float]:
    """Length percentiles in tokens, target share, and the shares of rows cut or left untaught."""
    encoded = [encoder(row) for row in rows]
    sizes = np.array([len(e.codes) for e in encoded])
    targets = np.array([e.loss_mask.sum() for e in encoded])
    kept = np.array([e.loss_mask[:length].sum() for e in encoded])
    result = {f"length p{p}": float(np.percentile(sizes, p)) for p in PERCENTILES}
    return result | {
        "targets %": 100.0 * float(targets.sum() / sizes.sum()),
        "truncated rows %": 100.0 * float((sizes > length).mean()),
        "rows without target %": 100.0 * float((kept == 0).mean()),
    }


def train_tokenizer(
    inputs: Sequence[str | Path], vocab_size: int, out: str | Path, template: str = "chatml"
) -> SentencePiece:
    """Trains a sentencepiece model on data files or built data sets.

    The markers of a built-in template become tokens of their own. Raises UserError for bad input.
    """
    if not inputs:
        raise UserError("no input given to train the tokenizer on")
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    markup = [p.text for p in load_template(template).render(turns) if p.kind == "markup"]
    symbols = list(dict.fromkeys(MARKER.findall(" ".join(markup))))
    return tokenizers.train(_texts(inputs), vocab_size, out, symbols)


def _texts(inputs: Sequence[str | Path]) -> Iterator[str]:
    for path in inputs:
        source = builder.open_dataset(path) if Path(path).is_dir() else rows.read_file(path)
        for row in source:
            for turn in row["conversations"]:
                yield from turn["content"].splitlines(keepends=False)


def _stop_names(template: Template, tokenizer: Tokenizer) -> str:
    ids, texts = stops(template, tokenizer)
    names = [f"{tokenizer.text_of(i)} (id {i})" for i in ids] + [f"{t!r} (text)" for t in texts]
    return ", ".join(names) or "nothing: this tokenizer has no eos and the template no end marker"
