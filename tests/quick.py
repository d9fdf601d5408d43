"""How the tests compile: fast, not well, and every program once for all processes of a run.

The programs are tiny, so compiling them takes most of the time. Child processes inherit the
settings with the environment. `MEDMOE_SHIPPED=1` leaves JAX as users have it: so run the tests
marked `aot` and `shipped`, which look at compiled programs.
"""

import atexit
import functools
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

SHIPPED = "MEDMOE_SHIPPED" in os.environ
# Kernels straight to LLVM, in one piece: a third of the time that `O0` leaves. Jaxlib 0.11 does not
# know the former, and ends a process that is given it.
FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FLAGS = f"--xla_cpu_use_fusion_emitters=false {FLAGS}"


def flags(devices: int) -> str:
    """XLA_FLAGS of a process that simulates so many devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return count if SHIPPED else f"{count} {FLAGS}"


@functools.cache
def folder() -> Path:
    """What the processes of a run share; the first one makes it, the others read $MEDMOE_TESTS."""
    if "MEDMOE_TESTS" not in os.environ:
        path = os.environ["MEDMOE_TESTS"] = tempfile.mkdtemp(prefix="medmoe-tests-")
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(os.environ["MEDMOE_TESTS"])


def environment() -> dict[str, str]:
    """What to add to the environment of the tests, before the first import of jax."""
    given = os.environ.get("XLA_FLAGS", "")
    added = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    if "xla_force_host_platform_device_count" not in given:
        added["XLA_FLAGS"] = f"{given} {flags(8)}".strip()
    if SHIPPED:
        return added
    return added | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
