"""Where Orbax reads and writes a folder: in its own place, or beside it, on this machine's disk.

Orbax knows disks and gs:// (and writes a file there that says a folder is whole), but no s3://. A
folder for s3:// is written and sealed on this machine's disk and then copied, its seal last; what
is read of it is copied to the user's cache first. One process alone can do so.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path

from medmoe_jax.checkpoints.seals import SEAL
from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes
from medmoe_jax.storage import objects
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import absolute, scheme_of

# Where Orbax can write, and the signs of a path that it takes there for more than a part of a name.
_ORBAX = {"": "*?[\\", "gs": "*?[\\#"}


def is_staged(folder: Path) -> bool:
    """Whether Orbax cannot use a folder where it is."""
    return scheme_of(folder) not in _ORBAX


def check_processes(folder: Path) -> None:
    """Raise UserError where a folder is to be written by several processes and cannot be."""
    if is_staged(folder) and processes.count() > 1:
        raise UserError(
            f"{folder}: several processes cannot write checkpoints to {scheme_of(folder)}://; use "
            "gs:// or a disk that all of them see"
        )


def check_signs(folder: Path) -> None:
    """Raise UserError where Orbax would not write to the path that a folder has.

    It finds what each process wrote by a pattern that begins with the path: in `run[1]` it finds
    nothing and leaves a checkpoint that nobody can read, in `run*` it finds that of `run2` as well.
    TensorStore ends a path on gs:// at `?` and `#`.
    """
    field, path = "workdir", absolute(folder)
    if is_staged(folder):
        field, path = "TMPDIR", absolute(Path(tempfile.gettempdir()))
    signs = _ORBAX[scheme_of(path)]
    if found := next((sign for sign in signs if sign in str(path)), ""):
        raise UserError(
            f"{field}: '{path}' has the sign {found}, with which checkpoints cannot be written; "
            f"give a path without any of {' '.join(signs)}"
        )


def readable(folder: Path) -> Path:
    """A folder with the same files that Orbax can read. Raises UserError, StorageError."""
    return fetched(folder) if is_staged(folder) else folder


@contextlib.contextmanager
def written(folder: Path) -> Generator[Path]:
    """Where Orbax can write what is to stand in a folder; `publish` brings it there."""
    if not is_staged(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="medmoe-") as there:
        yield Path(there) / folder.name


def publish(source: Path, folder: Path) -> None:
    """Bring a sealed folder from where it was written to its place, its seal last.

    Raises:
      StorageError, OSError: it cannot be written; there is no seal then.
    """
    if source == folder:
        return
    discard(folder)
    for name, path in objects.files_below(source):
        if name != SEAL:
            objects.upload_file(path, folder / name)
    objects.upload_file(source / SEAL, folder / SEAL)


def discard(folder: Path) -> None:
    """Remove a folder of object storage, its seal first."""
    objects.remove(folder / SEAL)
    objects.remove_folder(folder)
