"""Files that survive a crash: whole files and folders, JSON with good errors, the metrics log.

On disk, local or mounted (NFS, gcsfuse), a write is a temporary file, fsync and a rename; on object
storage it is one object. New folders are made on disk alone.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from medmoe_jax import json_text
from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.fingerprint import hasher
from medmoe_jax.errors import UserError, bad_or_lost
from medmoe_jax.parallel import processes
from medmoe_jax.storage import objects
from medmoe_jax.storage.objects import Grown
from medmoe_jax.storage.partials import drop_empty, make_folders, partial_of, sweep
from medmoe_jax.storage.places import check_file, check_makeable, is_remote, local, place
from medmoe_jax.storage.plain import read_settings

_MOUNTS = Path("/proc/self/mountinfo")


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text`, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content`: a crash leaves the old content or the new, never a mixture.

    Of several processes the first one writes. A link stays one, to the new content.

    Raises:
      OSError: the disk is full or the folder cannot be written; the old content is intact.
      UserError: a folder or a device is there.
    """
    if processes.index():
        return
    path = place(path)
    if is_remote(path):
        objects.write(path, content)
        return
    check_file(path)
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep(final)
    partial = partial_of(final)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: str | Path) -> None:
    """Remove a file, if there is one. Of several processes the first one does."""
    if processes.index():
        return
    path = place(path)
    if is_remote(path):
        objects.remove(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically. Raises TypeError for other types."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      UserError: the file is absent, no ordinary one, too large or no JSON object; the message
        names the file and the line.
    """
    try:
        return json_text.settings(read_settings(place(path)), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write contiguous arrays as a safetensors file, durably and readable as other files are.

    Raises:
      OSError, SafetensorError: the disk is full or the folder cannot be written.
      UserError: an array holds NaN or infinity; nothing was written.
    """
    check_exportable(arrays)
    save_file(dict(arrays), path, metadata={"format": "pt"})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    # safetensors makes a file that only its owner can read; who may enter the folder may read it.
    os.chmod(path, path.parent.stat().st_mode & 0o666)


def check_exportable(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise UserError where an array holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name}: NaN or infinity, which no export may hold; train it again")


def check_new(directory: str | Path) -> None:
    """Raise UserError unless a new folder can come to stand at `directory`, on disk.

    There is nothing, or an empty folder that can be replaced: a mount point cannot, and who is in
    a folder would be left in the old one.

    Raises:
      StorageError: on the way lies a link to nothing.
    """
    directory = local(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; give the path of a new folder")
    check_makeable(directory)
    if not directory.exists():
        return
    here = directory.samefile(os.curdir)
    if here or _is_mount(directory.resolve()):
        what = "the current folder" if here else "a mount point"
        raise UserError(f"{directory}: is {what}; give the path of a new folder in it")


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted there; of a folder of the same disk only Linux's table tells."""
    if folder.is_mount() or not _MOUNTS.exists():
        return folder.is_mount()
    points = (line.split()[4] for line in _MOUNTS.read_text(errors="replace").splitlines())
    sign = re.compile(r"\\(\d{3})")  # such as a space
    return str(folder) in (sign.sub(lambda one: chr(int(one[1], 8)), point) for point in points)


Write = Callable[[Callable[[Path], None]], None]


@contextlib.contextmanager
def new_folder(directory: str | Path) -> Generator[Write]:
    """A folder that appears whole at the end of the block, or not at all.

    All processes enter the block alike. It is given `write`, which runs a function of a temporary
    folder on the first process and returns, or raises, on all of them.

    Args:
      directory: a path on disk at which there is nothing yet, or an empty folder; see `check_new`.

    Raises:
      UserError: something is there, or the folder cannot be written.
      StorageError: the disk is full or failed.
    """
    directory = local(directory)
    final = directory.resolve()  # a link stays one, to what is new
    partial = partial_of(final)

    made: list[Path] = []

    def write(act: Callable[[Path], None]) -> None:
        from_first_process(lambda: _tried(act, partial, directory))

    def make(folder: Path) -> None:
        check_new(directory)
        made.extend(make_folders(folder.parent))
        sweep(final)
        folder.mkdir()

    try:
        write(make)
        yield write
        write(lambda folder: os.replace(folder, final))
    finally:
        if processes.index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            drop_empty(made)


def _tried(act: Callable[[Path], None], partial: Path, directory: Path) -> None:
    """Let `act` write. Raises UserError where it cannot."""
    try:
        act(partial)
    except (OSError, SafetensorError) as error:
        message = f"{directory}: cannot be written, and nothing of it was left behind: {error}"
        raise bad_or_lost(message, error) from error


class MetricsLog:
    """A JSONL file with one object per line, each with its `step`.

    Opening it cuts off a torn last line and every line after `after_step`, so that a resumed run
    continues the curve with no duplicate. To leave no gap either, write and `sync` the lines up
    to a step before the checkpoint of that step is saved. On object storage lines wait in memory
    until then.
    """

    def __init__(self, path: str | Path, after_step: int = 0) -> None:
        """Open `path` for lines after `after_step` (0: a new run, nothing is kept but step 0).

        Raises:
          UserError: a line other than the last is not a JSON object with an integer `step`.
        """
        self.path = place(path)
        content = _content(self.path)
        content = content[: length_up_to(self.path, io.BytesIO(content), after_step)]
        self._size, self._hash = len(content), hasher(content)
        kind = Grown if is_remote(self.path) else _DiskFile
        self._file: Grown | _DiskFile = kind(self.path, content)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line {"step": step, **values}; values are JSON-able."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        self._file.write(line)
        self._size += len(line)
        self._hash.update(line)

    def mark(self) -> list[Any]:
        """`fingerprint.file_mark` of all lines."""
        return [self._size, self._hash.hexdigest()]

    def sync(self) -> None:
        """Wait until every line is on the disk, or on object storage."""
        self._file.sync()

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _content(path: Path) -> bytes:
    """A file's bytes, none where it is not there."""
    if is_remote(path):
        return objects.read(path) or b""
    return path.read_bytes() if path.exists() else b""


class _DiskFile:
    """A log on disk, every line of which is written when it comes."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Begin with some content, which is the beginning of what the file holds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line reaches the kernel whole, whatever then happens to the process.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._file.truncate(len(content))

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, line: bytes) -> None:
        if (written := self._file.write(line)) != len(line):
            # A disk that is full takes a part; a line after it would make one that nobody can read.
            self._file.truncate(self._file.tell() - (written or 0))
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: '{self._file.name}'")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics log, as written; a torn last line is left out.

    Raises:
      UserError: a line other than the last is not a JSON object with an integer `step`.
    """
    lines = place(path).read_bytes().split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json_text.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{path}, line {number}: not a JSON object with an integer `step`")
    return row


def length_up_to(path: Path, lines: Iterable[bytes], step: int) -> int:
    """Bytes of the leading whole lines of a metrics log whose step is at most `step`.

    Raises:
      UserError: a line before is not a JSON object with an integer `step`.
    """
    length = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") or _parse(path, number, line)["step"] > step:
            break
        length += len(line)
    return length
