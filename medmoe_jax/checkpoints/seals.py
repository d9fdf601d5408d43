"""Seals: a file in a folder that lists every other file there with its size and hash.

A seal is written after the folder is whole, so that damage is seen before anything is loaded: bit
flips would otherwise load as other numbers. It says what the folder belongs to as well.
"""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from medmoe_jax.checkpoints.fingerprint import file_fingerprint, file_mark
from medmoe_jax.checkpoints.records import read_record, write_record
from medmoe_jax.errors import UserError
from medmoe_jax.storage.objects import files_below, size_of

SEAL = "SEAL.json"
# Of Orbax: the folder that a process writes, and the file that joins those of all.
_OF_PROCESS, _JOINED = "ocdbt.process_", "manifest.ocdbt"


def seal(folder: Path, of: Mapping[str, Any]) -> str:
    """Write the seal of a folder; gives its fingerprint.

    Args:
      folder: whole.
      of: what it belongs to, JSON-able.

    Raises:
      FileNotFoundError: the folder holds no file.
      ValueError: Orbax did not join what each process wrote.
    """
    files = [(name, path) for name, path in files_below(folder) if path.name != SEAL]
    if not files:
        raise FileNotFoundError(f"{folder} is gone")  # an empty seal would vouch for nothing
    if part := _unjoined({PurePosixPath(name) for name, _ in files}):
        raise ValueError(f"{folder / part} is not joined to a whole: no {_JOINED} is beside it")
    marks = {name: file_mark(path) for name, path in files}
    return write_record(folder / SEAL, {"of": dict(of), "files": marks})


def _unjoined(files: Collection[PurePosixPath]) -> PurePosixPath | None:
    """A folder of one process that cannot be read; Orbax may leave it so without an error."""
    whole = {file.parent for file in files if file.name == _JOINED}
    parts = (one for file in files for one in file.parents if one.name.startswith(_OF_PROCESS))
    return next((part for part in parts if part.parent not in whole), None)


def read_seal(folder: Path) -> tuple[dict[str, Any], str]:
    """What a folder belongs to, and its seal's fingerprint. Raises RecordError."""
    content, fingerprint = read_record(folder / SEAL, "of", "files")
    return content["of"], fingerprint


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, naming the file; empty if it is as it was written."""
    try:
        marks = read_record(folder / SEAL, "of", "files")[0]["files"]
        found = {name for name, path in files_below(folder) if path.name != SEAL}
    except UserError as error:
        return f"{folder / SEAL} is damaged: {error}"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"
    for name, mark in marks.items():
        if problem := changed(folder / name, mark):
            return problem
    if more := sorted(name for name in found - set(marks) if not Path(name).name.startswith(".")):
        return f"{folder / more[0]} is damage: no such file was written there"
    return ""


def changed(path: Path, mark: list[Any]) -> str:
    """How a file differs from its `file_mark`, naming it; empty if it does not."""
    size, digest = mark
    try:
        if (found := size_of(path)) != size:
            return f"{path} is damaged: {found} bytes instead of {size}"
        if file_fingerprint(path) != digest:
            return f"{path} is damaged: its content is not what was written"
    except FileNotFoundError as error:
        return f"{error.filename or path} is damaged: the file is gone"
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    return ""
