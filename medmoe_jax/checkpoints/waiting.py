"""Waiting for Orbax, which several processes write with, while their storage may fail.

Where the writing of one process fails, Orbax lets that process wait ten minutes for the others, and
the others for it, before any of them hears of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path

from medmoe_jax.parallel import processes
from medmoe_jax.storage.partials import partial_of
from medmoe_jax.storage.places import is_remote

_EVERY = 10  # seconds
_BYTES = 1 << 20


class StorageLost(OSError):
    """What is waited for has not ended, and its folder can be written no more."""


def until_any(works: Sequence[futures.Future], folder: Path) -> None:
    """Wait until one of some works is done, all of which write to a folder.

    Raises:
      StorageLost: several processes write, and the folder takes no more; the works go on waiting.
    """
    every = _EVERY if processes.count() > 1 and not is_remote(folder) else None
    while not futures.wait(works, every, futures.FIRST_COMPLETED).done:
        check_writable(folder)


def done(work: Callable[[], None], folder: Path) -> None:
    """Do some work that writes below a folder; raises what it raises, and what `until_any` does."""
    pool = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
    try:
        future = pool.submit(work)
        until_any([future], folder)
        future.result()
    finally:
        pool.shutdown(wait=False)


def check_writable(folder: Path) -> None:
    """Raise StorageLost unless a mebibyte can be written to a folder and reaches its disk."""
    probe = partial_of(folder / "probe")
    try:
        try:
            with probe.open("wb") as file:
                file.write(bytes(_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise StorageLost(error.errno, error.strerror, str(folder)) from error
