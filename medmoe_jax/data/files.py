"""Items of data files of every kind, each with the place it stands at.

.json .jsonl .ndjson .csv .tsv   also with .gz or .zst behind
.parquet .arrow
a folder of such files, one that `datasets` has saved, or one of its splits
hf://datasets/ORG/NAME, tfds://NAME
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import zstandard

from medmoe_jax import json_text
from medmoe_jax.data import hub, tables
from medmoe_jax.data.json_items import json_items
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import fits
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.packed import Bounded
from medmoe_jax.storage.places import check_utf8, is_remote
from medmoe_jax.storage.plain import check_name, read_settings

Items = Iterator[tuple[str, Any]]
_TEXT: dict[str, Callable[[TextIO, str], Items]] = {
    ".json": json_items,
    ".jsonl": json_items,
    ".ndjson": json_items,
    ".csv": functools.partial(tables.csv_rows, separator=","),
    ".tsv": functools.partial(tables.csv_rows, separator="\t"),
}
_TABLES: dict[str, Callable[[Path, str], Items]] = {
    ".parquet": tables.parquet_rows,
    ".arrow": tables.arrow_rows,
}
_PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": lambda file: _Zstd(file),
}
_BLOCK = 1 << 12  # of zstd, which can make 100 MB of it
ENDINGS = (*(kind + packed for kind in _TEXT for packed in _PACKED), *_TABLES)
# Files of a folder that `datasets` has saved: of one split, and of several.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def read_items(path: str | Path, split: str = "train") -> Items:
    """Yields `(place, decoded item)` of a file, folder or named data set.

    Args:
      path: see the module.
      split: of a data set that has several.

    Raises:
      UserError: there is no such file, or an item cannot be decoded; names file and line or row.
    """
    if str(path).startswith(hub.TFDS):
        yield from hub.tfds_rows(str(path), split)
    elif str(path).startswith(hub.HUB):
        for file, shown in hub.hub_files(str(path), split, ENDINGS):
            yield from _file_items(file, shown)
    else:
        here = fetched(path)
        named = str(path) if is_remote(path) else str(here)
        for file, shown in local_files(here, split, ENDINGS):
            yield from _file_items(file, shown.replace(str(here), named, 1))


def local_files(path: Path, split: str, endings: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yields `(file, its name)` of a file, or of those of a folder that hold a split.

    Args:
      path: of the file or folder.
      split: of a folder that has several.
      endings: of the files of a folder that can be read.

    Raises:
      UserError: there is no such split.
    """
    if path.is_dir():
        yield from _folder_files(path, split, endings)
    elif split != "train":
        raise UserError(f"{path}: a file has no splits, so there is no '{split}' in it")
    else:
        yield path, str(path)


def _folder_files(folder: Path, split: str, endings: Sequence[str]) -> Iterator[tuple[Path, str]]:
    if (folder / _SPLITS).is_file():
        splits = _saved(folder / _SPLITS, "splits", list[str])
        if split not in splits:
            raise UserError(f"{folder}: has no split '{split}'; it has {', '.join(splits)}")
        folder = folder / split
    if (folder / _STATE).is_file():
        listed = _saved(folder / _STATE, "_data_files", list[dict[str, str]])
        files = [entry.get("filename", "") for entry in listed]
        for name in files:
            check_name(name, folder / _STATE)
    else:
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        files = hub.choose_files(str(folder), names, split, endings)
    for name in files:
        check_utf8(str(folder / name))
        yield folder / name, str(folder / name)


def _saved(path: Path, key: str, kind: Any) -> list:
    """The list under a key of what `datasets` has saved beside its files."""
    content = json_text.settings(read_settings(path), path)
    if not fits(content.get(key), kind):
        raise UserError(f"{path}: has no list '{key}'; save the data set again")
    return content[key]


def _file_items(path: Path, shown: str) -> Items:
    if not path.is_file():
        there = "is no ordinary file" if path.exists() else "no such file or folder"
        raise UserError(f"{shown}: {there}")
    if not path.name.endswith(ENDINGS):
        raise UserError(
            f"{shown}: unknown file ending; give a file that ends in "
            f"{', '.join(map(repr, ENDINGS))}"
        )
    if path.suffix in _TABLES:
        yield from _TABLES[path.suffix](path, shown)
        return
    packed = path.suffix if path.suffix in _PACKED else ""
    kind = _TEXT[Path(path.name.removesuffix(packed)).suffix]
    try:
        with _open(path, packed) as text:
            yield from kind(text, shown)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{shown}: not a complete gzip file ({error}); copy it again") from error
    except zstandard.ZstdError as error:
        raise UserError(f"{shown}: not a complete zstd file ({error}); copy it again") from error
    except UnicodeDecodeError:
        # The decoder knows a place in its buffer alone, so the file is read again, line by line.
        with _content(path, packed) as content:
            raise UserError(f"{shown}, {_not_text(content)}") from None


def _not_text(content: Iterable[bytes]) -> str:
    """The first line that is not UTF-8, by its number, and the byte."""
    for number, line in enumerate(content, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number}: {json_text.not_text(error)}"
    return "was changed while it was read; read it again"


@contextlib.contextmanager
def _open(path: Path, packed: str) -> Generator[TextIO]:
    """The text of a file; line breaks inside the cells of a table stay as they are."""
    newline = "" if {".csv", ".tsv"} & set(path.suffixes) else None
    with (
        _content(path, packed) as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text,
    ):
        yield text


@contextlib.contextmanager
def _content(path: Path, packed: str) -> Generator[BinaryIO]:
    """The bytes of a file, unpacked."""
    with open(path, "rb") as file:
        content = _PACKED[packed](file)
        if packed:
            content = io.BufferedReader(Bounded(content, path.stat().st_size, path))
        yield content


class _Zstd(io.RawIOBase):
    """The content of a zstd file, whose end must be there."""

    def __init__(self, file: BinaryIO):
        self._file, self._ready = file, b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            frame = self._frame
            ended = frame is None or frame.eof
            packed = (frame.unused_data if frame and ended else b"") or self._file.read(_BLOCK)
            if not packed and not ended:
                raise zstandard.ZstdError("it is cut short")
            if not packed:
                return 0
            if ended:
                self._frame = frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = frame.decompress(packed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
