"""The memory that a program may still take, and what a compiled one needs of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

# Of a device's free memory. The allocator loses some to pieces that nothing fits into.
_OF_DEVICE = 0.95
# Of a machine's free memory, where devices have none of their own: data, checkpoints, evaluation
# and other programs live in it too.
_OF_MACHINE = 0.25
_CGROUP = Path("/sys/fs/cgroup")


def room(mesh: Mesh) -> int:
    """Bytes that a program may take beside what lies on the devices of this process: of a device,
    or of the machine where devices do not tell their own.
    """
    device = mesh.local_devices[0]
    limit = limit_of(device)
    if limit is not None:
        return int(_OF_DEVICE * (limit - device.memory_stats().get("bytes_in_use", 0)))
    return int(_OF_MACHINE * machine_free())


def limit_of(device: jax.Device) -> int | None:
    """Bytes of a device's own memory; None where it has none, or does not tell."""
    return (device.memory_stats() or {}).get("bytes_limit")


def machine_free() -> int:
    """Bytes of this machine's memory that are free, within the limits of its container."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:  # no container, or one of another kind
        return free
    if limit == "max":
        return free
    # Pages of files that were read give way.
    return max(0, min(free, int(limit) - used + int(kinds["inactive_file"])))


def beside_arguments(memory: Any) -> int:
    """Bytes of a device that a compiled program needs beside its arguments: what is donated is an
    argument only.

    Args:
      memory: the program's `memory_analysis()`.
    """
    return (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def compiler_recomputes(text: str) -> bool:
    """Whether the compiler lets a program compute some values twice, to save memory.

    It does so where a program would not fit otherwise, and whatever the values cost, unlike
    `run.remat`. It marks the second time by a name that ends with `.remat` and a number.

    Args:
      text: the program's `as_text()`.
    """
    return re.search(r"^\s+(ROOT )?%[\w.\-]+\.remat[\w.]* = ", text, re.MULTILINE) is not None


def taken(memory: Any, mesh: Mesh) -> int:
    """What a program on a mesh takes of `room`, from its `memory_analysis()`."""
    devices = len(mesh.local_devices) if limit_of(mesh.local_devices[0]) is None else 1
    return devices * beside_arguments(memory)
