"""Named sources of conversation rows: files, built data sets, and readers of known collections."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medmoe_jax.data import builder, medical
from medmoe_jax.data.blocks import open_files
from medmoe_jax.data.conversation import Conversation, Rows
from medmoe_jax.data.demo import corpus
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.encoded_rows import CACHE_BYTES, EncodedRows
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.languages import detector, name_language, name_languages
from medmoe_jax.data.medical.row import Row, shorten
from medmoe_jax.data.prompts import Prompt
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.streamed_rows import StreamedRows
from medmoe_jax.errors import UserError, within
from medmoe_jax.storage.places import exists

_DEMO = {
    "demo_general": corpus.pretraining_rows,
    "demo_knowledge": corpus.knowledge_rows,
    "demo_answers": corpus.answer_rows,
    "demo_everyday": corpus.everyday_rows,
    "demo_alignment": corpus.alignment_rows,
}


class RowFitter:
    """Shortens the body of a collection's row so that prompt and answer fit `length` tokens.

    Attributes:
      shortened: rows it has shortened so far.
    """

    def __init__(self, encoder: Encoder, length: int) -> None:
        self.encoder = encoder
        self.length = length
        self.shortened = 0

    def __call__(self, row: Row) -> Row:
        """The row, or a shorter one with the same answer."""
        whole = len(self.encoder(row.conversation()).tokens)
        if whole <= self.length:
            return row
        self.shortened += 1
        answer = whole - self._prompt_tokens(row.prompt)
        return shorten(row, self.length - answer, self._prompt_tokens)

    def _prompt_tokens(self, prompt: str) -> int:
        return len(self.encoder.prompt([{"role": "user", "content": prompt}]))


@dataclass(frozen=True)
class Source:
    """Rows of a source with random access.

    Attributes:
      rows: its conversation rows.
      digest: of their content.
      ignored: keys that were left out, and in how many rows.
      shortened: rows of a collection that were shortened.
      built: whether they come from a built data set.
    """

    rows: Rows
    digest: str
    ignored: Counter[str] = field(default_factory=Counter)
    shortened: int = 0
    built: bool = False


@dataclass(frozen=True)
class Opened:
    """The training rows of a source.

    Attributes:
      rows: encoded, or to be encoded as they come.
      digest: of the source's content.
      languages: how many rows named their language, had it detected, or are of unknown language;
        empty without a table of languages.
      notes: what a person should know of it, a sentence each.
    """

    rows: EncodedRows | StreamedRows
    digest: str
    languages: dict[str, int]
    notes: tuple[str, ...]


def open_sources(
    data: Mapping[str, Any], names: Sequence[str], encoder: Encoder
) -> dict[str, Opened]:
    """The training rows of the named sources, every one of which can be trained.

    Args:
      data: the section `data` of a configuration.
      names: keys of `data.sources`.
      encoder: what encodes them.

    Raises:
      UserError: a source cannot be read, or a row of it cannot be used; the message names it.
    """
    budget = CACHE_BYTES // max(1, len(names))
    return {name: _open_encoded(data, name, encoder, budget) for name in names}


def _open_encoded(data: Mapping[str, Any], name: str, encoder: Encoder, budget: int) -> Opened:
    if data["sources"][name]["window"]:
        return _open_streamed(data, name, encoder)
    fit = RowFitter(encoder, data["length"])
    source = open_source(name, data["sources"][name], data["ignore"], fit)
    rows, languages = source.rows, {}
    if encoder.languages is not None:
        detect = detector(data["detect_language"])
        rows, languages = name_languages(rows, encoder.languages, detect)
    encoded = EncodedRows(name, rows, encoder, data["length"], budget)
    check_targets(name, len(encoded), encoded.counts.rows_without_target, encoded.length)
    return Opened(encoded, source.digest, languages, tuple(_notes(name, source, encoded)))


def check_targets(name: str, rows: int, without_target: int, length: int) -> None:
    """Raise UserError for a source none of whose training rows has a target."""
    if without_target == rows:
        raise UserError(
            f"source '{name}': none of its {rows:,} rows has a target within {length} tokens, so "
            "nothing can be learned from it; raise data.length"
        )


def _open_streamed(data: Mapping[str, Any], name: str, encoder: Encoder) -> Opened:
    fields, rows = data["sources"][name], streamed_rows(data, name, encoder)
    told = [rows.digest, fields["prompt"], fields["columns"], *data["ignore"]]
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16)
    blocks = sum(map(len, rows.blocks))
    note = (
        f"source '{name}': streamed from {len(rows.files)} files in {blocks:,} blocks, "
        f"shuffled in a window of {rows.window:,} rows; a row is checked when it comes"
    )
    return Opened(rows, digest.hexdigest(), {}, (note,))


def streamed_rows(data: Mapping[str, Any], name: str, encoder: Encoder) -> StreamedRows:
    """The rows of a source that is streamed, of which the first are read; see `open_sources`."""
    fields, length, shards = data["sources"][name], data["length"], data["shards"]
    check_source(name, fields)
    form = Prompt(f"data.sources.{name}.prompt", fields["prompt"])
    own = _row_reader(name, fields, data["ignore"])
    known = encoder.languages
    detect = detector(data["detect_language"] if known else 0.0)

    def read(item: Any, place: str) -> Conversation:
        row = form.conversation(own(item, place))
        return row if known is None else name_language(row, known, detect, place)

    files = open_files(fields["path"], fields["split"])
    rows = StreamedRows(name, files, read, encoder, length, fields["window"], shards)
    with within(f"source '{name}': "):
        own.check_columns()  # in the first rows, which were tried
    return rows


def _row_reader(name: str, fields: Mapping[str, Any], ignore: Sequence[str]) -> RowReader:
    try:
        return RowReader(columns=fields["columns"], ignore=ignore)
    except UserError as error:
        raise UserError(f"data.sources.{name}.{error}") from None


def _notes(name: str, source: Source, rows: EncodedRows):
    if source.shortened:
        yield f"source '{name}': {source.shortened:,} rows were shortened to {rows.length} tokens"
    if source.ignored:
        left = ", ".join(f"{key} ({count:,})" for key, count in source.ignored.items())
        yield f"source '{name}': left out of its rows: {left}"
    if len(rows) != rows.conversations:
        yield (
            f"source '{name}': its {rows.conversations:,} rows are {len(rows):,} training rows, as "
            "the chat template writes an answer otherwise once more turns follow"
        )
    if rows.counts.truncated_rows:
        yield (
            f"source '{name}': {rows.counts.truncated_rows:,} of {len(rows):,} rows are cut at "
            f"{rows.length} tokens, and {rows.counts.rows_without_target:,} hold no target"
        )


def open_source(
    name: str,
    fields: Mapping[str, Any],
    ignore: Sequence[str] = (),
    fit: RowFitter | None = None,
) -> Source:
    """The rows of a source.

    Args:
      name: for messages.
      fields: of `training.config.source`: `path`, `reader` (`rows`, a collection of `data.medical`
        or a part of the demo corpus), `split`, `prompt`, the form of each row's first user turn
        (`data.prompts`), `columns` (`data.rows`).
      ignore: keys of rows that are left out.
      fit: applied to each row of a collection.

    Raises:
      UserError: an unknown reader, a path with a reader that takes none, a prompt without a place
        for the row's own text, a collection's test split, bad rows, or none.
    """
    found = _open_source(name, fields, ignore, fit)
    _check_any(name, fields, found.rows)
    return found


def _open_source(
    name: str, fields: Mapping[str, Any], ignore: Sequence[str], fit: RowFitter | None
) -> Source:
    check_source(name, fields)
    path, reader = fields["path"], fields["reader"]
    if fields["columns"] and reader != "rows":
        raise UserError(f"data.sources.{name}.columns: reader '{reader}' names its own columns")
    form = Prompt(f"data.sources.{name}.prompt", fields["prompt"])
    if reader == "rows":
        found = open_path(path, _row_reader(name, fields, ignore), fields["split"])
        rows = found.rows.changed(lambda number, row: form.conversation(row))
        digest = form.digest(found.digest) if found.built else _digest(rows)
        return replace(found, rows=rows, digest=digest)
    part, _, language = reader.partition(":")
    if part in _DEMO:
        found = corpus.in_language(_DEMO[part](), language)
        found = [form.conversation(row) for row in found]
        return Source(Rows(found, f"{reader}, row {{}}".format), _digest(found))
    whole = [form.row(row) for row in medical.training_rows(reader, fields["split"])]
    found = [(fit(row) if fit else row).conversation() for row in whole]
    shortened = fit.shortened if fit else 0
    return Source(Rows(found, f"{reader}, row {{}}".format), _digest(found), Counter(), shortened)


def _check_any(name: str, fields: Mapping[str, Any], rows: Rows) -> None:
    if not rows:
        raise UserError(f"source '{name}': {fields['path'] or fields['reader']}: no row in it")


def first_rows(name: str, fields: Mapping[str, Any], ignore: Sequence[str], count: int) -> Rows:
    """The first rows of a source, of which no more is read where it is a file or a built data set.

    Args:
      name, fields, ignore: as of `open_source`.
      count: at most so many.

    Raises:
      UserError: as `open_source` does.
    """
    if fields["reader"] != "rows":
        rows = open_source(name, fields, ignore).rows
        return Rows(rows[:count], rows.place)
    check_source(name, fields)
    form = Prompt(f"data.sources.{name}.prompt", fields["prompt"])
    reader = _row_reader(name, fields, ignore)
    found = list(
        itertools.islice(builder.read_rows([fields["path"]], reader, fields["split"]), count)
    )
    rows = Rows([form.conversation(row) for _, row in found], lambda number: found[number][0])
    _check_any(name, fields, rows)
    return rows


def open_path(path: str | Path, reader: RowReader, split: str = "train") -> Source:
    """The rows of a built data set, or of a file, folder or name that `data.files` reads.

    Raises:
      UserError: nothing readable is there, or a row cannot be used.
    """
    if builder.is_built(path):
        built = builder.open_rows(path, reader, split)
        # Every row is read once for a digest of its own, which counts what is left out.
        digest = _digest(built) if reader.changes else builder.content_digest(path)
        return Source(built, digest, Counter(reader.ignored), built=True)
    found, places = [], []
    for place, row in builder.read_rows([path], reader, split):
        found.append(row)
        places.append(place)
    reader.check_columns()
    return Source(Rows(found, places.__getitem__), _digest(found), reader.ignored)


def check_source(name: str, fields: Mapping[str, Any]) -> None:
    """What can be said against a source before it is read.

    Raises:
      UserError: an unknown reader, no file at `path`, or a path with a reader that takes none.
    """
    where, path, reader = f"data.sources.{name}", fields["path"], fields["reader"]
    if reader == "rows":
        if not path:
            raise UserError(f"{where}.path is empty; name a file or a built data set")
        if not is_name(path) and not exists(path):
            raise UserError(f"{where}.path: there is no file or folder '{path}'")
    elif reader.partition(":")[0] not in {*_DEMO, *medical.SETS}:
        known = ", ".join(["rows", *_DEMO, *medical.SETS])
        raise UserError(f"{where}.reader: '{reader}' is none of {known}")
    elif path:
        raise UserError(f"{where}: reader '{reader}' takes no path")
    if fields["window"] and (reader != "rows" or builder.is_built(path)):
        what = "a built data set" if reader == "rows" else f"reader '{reader}'"
        raise UserError(f"{where}.window: {what} is not streamed; leave it out")


def _digest(rows: Sequence[Conversation]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
