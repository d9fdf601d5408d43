"""A command before it begins: its pages, SIGTERM, the garbage collector while modules are imported.

A command that has begun nothing ends with status 75, as one does that has saved, and is to be
started again. This module imports nothing that takes time, and stands before all that does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Generator

from medmoe_jax.parallel import large_pages

STATUS = 75
# As the command is called, and as `python -m` calls it; not where others import the package.
_MAIN = os.path.join(os.path.dirname(os.path.realpath(__file__)), "main.py")
IS_PROGRAM = os.path.basename(sys.argv[0]) == "medmoe" or os.path.realpath(sys.argv[0]) == _MAIN


class Terminated(BaseException):
    """SIGTERM came where nothing listened for it; no class of Exception, which libraries catch."""


def _leave(*_: object) -> None:
    """While modules are imported, which no exception may disturb."""
    os.write(2, b"medmoe: asked to stop before it began; the same command starts again\n")
    os._exit(STATUS)


def _raise(*_: object) -> None:
    raise Terminated


@contextlib.contextmanager
def stoppable() -> Generator[None]:
    """SIGTERM raises Terminated in the block, unless what runs in it listens itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def all_imported() -> None:
    """Let the garbage collector work, on what comes from now on alone.

    Modules stay until the end. Looking for circles in them, again and again, took a fifth of the
    time of a command's start.
    """
    if IS_PROGRAM:
        gc.freeze()
        gc.enable()


if IS_PROGRAM:
    large_pages.begin_again()
    signal.signal(signal.SIGTERM, _leave)
    gc.disable()
