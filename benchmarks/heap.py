"""A process's memory: its peak, and a heap that keeps its pages, for timings on CPU.

A training step's temporaries are gigabytes that the C library by default takes from the system at
every step and gives back at its end. Touching them anew costs a sixth to a third of the step, and
how much depends on the machine's neighbours rather than on the program.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

# <malloc.h>: option -> value.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_OPTIONS = {
    _ARENA_MAX: 1,  # else the threads' own arenas, of 64 MB, send large requests to mmap
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: -1,  # never
}


def keep_pages() -> None:
    """Make this process's heap keep what it has freed; before its threads start.

    Raises:
      OSError: the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise OSError("the C library has no mallopt: benchmarks need glibc")
    for option, value in _OPTIONS.items():
        if not library.mallopt(option, value):
            raise OSError(f"mallopt refuses option {option}")


def peak_gib() -> float:
    """Peak resident memory of this process; `getrusage` would count what started it as well."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 2**20, 2)
