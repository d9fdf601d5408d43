"""Timing of variants side by side: interleaved rounds, medians; and on what machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np


def interleaved(
    calls: Mapping[str, Callable[[], None]], rounds: int, rare: Collection[str] = ()
) -> dict[str, float]:
    """Median seconds of each call; every round runs all of them, in alternating order.

    Args:
      calls: run to completion when called; each is called once before the clock starts.
      rounds: how often.
      rare: slow calls, which every third round runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            if name in rare and i % 3:
                continue
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def processor() -> str:
    """The processor's own name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


def machine(packages: Collection[str]) -> dict:
    """What figures were taken on, with the versions of those packages that are installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in packages if name in installed},
    }
