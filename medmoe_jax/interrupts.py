"""Ctrl-C that comes where no exception can leave.

Python raises KeyboardInterrupt wherever the program stands. In a callback of the garbage collector,
as JAX has one, or in a `__del__`, Python prints what is raised and goes on: while a step is traced,
which makes many objects, the collector takes a large part of the time.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Set
from types import CodeType
from typing import Any


@contextlib.contextmanager
def never_lost() -> Generator[None]:
    """A KeyboardInterrupt that Python ignores in the block comes again as soon as it can be heard.

    Whatever listens for the signal stays as it is and hears it again. None comes after the block.
    In another thread than the main one, which hears no signal, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, again = sys.unraisablehook, _Repeats()

    def hook(ignored: Any) -> None:
        lost = issubclass(ignored.exc_type, KeyboardInterrupt)
        if lost and threading.current_thread() is threading.main_thread():
            again.press({hook.__code__, getattr(ignored.object, "__code__", None)})
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
        again.wait()
    finally:
        sys.unraisablehook = before
        again.end()


class _Repeats:
    """Presses Ctrl-C once more for each one that was lost."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._over = False

    def press(self, within: Set[CodeType | None]) -> None:
        """Send the signal once the main thread is in none of these functions, which lose it."""
        thread = threading.Thread(target=self._send, args=(within,), name="ctrl-c", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Return when all signals are sent: they are heard here, at the latest."""
        for thread in self._threads:
            thread.join()

    def end(self) -> None:
        """Send none any more."""
        with self._lock:
            self._over = True

    def _send(self, within: Set[CodeType | None]) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while within & _running(main):
            time.sleep(0.001)
        with self._lock:
            if not self._over:
                signal.pthread_kill(main, signal.SIGINT)  # it also wakes what waits


def _running(thread: int) -> set[CodeType]:
    """The functions that a thread is in."""
    return {frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[thread])}
