"""Files that are read in blocks, any block at any time, so that no file has to fit into memory.

A block is a range of bytes of a file of JSON lines, or of rows of a row group of a Parquet file.
Files lie on this machine, on the Hugging Face hub or on object storage, of which only the ranges
that are asked for are brought.

Axis legend: S data shards.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medmoe_jax import json_text
from medmoe_jax.data import hub
from medmoe_jax.data.files import local_files
from medmoe_jax.data.json_items import decode_line
from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.data.tables import batch_rows
from medmoe_jax.errors import UserError, bad_or_lost
from medmoe_jax.storage import objects
from medmoe_jax.storage.places import is_remote, place

LINES, PARQUET = (".jsonl", ".ndjson"), ".parquet"
ENDINGS = (*LINES, PARQUET)
BLOCK_BYTES = 1 << 20
# Fewer bytes of lines are not cut for a shard to have a part of its file: they may be one row.
_FEW_BYTES = 1 << 14
# As many blocks a shard as give it rows of most files; more of them skip more of a row group.
_OF_SHARD = 16
_READ_BYTES = 1 << 20
_READ_ROWS = 256


@dataclass(frozen=True)
class File:
    """A file whose ranges can be read.

    Attributes:
      shown: its name for messages.
      open: opens it.
      size: in bytes.
      digest: gives a hash of its content.
    """

    shown: str
    open: Callable[[], io.RawIOBase]
    size: int
    digest: Callable[[], str]


@dataclass(frozen=True)
class Block(ABC):
    """Rows of a file that are read together: those from `start` up to `stop`."""

    file: File
    start: int
    stop: int

    @abstractmethod
    def read(self) -> Sequence[Any]:
        """The rows as they stand in the file. Raises UserError."""

    @abstractmethod
    def decode(self, row: Any) -> Any:
        """A row's item (`data.rows`). Raises UserError that begins with its place."""

    @abstractmethod
    def place(self, row: Any) -> str:
        """The file and the line or number of a row."""


@dataclass(frozen=True)
class Lines(Block):
    """The lines of a file that begin from byte `start` up to byte `stop`."""

    def read(self) -> Sequence[tuple[int, bytes]]:
        """`(first byte, line)` of each that is not empty."""
        found = []
        buffer = min(_READ_BYTES, max(self.stop - self.start, io.DEFAULT_BUFFER_SIZE))
        with io.BufferedReader(self.file.open(), buffer) as file:
            at = self.start
            if at:  # a line that begins before belongs to the block before
                file.seek(at - 1)
                at += len(file.readline()) - 1
            while at < self.stop and (line := file.readline()):
                if line.strip():
                    found.append((at, line))
                at += len(line)
        return found

    def decode(self, row: tuple[int, bytes]) -> Any:
        at, line = row
        try:
            text = line.decode("utf-8" if at else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place(row)}: {json_text.not_text(error)}") from error
        return decode_line(text, lambda: self.place(row))

    def place(self, row: tuple[int, bytes]) -> str:
        """The number of a line is counted when it is asked for."""
        number, left = 1, row[0]
        with self.file.open() as file:
            while left and (read := file.read(min(left, _READ_BYTES))):
                number, left = number + read.count(b"\n"), left - len(read)
        return f"{self.file.shown}, line {number}"


@dataclass(frozen=True)
class Group(Block):
    """Rows `start` up to `stop` of a row group of a Parquet file, whose first row is `first`."""

    metadata: pq.FileMetaData
    group: int
    first: int

    def read(self) -> Sequence[tuple[int, dict[str, Any]]]:
        """`(number in the file, row)`; a few rows at a time are in memory."""
        return _GroupRows(self)

    def decode(self, row: tuple[int, dict[str, Any]]) -> Any:
        return row[1]

    def place(self, row: tuple[int, dict[str, Any]]) -> str:
        return f"{self.file.shown}, row {row[0]}"

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows, read from the file as they are asked for. Raises UserError."""
        number = 0
        with self.file.open() as opened:
            file = self._tried(
                lambda: pq.ParquetFile(
                    opened,
                    metadata=self.metadata,
                    buffer_size=_READ_BYTES,
                    pre_buffer=False,  # which would bring a whole row group
                )
            )
            batches = file.iter_batches(_READ_ROWS, row_groups=[self.group])
            while number < self.stop and (batch := self._tried(lambda: next(batches, None))):
                skipped = max(0, self.start - number)
                asked = batch[skipped : self.stop - number]
                for row in self._tried(lambda asked=asked: batch_rows(asked, self.file.shown)):
                    yield self.first + number + skipped, row
                    skipped += 1
                number += len(batch)

    def _tried(self, step: Callable[[], Any]) -> Any:
        """What a step of reading gives. Raises UserError."""
        try:
            return step()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(self.file, error) from error


class _GroupRows(OnDemand[tuple[int, dict[str, Any]]]):
    """The rows of a group, fast where they are asked for in order."""

    def __init__(self, group: Group) -> None:
        self._group, self._rows, self._next = group, group.rows(), 0

    def __len__(self) -> int:
        return self._group.stop - self._group.start

    def item(self, index: int) -> tuple[int, dict[str, Any]]:
        if index < self._next:
            self._rows, self._next = self._group.rows(), 0
        for row in self._rows:
            self._next += 1
            if self._next > index:
                return row
        raise IndexError(f"row {index} of {len(self)}")


def open_files(path: str, split: str) -> list[File]:
    """The files of a path or of a name on the hub (`data.files`) that can be read in blocks.

    Raises:
      UserError: there are none, or one is of another kind.
    """
    if path.startswith(hub.TFDS):
        raise UserError(f"{path}: a data set of TensorFlow Datasets cannot be streamed")
    if path.startswith(hub.HUB):
        return [File(*found) for found in hub.remote_files(path, split, ENDINGS)]
    if is_remote(path):
        return list(_objects(place(path), split))
    files = []
    for file, shown in local_files(Path(path), split, ENDINGS):
        if not file.name.endswith(ENDINGS):
            raise UserError(
                f"{shown}: only files that end in {', '.join(ENDINGS)} can be streamed; leave out "
                "the source's window, or build a data set of it"
            )
        opens = functools.partial(io.FileIO, file)
        files.append(File(shown, opens, file.stat().st_size, functools.partial(_sha256, file)))
    return files


def _objects(path: Path, split: str) -> Iterator[File]:
    """The files of a path on object storage, which stay there."""
    found = {one.name: one for one in objects.listing(path)}
    if not found:
        raise UserError(f"{path}: there is no file or folder")
    names = list(found)
    if names != [""]:
        names = hub.choose_files(str(path), names, split, ENDINGS)
    elif split != "train" or not str(path).endswith(ENDINGS):
        raise UserError(
            f"{path}: has no splits, and only files that end in {', '.join(ENDINGS)} can be "
            "streamed"
        )
    for name in names:
        file, size, tag = path / name, found[name].size, found[name].tag
        opens = functools.partial(objects.open_same, file, tag)
        yield File(str(file), opens, size, functools.partial(str, tag))


def make_blocks(files: Sequence[File], shards: int) -> list[Block]:
    """All blocks of some files, in order, small enough for each of S shards to have its part.

    Raises:
      UserError: a file cannot be read.
    """
    tables = [file for file in files if file.shown.endswith(PARQUET)]
    metadata = {file.shown: _metadata(file) for file in tables}
    rows = sum(sum(_group_rows(one)) for one in metadata.values())
    size = sum(file.size for file in files if file.shown not in metadata)
    return [
        block
        for file in files
        for block in (
            _groups(file, metadata[file.shown], rows, shards)
            if file.shown in metadata
            else _lines(file, size, shards)
        )
    ]


def deal(blocks: Sequence[Block], shards: int) -> list[list[Block]]:
    """The blocks of each of S shards: of each kind of file equally many bytes or rows.

    A block goes to the shard with the most room left, so that each has rows of many files; what is
    too long for it goes to the next. Fewer than S blocks of a kind are cut more for it.
    """
    dealt: list[list[Block]] = [[] for _ in range(shards)]
    for kind in dict.fromkeys(map(type, blocks)):
        own = [block for block in blocks if type(block) is kind]
        total = sum(block.stop - block.start for block in own)
        # What a shard has less than its part, so that the first of the heap has the most room.
        lacking = [(total * n // shards - total * (n + 1) // shards, n) for n in range(shards)]
        heapq.heapify(lacking)
        for block in own:
            start = block.start
            while start < block.stop:
                less, shard = lacking[0]
                stop = min(block.stop, start - less)
                dealt[shard].append(replace(block, start=start, stop=stop))
                heapq.heapreplace(lacking, (less + stop - start, shard))
                start = stop
    return dealt


def _lines(file: File, size: int, shards: int) -> Iterator[Lines]:
    with file.open() as opened:
        if opened.read(_READ_ROWS).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise UserError(f"{file.shown}: is one JSON list; write one object a line to stream it")
    parts = min(_parts(file.size, size, shards), file.size // _FEW_BYTES)
    for start, stop in _cuts(file.size, max(parts, -(-file.size // BLOCK_BYTES))):
        yield Lines(file, start, stop)


def _groups(file: File, metadata: pq.FileMetaData, rows: int, shards: int) -> Iterator[Group]:
    first = 0
    for number, own in enumerate(_group_rows(metadata)):
        for start, stop in _cuts(own, _parts(own, rows, shards)):
            yield Group(file, start, stop, metadata, number, first)
        first += own


def _group_rows(metadata: pq.FileMetaData) -> list[int]:
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def _parts(own: int, total: int, shards: int) -> int:
    """In how many blocks to cut so much of all that the shards have: at most one for each."""
    return min(shards, -(-own * _OF_SHARD * shards // max(1, total)))


def _cuts(length: int, parts: int) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of equal parts, without those that are empty."""
    parts = max(1, parts)
    ends = (length * part // parts for part in range(parts + 1))
    return ((start, stop) for start, stop in itertools.pairwise(ends) if start < stop)


def _metadata(file: File) -> pq.FileMetaData:
    try:
        with file.open() as opened:
            return pq.read_metadata(opened)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: File, error: Exception) -> UserError:
    return bad_or_lost(f"{file.shown}: not a Parquet file that can be read ({error})", error)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
