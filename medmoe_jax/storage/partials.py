"""Temporary files and folders beside what they are to become, and those that dead processes left.

    .NAME.SYSTEM-PROCESS-START.partial    of what is to be NAME

The name tells whose it is: the running system, the process and when that started. Only what was
made under the same system, by a process that is gone, is removed; of another nobody can tell.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(
    r"\.(?P<of>.+)\.(?P<system>[0-9a-f]{8})-(?P<process>\d+)-(?P<start>\d+)\.partial"
)


def partial_of(path: Path) -> Path:
    """Where this process makes what is to stand at a path on this machine's disk."""
    own = os.getpid()
    path = path.absolute()  # `.` has no name
    return path.parent / f".{path.name}.{_mark()}-{own}-{start_of(own) or 0}.partial"


def sweep(path: Path) -> None:
    """Remove what dead processes left of something that was to stand at a path.

    Raises:
      OSError: the disk cannot be written.
    """
    path = path.absolute()
    for one in path.parent.glob(f".{_escaped(path.name)}.*.partial"):
        found = _NAME.fullmatch(one.name)
        if not found or found["of"] != path.name or found["system"] != _mark():
            continue
        if start_of(int(found["process"])) == int(found["start"]):
            continue
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


def make_folders(path: Path) -> list[Path]:
    """Make a folder with those above it; gives those that were not there, innermost first."""
    new = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return new


def drop_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first in which something lies."""
    for one in folders:
        try:
            one.rmdir()
        except OSError:  # it holds what was made, or what others have put there
            return


def system() -> str:
    """The running system, and among its containers the one whose process numbers are seen here.

    "" where a system does not tell, as all but Linux do not.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(process: int) -> int | None:
    """When a process started, in ticks; None where it is dead, or is not shown."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _mark() -> str:
    """Eight digits for the running system; of one that does not tell, those of its processes."""
    return hashlib.sha256((system() or str(os.getpid())).encode()).hexdigest()[:8]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
