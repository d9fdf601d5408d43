"""Memory in pages of 2 MiB, where Linux gives them to a program that asks.

On a processor a training step's temporaries are gigabytes, which the C library takes from the
system at every step and gives back. In pages of 4 KiB that is a million page faults, up to a tenth
of the step; a heap that never gives back grows by what the compiler took. glibc asks for larger
pages if its tunable says so, and reads that as a program begins: so the program begins once more.
https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html

This module imports nothing that takes time.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)  # of glibc


def in_use(system: Path = _SYSTEM) -> bool:
    """Whether large blocks of this process's heap are in pages of 2 MiB."""
    mode = _mode(system)
    return mode == "always" or (mode == "madvise" and f"{TUNABLE}=1" in _tunables())


def begin_again(system: Path = _SYSTEM) -> None:
    """Run this program anew, in place of itself, with the tunable set.

    Nothing is done where that changes nothing, and where `GLIBC_TUNABLES` names the tunable
    already: `glibc.malloc.hugetlb=0` keeps small pages.
    """
    named = any(one.startswith(f"{TUNABLE}=") for one in _tunables())
    if named or _mode(system) != "madvise" or not _glibc_has_it() or not sys.executable:
        return
    os.environ[VARIABLE] = ":".join([*_tunables(), f"{TUNABLE}=1"])
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _tunables() -> list[str]:
    """Those that are set, `NAME=VALUE` each."""
    return [one for one in os.environ.get(VARIABLE, "").split(":") if one]


def _mode(system: Path) -> str:
    """Who gets large pages: `always` all, `madvise` who asks, `never`; "" where it is no Linux."""
    try:
        found = re.search(r"\[(\w+)\]", system.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _glibc_has_it() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except ValueError:  # another C library
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _SINCE
