"""What gzip and zip files hold, within limits: no small file unpacks into a huge one."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from medmoe_jax.errors import UserError
from medmoe_jax.storage.plain import check_plain

# Text packs to a tenth; what is larger than this many times its packed size, and than a gigabyte,
# was made to fill a disk or a memory.
RATIO, FREE = 200, 1 << 30
MEMBERS = 200_000
# What the libraries raise for damaged files.
_DAMAGE = (
    *(zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, KeyError, NotImplementedError, RuntimeError, ValueError, OverflowError),
)


@contextlib.contextmanager
def damage_named(where: object, what: str) -> Generator[None]:
    """Raises UserError, `where: not a whole …`, in place of what the libraries raise for damage."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{where}: not a whole {what}: truncated or damaged ({error})") from error
    except OSError as error:
        # EINVAL: an offset that no file has. Without a number: bz2's, of bytes and not of the disk.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(f"{where}: not a whole {what}: truncated or damaged ({error})") from error


def most_of(size: int) -> int:
    """The bytes that a packed file of this size may unpack into."""
    return max(FREE, RATIO * size)


class Bounded(io.RawIOBase):
    """An unpacking stream that ends in a UserError where it gives more than can be meant."""

    def __init__(self, stream: Any, size: int, shown: object) -> None:
        """`stream` has `read` and `close`; `size` is the packed file's, `shown` its name."""
        self._stream, self._left, self._shown = stream, most_of(size), shown

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._stream.read(len(buffer))
        self._left -= len(read)
        if self._left < 0:
            raise UserError(
                f"{self._shown}: unpacks into more than {RATIO} times its size; unpack it yourself "
                "if it is meant so"
            )
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        self._stream.close()
        super().close()


def gunzip(path: Path) -> bytes:
    """What a gzip file holds. Raises UserError for one that is damaged or holds too much."""
    size = path.stat().st_size
    with damage_named(path, "gzip file"), gzip.open(path) as file:
        return Bounded(file, size, path).readall() or b""


@contextlib.contextmanager
def open_zip(path: Path, what: str = "zip file") -> Generator[zipfile.ZipFile]:
    """A zip file whose members are neither encrypted nor too large together.

    Raises:
      UserError: it is none; names the file. What reading a member raises is for `damage_named`.
    """
    check_plain(path)
    with damage_named(path, what):
        archive = zipfile.ZipFile(path)
    with archive:
        members = archive.infolist()
        if len(members) > MEMBERS:
            raise UserError(f"{path}: {len(members):,} members, more than {MEMBERS:,}")
        for member in members:
            if member.flag_bits & 1:
                raise UserError(f"{path}!{member.filename}: is encrypted; unpack it yourself")
        # The library reads no more of a member than the directory says.
        if sum(member.file_size for member in members) > most_of(path.stat().st_size):
            raise UserError(
                f"{path}: unpacks into more than {RATIO} times its size; unpack it yourself if it "
                "is meant so"
            )
        yield archive
