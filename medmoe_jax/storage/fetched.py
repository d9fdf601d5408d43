"""Copies on this machine's disk of what lies on object storage, for readers that need a file.

    CACHE/objects/DIGEST/NAME    a file or folder; DIGEST tells the names, sizes and hashes it had
    CACHE/objects/DIGEST.lock    held by every process that uses it

A copy is renamed into place once it is whole. Those not in use make room for new ones, the longest
unused first, so that all of them stay under $MEDMOE_CACHE_GB gigabytes.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from medmoe_jax.errors import StorageError, UserError, bad_or_lost
from medmoe_jax.storage import objects
from medmoe_jax.storage.objects import Listed
from medmoe_jax.storage.places import cache_folder, is_remote, local, place

_LIMIT = 100.0  # gigabytes, where $MEDMOE_CACHE_GB says nothing else
# Locks of the copies that this process uses; the system gives them back at its end.
_held: dict[Path, IO] = {}


def fetched(path: str | os.PathLike, field: str = "", beside: Sequence[str] = ()) -> Path:
    """A path that can be opened here: itself, or a copy of what lies on object storage.

    Args:
      path: of a file or folder.
      field: the option or field it stands in, for messages.
      beside: patterns of files that come along from the folder of a single file.

    Raises:
      UserError: the scheme is not supported, nothing is there, or the cache cannot hold it.
      StorageError: it cannot be reached, or changes while it is copied.
    """
    if not is_remote(path):
        return local(path, field)
    source = place(path, field)
    try:
        return _copy(source, beside)
    except objects.failures() as error:
        raise StorageError(f"{source}: cannot be read: {error}") from error


def _copy(source: Path, beside: Sequence[str]) -> Path:
    found = objects.listing(source)
    if not found:
        raise UserError(f"{source}: there is no file or folder")
    folder = source
    if not found[0].name:  # a file
        folder = source.parent
        near = objects.listing(folder) if beside else found
        found = [one._replace(name=one.name or source.name) for one in near]
        wanted = (source.name, *beside)
        found = [one for one in found if any(fnmatch.fnmatchcase(one.name, p) for p in wanted)]
        found = [one for one in found if "/" not in one.name]
    for one in found:  # an object may have any name
        if {"", ".", ".."} & set(one.name.split("/")):
            raise UserError(f"{folder}: the object '{one.name}' has no name that a file can have")
    said = json.dumps([str(folder), found])
    digest = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
    cache = cache_folder() / "objects"
    entry = cache / digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _hold(entry, lambda: _bring(folder, found, entry))
        os.utime(entry)
    except OSError as error:
        message = f"{source}: no copy can be made in {cache}: {error}; make room there, or set"
        raise bad_or_lost(f"{message} XDG_CACHE_HOME", error) from error
    return entry / folder.name if folder == source else entry / folder.name / source.name


def _hold(entry: Path, bring: Callable[[], None]) -> None:
    """Keep an entry from being removed while this process lives; `bring` makes it if absent."""
    if entry in _held and entry.is_dir():
        return
    lock = open(entry.with_name(f"{entry.name}.lock"), "a")  # noqa: SIM115
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if entry.is_dir():
            _held[entry] = lock
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not entry.is_dir():
            bring()


def _bring(folder: Path, found: Sequence[Listed], entry: Path) -> None:
    """Copy these objects of a folder into a new entry, which appears whole or not at all."""
    _make_room(entry.parent, sum(one.size for one in found), str(folder))
    files, partial = objects.system(folder), entry.with_name(f"{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        for one in found:
            path = partial / folder.name / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(str(folder / one.name), str(path))
            info = files.info(str(folder / one.name))
            if path.stat().st_size != one.size or objects.tag_of(info) != one.tag:
                raise StorageError(
                    f"{folder / one.name}: changed while it was copied; start again when it is "
                    "whole"
                )
        partial.rename(entry)
    except FileNotFoundError as error:
        raise StorageError(f"{folder}: {error} is gone; start again when it is whole") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_room(cache: Path, needed: int, what: str) -> None:
    """Remove copies that nobody uses, the longest unused first, until there is room."""
    given = os.environ.get("MEDMOE_CACHE_GB", "")
    try:
        limit = float(given or _LIMIT) * 1e9
    except ValueError:
        raise UserError(f"$MEDMOE_CACHE_GB is '{given}'; give a number of gigabytes") from None
    entries = sorted((p for p in cache.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    sizes = {entry: _size(entry) for entry in entries}
    total = needed + sum(sizes.values())
    for entry in entries:
        if total <= limit:
            return
        with open(entry.with_name(f"{entry.name.removesuffix('.partial')}.lock"), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(entry)
            total -= sizes[entry]
    if total > limit:
        raise UserError(
            f"{what}: its copy of {needed / 1e9:.2f} GB, with the copies in use, is more than the "
            f"{limit / 1e9:g} GB that {cache} may hold; set MEDMOE_CACHE_GB higher"
        )


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
