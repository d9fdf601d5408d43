"""Reading files strictly: a corrupt file is a `UserError` that names the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from medmoe_jax.errors import UserError

REPAIR = "restore the file from its source"


def read_text(path: Path) -> str:
    """The whole file as UTF-8, gunzipped where its name ends in .gz."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REPAIR}, or set $MEDMOE_DATA")
    raw = path.read_bytes()
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); {REPAIR}") from error
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; {REPAIR}") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """`(where, line)` of every line that is not blank; `where` is `path:number`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_columns(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """`(where, fields)` of a tab-separated file with a fixed number of columns."""
    for where, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != columns:
            raise UserError(f"{where}: {len(fields)} columns instead of {columns}; {REPAIR}")
        yield where, fields


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """`(where, object)` of a JSON Lines file."""
    for where, line in read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); {REPAIR}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; {REPAIR}")
        yield where, record


def read_json(path: Path) -> list | dict:
    """A JSON file with one list or object."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); {REPAIR}") from error


def read_table(path: Path, columns: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """`(where, fields)` of a CSV file without header; `columns` each, where given."""
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if columns is not None and len(fields) != columns:
                raise UserError(f"{where}: {len(fields)} columns instead of {columns}; {REPAIR}")
            yield where, fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); {REPAIR}") from error


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`(where, record)` of a CSV file whose first row names the columns."""
    rows = read_table(path)
    _, header = next(rows, ("", []))
    for where, fields in rows:
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} columns instead of {len(header)}; {REPAIR}")
        yield where, dict(zip(header, fields, strict=True))


def parse_xml(text: str | bytes, where: str) -> ET.Element:
    """The root element of an XML text."""
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise UserError(f"{where}:{error.position[0]}: not XML ({error}); {REPAIR}") from error


def read_zip(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """`(where, bytes)` of the members of a zip file whose names end in `suffix`, sorted."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REPAIR}, or set $MEDMOE_DATA")
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(n for n in archive.namelist() if n.endswith(suffix)):
                yield f"{path}!{member}", archive.read(member)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole zip file ({error}); {REPAIR}") from error


def need(record: dict, field: str, where: str):
    """`record[field]`; an absent or empty field is an error that names it."""
    value = record.get(field) if isinstance(record, dict) else None
    if value is None or value == "":
        raise UserError(f"{where}: field {field!r} is missing; {REPAIR}")
    return value


def one_of(value: str, allowed, field: str, where: str) -> str:
    """`value` where it is one of `allowed`; an error that names field and file otherwise."""
    if value not in allowed:
        raise UserError(f"{where}: {field} {value!r} is not one of {sorted(allowed)}; {REPAIR}")
    return value
