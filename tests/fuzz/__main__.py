"""Runs every target for a time, and says what was read and what was found: `make fuzz`.

    MEDMOE_FUZZ_SECONDS=3600 python -m tests.fuzz [--seed=N] [TARGET ...]

What is printed with a fault makes its input again: `python -m tests.fuzz --again=TARGET:SEED:N`.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from medmoe_jax.errors import UserError
from tests.fuzz.targets import TARGETS

LONGEST = 30  # seconds of computing that an input may take
_WAITING = 300  # seconds that it may take in all, on a machine that others use too
_ROUND = 25  # inputs of a target before the next one has its turn


class TooLong(BaseException):
    """An input takes longer than any may."""


@dataclass
class Tally:
    """What a target was given, and what came of it."""

    inputs: int = 0
    read: int = 0
    slowest: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)


def attempt(name: str, seed: str, folder: Path, tally: Tally) -> None:
    """Give a target one input."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folder.with_name("seed").write_text(seed)  # left where the input ends the process
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    signal.setitimer(signal.ITIMER_REAL, _WAITING)
    try:
        TARGETS[name](Random(seed), folder)
        tally.read += 1
    except UserError:
        pass
    except (Exception, TooLong) as error:  # all that the rule forbids is counted
        frames = traceback.extract_tb(error.__traceback__)
        at = next((f for f in reversed(frames) if "medmoe_jax/" in f.filename), frames[-1])
        where = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
        if where not in tally.faults:
            tally.faults[where] = seed
            print(f"{seed}: {where}: {str(error)[:200]!r}", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.inputs += 1
    tally.slowest = max(tally.slowest, time.monotonic() - began)


def _too_long(*_: object) -> None:
    raise TooLong


def main() -> int:
    """1 where a fault was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", help="names; all without any")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", help="TARGET:SEED:N of one input")
    arguments = parser.parse_args()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _too_long)
    faulthandler.enable()
    names = arguments.targets or list(TARGETS)
    tallies = {name: Tally() for name in names}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        folder = Path(made) / "input"
        if arguments.again:
            TARGETS[arguments.again.partition(":")[0]](Random(arguments.again), Path(made))
            return 0
        stop = time.monotonic() + float(os.environ.get("MEDMOE_FUZZ_SECONDS", "60"))
        while time.monotonic() < stop:
            for name, tally in tallies.items():
                for _ in range(_ROUND):
                    attempt(name, f"{name}:{arguments.seed}:{tally.inputs}", folder, tally)
    print("| target | inputs | read | faults | slowest, s |\n|---|---|---|---|---|")
    for name, tally in tallies.items():
        faults = len(tally.faults)
        print(f"| {name} | {tally.inputs:,} | {tally.read:,} | {faults} | {tally.slowest:.1f} |")
    total = sum(tally.inputs for tally in tallies.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total:,} inputs, {peak:.1f} GiB at most")
    return int(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
