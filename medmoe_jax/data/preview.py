"""Looking at rows before training on them, and training a tokenizer on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from medmoe_jax.data import tokenizers
from medmoe_jax.data.conversation import Rows, Turn
from medmoe_jax.data.duplicates import EXACT, HELD_OUT, NEAR, Repeats, find_repeats
from medmoe_jax.data.encode import Encoder, PieceRun
from medmoe_jax.data.encoded_rows import encoded_at
from medmoe_jax.data.languages import census, detector
from medmoe_jax.data.pieces import Piece
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import Source, open_path
from medmoe_jax.data.templates import MARK, doubts, load_template
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE
from medmoe_jax.screen import Screen, ScreenTable

TARGET, CONTEXT, CUT = "bold green", "dim", "red"
_DUPLICATES = {EXACT: "exact duplicates", NEAR: "near duplicates", HELD_OUT: "held-out rows"}
PERCENTILES = (0, 50, 90, 99, 100)
_SHOWN = 5  # languages, and duplicates of a kind, that are named


def inspect(
    source: Source,
    encoder: Encoder,
    length: int = 2048,
    first: int = 0,
    count: int = 1,
    detect: float = 0.5,
    console: Console | None = None,
    repeats: Repeats | None = None,
) -> dict[str, float]:
    """Prints some rows as they will be trained, and what all of them hold.

    Args:
      source: the rows.
      encoder: what they will be trained with.
      length: tokens at which a row will be cut.
      first, count: the rows to show. Green is a target, dim is context, red lies beyond `length`.
      detect: the least probability of a language that a row does not name; 0 = none is detected.
      console: where to print.
      repeats: rows that repeat others; None = what `data.duplicates` finds in the rows alone.

    Returns:
      The statistics that it prints, of duplicates too.

    Raises:
      UserError: a row that does not exist or cannot be used, which is named by its place; a length
        below 1, a count below 0.
    """
    COUNT.check_whole("length", length)
    NOT_NEGATIVE.check_whole("rows", count)
    console = console or Screen()
    rows = source.rows
    if not len(rows):
        raise UserError("there is no row to look at; check the file")
    if not 0 <= first < len(rows):
        raise UserError(f"row {first}: there are rows 0 to {len(rows) - 1}")
    for number in range(first, min(first + count, len(rows))):
        _show(rows, number, encoder, length, console)
    for text in (f"an answer ends at: {_stop_names(encoder)}", *_warnings(source, encoder)):
        console.print(Text(text))
    statistics = row_statistics(rows, encoder, length)
    _print_table(f"all {len(rows):,} rows, in tokens", statistics, console)
    repeats = find_repeats(rows.placed()) if repeats is None else repeats
    counts = {_DUPLICATES[kind]: float(count) for kind, count in repeats.counts.items()}
    _print_table("rows that repeat others", counts, console)
    for text in _examples(repeats):
        console.print(Text(text))
    for code, (named, detected) in list(census(rows, detector(detect)).items())[:_SHOWN]:
        language = code or "unknown"
        console.print(
            Text(f"language {language}: {named:,} rows name it, in {detected:,} detected")
        )
    return statistics | counts


def _print_table(title: str, values: Mapping[str, float], console: Console) -> None:
    rows = [(name, f"{value:,.1f}".removesuffix(".0")) for name, value in values.items()]
    console.print(ScreenTable(("statistic",), ("value",), rows, title))


def _examples(repeats: Repeats) -> Iterator[str]:
    """The first rows of each kind, each with what it repeats."""
    for kind, name in _DUPLICATES.items():
        some = [one for one in repeats.by_number.values() if one.kind == kind][:_SHOWN]
        for place, _, of, similarity in some:
            yield f"{name}: {place} {'=' if kind == EXACT else f'~ {similarity:.2f} ~'} {of}"


def _show(rows: Rows, number: int, encoder: Encoder, length: int, console: Console) -> None:
    parts = encoded_at(rows, number, encoder.runs)
    language = rows[number]["language"] or "unknown"
    for part, runs in enumerate(parts):
        which = f", training row {part + 1} of {len(parts)}" if len(parts) > 1 else ""
        title = f"row {number} of {len(rows)}{which}, language {language} ({rows.place(number)})"
        console.print(Text(title, style="bold"))
        console.print(coloured(runs, encoder.tokenizer, length))


def coloured(runs: Sequence[PieceRun], tokenizer: Tokenizer, length: int) -> Text:
    """A training row's text: targets green, context dim, what will be cut off red."""
    text, used = Text(), 0
    for run in runs:
        style = TARGET if run.target else CONTEXT
        kept = max(0, length - used)
        used += len(run.ids)
        if len(run.ids) <= kept:
            text.append("".join(_written(piece, tokenizer) for piece in run.pieces), style)
        else:
            text.append(tokenizer.decode(run.ids[:kept]), style)
            text.append(tokenizer.decode(run.ids[kept:]), CUT)
    return text


def _written(piece: Piece, tokenizer: Tokenizer) -> str:
    own = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(piece.kind)
    return piece.text or tokenizer.text_of(own)


def row_statistics(rows: Rows, encoder: Encoder, length: int) -> dict[str, float]:
    """Length percentiles, target share, and shares of rows cut or left untaught."""
    encoded = [one for number in range(len(rows)) for one in encoded_at(rows, number, encoder.rows)]
    sizes = np.array([len(e.tokens) for e in encoded])
    targets = np.array([e.loss_mask.sum() for e in encoded])
    kept = np.array([e.loss_mask[:length].sum() for e in encoded])
    result = {"training rows": float(len(encoded))}
    result |= {f"length p{p}": float(np.percentile(sizes, p)) for p in PERCENTILES}
    return result | {
        "tokens": float(sizes.sum()),
        "targets": float(targets.sum()),
        "targets %": 100.0 * float(targets.sum() / sizes.sum()),
        "truncated rows %": 100.0 * float((sizes > length).mean()),
        "rows without target %": 100.0 * float((kept == 0).mean()),
    }


def _warnings(source: Source, encoder: Encoder) -> Iterator[str]:
    yield from doubts(encoder.template, encoder.tokenizer)
    if source.ignored:
        left = ", ".join(f"{key} ({count:,})" for key, count in source.ignored.items())
        yield f"left out of the rows: {left}"


def _stop_names(encoder: Encoder) -> str:
    ids, texts = encoder.stops
    names = [f"{encoder.tokenizer.text_of(i)} (id {i})" for i in ids]
    return ", ".join(names + [f"{text!r} (text)" for text in texts])


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    out: str | Path,
    template: str = "chatml",
    reader: RowReader | None = None,
    split: str = "train",
) -> Tokenizer:
    """Trains a sentencepiece model on data files or built data sets.

    The markers of a built-in template become tokens of their own. Raises UserError for bad input.
    """
    if not inputs:
        raise UserError("no input given to train the tokenizer on")
    turns: list[Turn] = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    (pieces,) = load_template(template).rows(turns)
    markup = " ".join(piece.text for piece in pieces if piece.kind == "markup")
    symbols = list(dict.fromkeys(MARK.findall(markup)))
    texts = _texts(inputs, reader or RowReader(), split)
    return tokenizers.train(texts, vocab_size, out, symbols)


def _texts(inputs: Sequence[str | Path], reader: RowReader, split: str) -> Iterator[str]:
    for path in inputs:
        for row in open_path(path, reader, split).rows:
            for turn in row["conversations"]:
                for field in ("reasoning_content", "content"):
                    yield from turn.get(field, "").splitlines(keepends=False)
