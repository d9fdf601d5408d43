"""Compiling ahead of the first step, and keeping what was compiled for the next start."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import cache_folder, is_remote, local

_HIT = "/jax/compilation_cache/cache_hits"
_WORTH = 0.1  # seconds: programs that compile faster are not kept


def keep_compiled(directory: str | Path, workdir: str | Path) -> None:
    """Keep compiled programs on disk, where a restarted run finds them.

    Args:
      directory: one that all processes see, since the first one writes; "" = the place that JAX
        was told otherwise (JAX_COMPILATION_CACHE_DIR), or else `compiled` in the work directory,
        or in the user's cache where that is on object storage.
      workdir: "" = there is none.
    """
    if not directory and (jax.config.values["jax_compilation_cache_dir"] or not workdir):
        return
    if directory:
        chosen = local(directory, "run.compilation_cache")
    else:
        chosen = (cache_folder() if is_remote(workdir) else Path(workdir)) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(chosen.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)


def compile_ahead(function: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, str]:
    """A jitted function compiled for these arguments or shapes, and how that went, in words.

    All processes return together: a collective between CPUs would not wait for the slowest.
    """
    events: Counter[str] = Counter()

    def listen(event: str, **_) -> None:
        events[event] += 1

    started = time.monotonic()
    lowered = function.lower(*arguments)
    jax.monitoring.register_event_listener(listen)
    try:
        program = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    seconds = time.monotonic() - started
    processes.gather(None)
    how = "read from the compilation cache" if events[_HIT] else "compiled"
    return program, f"{how} in {seconds:.1f} s"
