"""A command before it begins and after it ends: signals, its pages, the garbage collector.

A command that has begun nothing ends after SIGTERM with status 75, as one does that has saved, and
is to be started again; after Ctrl-C with status 130. This module imports nothing that takes time,
and stands before all that does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Generator

from medmoe_jax.parallel import large_pages

STATUS, INTERRUPTED = 75, 130
# As the command is called, and as `python -m` calls it; not where others import the package.
_MAIN = os.path.join(os.path.dirname(os.path.realpath(__file__)), "main.py")
IS_PROGRAM = os.path.basename(sys.argv[0]) == "medmoe" or os.path.realpath(sys.argv[0]) == _MAIN


class Terminated(BaseException):
    """SIGTERM came where nothing listened for it; no class of Exception, which libraries catch."""


def _leave(*_: object) -> None:
    """While modules are imported, which no exception may disturb."""
    os.write(2, b"medmoe: asked to stop before it began; the same command starts again\n")
    os._exit(STATUS)


def _leave_silently(*_: object) -> None:
    """As `_leave`, for the person at the keyboard, who knows."""
    os._exit(INTERRUPTED)


def _raise(*_: object) -> None:
    raise Terminated


@contextlib.contextmanager
def stoppable() -> Generator[None]:
    """SIGTERM raises Terminated in the block, unless what runs in it listens itself; and Ctrl-C
    KeyboardInterrupt, as ever, where it ended a program that was about to begin.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGTERM: _raise}
    if signal.getsignal(signal.SIGINT) is _leave_silently:
        handlers[signal.SIGINT] = signal.default_int_handler
    before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def cut_short(status: int) -> int:
    """The exit status of a command that left its work wherever it stood.

    The program ends after all that is registered with `atexit`, and before Python takes itself
    apart: with a compilation of JAX's left halfway, that is a segmentation fault.
    """
    _cut_short.append(status)
    return status


_cut_short: list[int] = []


def _end() -> None:
    if _cut_short:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(OSError):  # its reader is gone: nobody is left to be told
                    stream.flush()
        os._exit(_cut_short[-1])


def all_imported() -> None:
    """Let the garbage collector work, on what comes from now on alone.

    Modules stay until the end. Looking for circles in them, again and again, took a fifth of the
    time of a command's start.
    """
    if IS_PROGRAM:
        gc.freeze()
        gc.enable()


if IS_PROGRAM:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, _leave_silently)
    signal.signal(signal.SIGTERM, _leave)
    large_pages.begin_again()
    atexit.register(_end)  # the first to be registered is the last to be called
    gc.disable()
