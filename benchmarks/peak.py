"""Peak resident memory of one variant's step, as a process of its own: prints GiB.

python -m benchmarks.peak medcare
"""

from __future__ import annotations

import resource
import sys

import jax

from benchmarks.steps import make


def main(name: str) -> None:
    """Two steps of a variant of `steps.VARIANTS`, then the process's peak."""
    call = make(name)
    for _ in range(2):
        call()
    jax.effects_barrier()
    print(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))


if __name__ == "__main__":
    main(sys.argv[1])
