"""A disk that fails at the n-th thing that Python makes on it, and one whose files stay small."""

import contextlib
import os
import resource
import sys

_MAKES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_state = {"folder": "", "left": 0, "errno": 0, "seen": 0}


def _watch(event, arguments):
    """An audit hook, which the interpreter asks before it opens, makes or renames a file."""
    if not _state["folder"] or event not in ("open", "os.mkdir", "os.rename"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    if not os.fsdecode(path).startswith(_state["folder"]):
        return
    if event == "open" and not (arguments[2] or 0) & _MAKES:
        return
    _state["seen"] += 1
    if _state["seen"] >= _state["left"]:
        raise OSError(_state["errno"], os.strerror(_state["errno"]), os.fsdecode(path))


_installed = []  # a hook stays for the life of the process, and does nothing outside `failing`


@contextlib.contextmanager
def failing(folder, at, errno):
    """From the `at`-th write in a folder on, each fails with this number; `seen` counts them."""
    if not _installed:
        sys.addaudithook(_watch)
        _installed.append(True)
    _state.update(folder=str(folder), left=at, errno=errno, seen=0)
    try:
        yield _state
    finally:
        _state["folder"] = ""


@contextlib.contextmanager
def room_for(size):
    """No file that this process writes, in any language, can have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
