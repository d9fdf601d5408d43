"""Rows of tables, each with its place: CSV and TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from medmoe_jax.data.separators import check_separator
from medmoe_jax.errors import UserError, bad_or_lost

Rows = Iterator[tuple[str, dict[str, Any]]]
_LARGEST_CELL = 1 << 30  # characters; Python's own limit is 131,072


def csv_rows(text: TextIO, shown: str, separator: str) -> Rows:
    """Yields `(file and line, row)` of a table of text with a header, without its empty rows.

    A column without a name, as pandas writes its index, is called what pandas and `datasets` call
    it: `Unnamed: 0` at the first place. Raises UserError for a header with a name twice or other
    signs between its names, and for a row of another width.
    """
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(text, delimiter=separator, strict=True)
    before = 0
    try:
        names = next(reader, [])
        check_separator(names, separator, f"{shown}, line 1")
        header = [name or f"Unnamed: {number}" for number, name in enumerate(names)]
        if len(set(header)) < len(header):
            raise UserError(
                f"{shown}, line 1: every column needs a name of its own, found {', '.join(header)}"
            )
        before = reader.line_num
        for cells in reader:
            where, before = f"{shown}, line {before + 1}", reader.line_num
            if not any(cells):
                continue
            if len(cells) != len(header):
                check_separator(cells, separator, where, len(header))
                raise UserError(
                    f"{where}: {len(cells)} cells under {len(header)} names of columns; quote "
                    "cells that hold the separator or a line break"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{shown}, line {before + 1}: not a table of text ({error})") from error


def parquet_rows(path: Path, shown: str) -> Rows:
    """Yields `(file and row, row)` of a Parquet file; rows count from 0."""
    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(), shown)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise bad_or_lost(
            f"{shown}: not a Parquet file that can be read ({error})", error
        ) from error


def arrow_rows(path: Path, shown: str) -> Rows:
    """Yields `(file and row, row)` of an Arrow file or stream; rows count from 0."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                batches = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _numbered(batches, shown)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise bad_or_lost(
            f"{shown}: not an Arrow file that can be read ({error})", error
        ) from error


def _numbered(batches, shown: str) -> Rows:
    number = 0
    for batch in batches:
        for row in batch_rows(batch, shown):
            yield f"{shown}, row {number}", row
            number += 1


def batch_rows(batch: pa.RecordBatch, shown: str) -> list[dict[str, Any]]:
    """The rows of a part of a Parquet or Arrow file.

    Arrow gives every object of a column the keys of all of them, null where an object lacks one.
    So keys inside a row's values that are null are left out.

    Args:
      batch: the part.
      shown: the file's name.

    Raises:
      UserError: two columns, or two keys of an object, have one name.
      ArrowException: it is damaged.
    """
    _check_names(batch.schema, shown)
    batch.validate(full=True)  # lengths that a damaged file gives are believed otherwise
    return [
        {name: _without_nulls(value) for name, value in row.items()} for row in batch.to_pylist()
    ]


def _check_names(fields: Iterable[pa.Field], shown: str, column: str = "") -> None:
    """Raise UserError where two fields have one name; `column` is the one that holds them."""
    seen = set()
    for field in fields:
        if field.name in seen:
            of = f"an object of column {column!r}" if column else "its columns"
            raise UserError(f"{shown}: the name {field.name!r} stands twice in {of}; remove one")
        seen.add(field.name)
        kind = field.type  # of a list or an object: with the fields of what it holds
        inner = (kind.field(number) for number in range(kind.num_fields))
        _check_names(inner, shown, column or field.name)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
