"""Object storage: lists, whole objects, and objects that are made once.

An object appears whole or not at all, so that a write that is cut short leaves the one before, or
none. There are no folders: a folder is what the names of objects begin with.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax.errors import StorageError
from medmoe_jax.storage.places import is_remote, scheme_of

# Errors of the packages below that are no OSError: no way to the storage, or no right to use it.
_FAILURES = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "requests.exceptions": ("RequestException",),
}
_BEAT = "beat"


class Listed(NamedTuple):
    """An object in a folder: its name there, its size in bytes, and what tells its content."""

    name: str
    size: int
    tag: str


def failures() -> tuple[type[Exception], ...]:
    """What the packages that are imported raise where storage cannot be reached or used."""
    found = ((sys.modules.get(module), names) for module, names in _FAILURES.items())
    return tuple(getattr(module, name) for module, names in found if module for name in names)


@contextlib.contextmanager
def reached(path: Path) -> Generator[None]:
    """Raises StorageError in place of what the packages raise where storage cannot be reached."""
    try:
        yield
    except failures() as error:
        raise StorageError(f"{path}: cannot be reached, or not used: {error}") from error


def system(path: Path) -> Any:
    """fsspec's file system of a place on object storage."""
    import fsspec

    return fsspec.filesystem("gcs" if scheme_of(path) == "gs" else scheme_of(path))


def tag_of(info: Mapping[str, Any]) -> str:
    """What tells an object's content, where storage says it: a hash, or S3's ETag."""
    return str(info.get("ETag") or info.get("md5Hash") or info.get("crc32c") or info.get("etag"))


def listing(path: Path) -> list[Listed]:
    """The object at a path, or all those in the folder there, by name; empty if there is none."""
    files, whole = system(path), str(path).partition("://")[2].rstrip("/")
    try:
        with reached(path):
            found = files.find(str(path), detail=True)
    except FileNotFoundError:  # no such bucket
        return []
    if whole in found:
        return [Listed("", found[whole]["size"], tag_of(found[whole]))]
    return sorted(
        Listed(name.removeprefix(f"{whole}/"), info["size"], tag_of(info))
        for name, info in found.items()
        if not name.endswith("/") and name.startswith(f"{whole}/")
    )


def write(path: Path, content: bytes) -> None:
    """Replace an object, or make it: at any time the old one is there, or the new one."""
    with reached(path):
        system(path).pipe_file(str(path), content)


def create(path: Path, content: bytes) -> bool:
    """Make an object that is not there; of several who try, one alone makes it.

    Args:
      path: its place.
      content: unlike any other, so that an answer which was lost on its way does no harm.

    Returns:
      Whether this call has made it.
    """
    try:
        with reached(path):
            system(path).pipe_file(str(path), content, mode="create")
    except FileExistsError:
        return read(path) == content
    return True


def read(path: Path) -> bytes | None:
    """An object's content; None where it is not there."""
    try:
        with reached(path):
            return system(path).cat_file(str(path))
    except FileNotFoundError:
        return None


def open_same(path: Path, tag: str) -> Any:
    """An object opened for reading. Raises StorageError where its content is not that of `tag`."""
    file = system(path).open(str(path), "rb")
    if tag_of(file.details) != tag:
        file.close()
        raise StorageError(f"{path}: is not what it was when it was listed; start again")
    return file


def touch(path: Path) -> None:
    """Give a sign of life, which `beat_of` shows. Raises FileNotFoundError where it is gone."""
    files, beat = system(path), {_BEAT: str(time.time_ns())}
    change = files.setxattrs if scheme_of(path) == "gs" else files.setxattr
    with reached(path):
        change(str(path), **beat)


def beat_of(path: Path) -> int:
    """The last sign of life in ns, by the clock of who gave it; 0 where there was none yet."""
    files = system(path)
    try:
        with reached(path):
            if scheme_of(path) == "gs":
                told = files.info(str(path)).get("metadata", {})
            else:
                told = files.metadata(str(path))
    except FileNotFoundError:
        return 0
    return int(told.get(_BEAT, 0))


def remove(path: Path) -> None:
    """Remove an object; one that is not there is none the worse."""
    with reached(path), contextlib.suppress(FileNotFoundError):
        system(path).rm_file(str(path))


def remove_folder(path: Path) -> None:
    """Remove all objects in a folder."""
    for one in listing(path):
        remove(path / one.name)


def upload(folder: Path, to: Path) -> None:
    """Copy a folder of this machine's disk to object storage."""
    for name, path in files_below(folder):
        upload_file(path, to / name)


def upload_file(path: Path, to: Path) -> None:
    """Copy a file of this machine's disk to object storage, where it appears whole."""
    with reached(to):
        system(to).put_file(str(path), str(to))


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields `(name in the folder, path)` of all files, wherever the folder lies."""
    if is_remote(folder):
        yield from ((one.name, folder / one.name) for one in listing(folder) if one.name)
    else:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        yield from ((str(path.relative_to(folder)), path) for path in found)


def size_of(path: Path) -> int:
    """A file's size in bytes. Raises FileNotFoundError."""
    return system(path).size(str(path)) if is_remote(path) else path.stat().st_size


class Grown:
    """An object that grows: kept in memory, and written whole when it is brought to storage."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Begin with some content, of which nothing is written yet."""
        self._path, self._content, self._new, self.closed = path, bytearray(content), True, False

    def write(self, content: bytes) -> None:
        """Add to the end."""
        self._content += content
        self._new = True

    def sync(self) -> None:
        """Write it where that is not done. Raises StorageError."""
        try:
            if self._new:
                write(self._path, bytes(self._content))
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error}") from error
        self._new = False

    def close(self) -> None:
        """Write it, and take nothing more."""
        self.sync()
        self.closed = True
