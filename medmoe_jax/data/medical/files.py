"""Reading files strictly: a corrupt file is a `UserError` that names the file and the line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.data.separators import check_separator
from medmoe_jax.errors import UserError, bad_or_lost
from medmoe_jax.storage.packed import damage_named, gunzip, open_zip
from medmoe_jax.storage.places import is_hidden

REPAIR = "restore the file from its source"
# What openpyxl raises where the XML inside says something that no sheet can.
_SHEET_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, SyntaxError, LookupError, ValueError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError, OSError),
)
Records = Iterator[tuple[str, dict]]  # `(where, record)`; `where` is `path:line` or the like


def read_bytes(path: Path) -> bytes:
    """The whole file, gunzipped where its name ends in .gz."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REPAIR}, or set $MEDMOE_DATA")
    return gunzip(path) if path.suffix == ".gz" else path.read_bytes()


def decode(raw: bytes, where: object) -> str:
    """UTF-8 text that is not empty, with plain line ends."""
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{where}:{line}: not UTF-8 text; {REPAIR}") from error
    if not text.strip():
        raise UserError(f"{where}: the file is empty; {REPAIR}")
    return text


def read_text(path: Path) -> str:
    """The whole file as UTF-8, gunzipped where its name ends in .gz."""
    return decode(read_bytes(path), path)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """`(where, line)` of every line that is not blank; `where` is `path:number`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_columns(path: Path, columns: Sequence[str]) -> Records:
    """Records of a tab-separated file with these columns; a first line that names them is none.

    columns: without any, the first line names them.
    """
    for where, line in read_lines(path):
        fields = line.split("\t")
        if not columns:
            columns = _names(fields, "\t", where)
        _check_width(fields, columns, "\t", where)
        if not _is_header(fields, columns):
            yield where, dict(zip(columns, fields, strict=True))


def read_jsonl(text: str, path: object) -> Records:
    """Records of JSON Lines."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(parse_json(line, where), where)


def read_json(text: str, path: object, root: str = "") -> Records:
    """Records of a JSON file: a list, an object of objects, or lines of JSON.

    root: where in the file they lie, such as `exams.*.data`; `*` stands for every key. A record of
    an object of objects has its key as `_key`.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if not root and all(line.lstrip().startswith("{") for line in lines[:2]):
        first = parse_json(text, path) if len(lines) == 1 else {}
        if not all(isinstance(value, dict) for value in first.values()) or len(lines) > 1:
            yield from read_jsonl(text, path)
            return
    found = [("", parse_json(text, path))]
    for key in root.split(".") if root else []:
        found = [
            pair for at, value in found for pair in _inside(_object(value, f"{path}{at}"), key, at)
        ]
        if not found:
            raise UserError(f"{path}: there is no {root!r} in it; {REPAIR}")
    for at, value in found:
        yield from _records(value, f"{path}{': ' if at else ''}{at}")


def _inside(value: dict, key: str, at: str) -> list:
    if key == "*":
        return [(f"{at} {name}", inner) for name, inner in value.items()]
    return [(at, value[key])] if key in value else []


def _records(value, where: str) -> Records:
    if isinstance(value, list):
        pairs = [(f"{where}: record {i}", record) for i, record in enumerate(value, 1)]
    elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        pairs = [(f"{where}: record {k}", {"_key": k, **v}) for k, v in value.items()]
    else:
        raise UserError(f"{where}: neither a list nor an object of records; {REPAIR}")
    for at, record in pairs:
        yield at, _object(record, at)


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; {REPAIR}")
    return value


def parse_json(text: str, where: object) -> Any:
    """What a JSON text holds."""
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        line = getattr(error, "lineno", 1)
        place = where if ":" in str(where).rpartition("/")[2] else f"{where}:{line}"
        raise UserError(f"{place}: not JSON ({getattr(error, 'msg', error)}); {REPAIR}") from error


def read_csv(text: str, path: object, columns: Sequence[str] = (), delimiter: str = ",") -> Records:
    """Records of a CSV file.

    columns: of a file without header; where its first row is a header after all, that holds.
    """
    rows = _csv_rows(text, path, delimiter)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: the file is empty; {REPAIR}")
    where, fields = first
    if columns and not _is_header(fields, columns):
        header = list(columns)
        rows = iter([first, *rows])
    else:
        header = _names(fields, delimiter, where)
    for where, fields in rows:
        _check_width(fields, header, delimiter, where)
        yield where, dict(zip(header, fields, strict=True))


def _names(fields: Sequence[str], sign: str, where: str) -> list[str]:
    """The names of columns in a first line. Raises UserError where two have one name."""
    check_separator(fields, sign, where)
    names = [field.strip() for field in fields]
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise UserError(f"{where}: {twice[0]!r} is the name of two columns; rename one")
    return names


def _check_width(fields: Sequence[str], columns: Sequence[str], sign: str, where: str) -> None:
    """Raise UserError for a row that has more or fewer columns than there are."""
    if len(fields) != len(columns):
        check_separator(fields, sign, where, len(columns))
        raise UserError(
            f"{where}: {len(fields)} columns instead of {len(columns)} ({', '.join(columns)}); "
            f"quote cells of a .csv that hold its separator, or {REPAIR}"
        )


def _is_header(fields: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether a first row names columns: some field is the name of one, in any case."""
    names = {name.casefold() for name in columns if len(name) > 1}
    return any(field.strip().casefold() in names for field in fields)


def _csv_rows(text: str, path: object, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text), strict=True, delimiter=delimiter)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield f"{path}:{reader.line_num}", fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); {REPAIR}") from error


def read_parquet(path: Path) -> Records:
    """Records of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise bad_or_lost(f"{path}: not a whole Parquet file ({error}); {REPAIR}", error) from error


def read_xlsx(path: Path) -> Records:
    """Records of the first sheet of an Excel file, whose first row names the columns."""
    with open_zip(path, "Excel file"):  # its members are looked at before any is unpacked
        pass
    rows = _sheet_rows(path)
    header = [str(name or "").strip() for name in next(rows, ())]
    for number, fields in enumerate(rows, 2):
        if any(field not in (None, "") for field in fields):
            yield f"{path}: row {number}", dict(zip(header, fields, strict=False))


def _sheet_rows(path: Path) -> Iterator[tuple]:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with contextlib.closing(
            openpyxl.load_workbook(path, read_only=True, data_only=True)
        ) as book:
            if not book.worksheets:
                raise UserError(f"{path}: there is no sheet in it; {REPAIR}")
            yield from book.worksheets[0].iter_rows(values_only=True)
    except UserError:
        raise
    except (*_SHEET_FAULTS, InvalidFileException) as error:
        raise UserError(f"{path}: not a whole Excel file ({error}); {REPAIR}") from error


def parse_xml(text: str | bytes, where: object) -> ET.Element:
    """The root element of an XML text."""
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise UserError(f"{where}:{error.position[0]}: not XML ({error}); {REPAIR}") from error
    except (ValueError, LookupError) as error:  # an encoding that is not known
        raise UserError(f"{where}: not XML ({error}); {REPAIR}") from error


def members(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """`(where, bytes)` of the files with a suffix in a zip file or a folder, sorted."""
    if path.is_dir():
        for file in sorted(path.rglob(f"*{suffix}")):
            if file.is_file() and not is_hidden(file.relative_to(path)):
                yield str(file), file.read_bytes()
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REPAIR}, or set $MEDMOE_DATA")
    with open_zip(path) as archive:
        names = (n for n in archive.namelist() if n.endswith(suffix) and not is_hidden(n))
        for member in sorted(names):
            where = f"{path}!{member}"
            with damage_named(where, "member of a zip file"):
                content = archive.read(member)
            yield where, content
