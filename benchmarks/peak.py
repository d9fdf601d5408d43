"""Peak resident memory of one variant's step, as a process of its own: prints GiB.

python -m benchmarks.peak medcare
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from benchmarks.steps import make


def peak_gib() -> float:
    """Peak resident memory of this process; `getrusage` would count what started it as well."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 2**20, 2)


def main(name: str) -> None:
    """Two steps of a variant of `steps.VARIANTS`, then the process's peak."""
    call = make(name)
    for _ in range(2):
        call()
    jax.effects_barrier()
    print(peak_gib())


if __name__ == "__main__":
    main(sys.argv[1])
