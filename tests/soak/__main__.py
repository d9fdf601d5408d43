"""Disturb a run of two hosts again and again; it must end bit for bit like one left alone.

  python -m tests.soak --backend=local --count=20 --only=kill
  python -m tests.soak --backend=ssh --count=20 --output=soak.md

All but `--only=kill` need root (small file systems are mounted) and gcc; ssh needs the package
openssh-server. Both hosts are this machine.
"""

import argparse
import collections
import os
import random
import tempfile
from pathlib import Path

from tests import quick

os.environ.update(quick.environment())

from tests.soak.disturbances import MIXED, Disturbance, kill
from tests.soak.run import soak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    names = [one.__name__ for one in MIXED]
    parser.add_argument("--backend", choices=("local", "ssh"), default="local")
    parser.add_argument("--count", type=int, default=20, help="of disturbances (%(default)s)")
    parser.add_argument("--only", choices=names, help="one kind alone; otherwise all are mixed")
    parser.add_argument("--seed", type=int, default=0, help="of their order and moments")
    parser.add_argument("--output", type=Path, help="Markdown to add the record to")
    return parser.parse_args()


def _sequence(count: int, draw: random.Random) -> list[Disturbance]:
    pool = [one for one, times in MIXED.items() for _ in range(times)]
    chosen = [pool[i % len(pool)] for i in range(count)]
    draw.shuffle(chosen)
    return chosen


def main() -> None:
    """Run the soak and print its record."""
    arguments = _arguments()
    draw = random.Random(arguments.seed)
    sequence = _sequence(arguments.count, draw)
    if arguments.only:
        kind = next(one for one in MIXED if one.__name__ == arguments.only)
        sequence = [kind] * arguments.count
    with tempfile.TemporaryDirectory(prefix="medmoe-soak-") as folder:
        record = soak(
            Path(folder), arguments.backend, sequence, draw,
            machines=any(one is not kill for one in sequence), say=print,
        )  # fmt: skip
    counts = collections.Counter(one.__name__ for one in sequence)
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    text = (
        f"`{arguments.backend}`, seed {arguments.seed}: {said}. {record.starts} starts, "
        f"{record.steps} steps of the stage, {record.seconds:.0f} s; metrics and parameters are "
        "those of the run left alone, bit for bit.\n"
    )
    print(text)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
