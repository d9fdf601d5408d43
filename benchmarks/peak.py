"""Peak resident memory of one variant's step, as a process of its own: prints GiB.

python -m benchmarks.peak medcare
"""

from __future__ import annotations

import sys

import jax

from benchmarks.heap import peak_gib
from benchmarks.steps import make


def main(name: str) -> None:
    """Two steps of a variant of `steps.VARIANTS`, then the process's peak."""
    call = make(name)
    for _ in range(2):
        call()
    jax.effects_barrier()
    print(peak_gib())


if __name__ == "__main__":
    main(sys.argv[1])
