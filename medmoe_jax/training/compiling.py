"""Compiling ahead of the first step, and keeping what was compiled for the next start."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import cache_folder, is_remote, local, nearest
from medmoe_jax.training.terminal import note

_HIT = "/jax/compilation_cache/cache_hits"
_WORTH = 0.1  # seconds: programs that compile faster are not kept
_SETTING = "jax_compilation_cache_dir"
_before: dict[str, str | None] = {}  # the place that was chosen last, and what JAX was told before


def keep_compiled(directory: str | Path, workdir: str | Path) -> None:
    """Keep compiled programs on disk, where a restarted run finds them; the last call holds.

    Args:
      directory: one that all processes see, since the first one writes; "" = the place that JAX
        was told by others (JAX_COMPILATION_CACHE_DIR), or else `compiled` in the work directory,
        or in the user's cache where that is on object storage.
      workdir: "" = there is none.
    """
    now = jax.config.values[_SETTING]
    told = _before.get(now, now)
    if directory:
        folder = local(directory, "run.compilation_cache").absolute()
        _tell_unkept(folder)
        chosen = str(folder)
    elif told or not workdir:
        chosen = told
    else:
        home = cache_folder() if is_remote(workdir) else Path(workdir)
        chosen = str((home / "compiled").absolute())
    if chosen != now:
        jax.config.update(_SETTING, chosen)
        compilation_cache.reset_cache()  # one that was used already stays where it is
        _before.clear()
    if chosen != told:
        _before[chosen] = told
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)


def _tell_unkept(folder: Path) -> None:
    """Say where nothing can be kept in a folder, there already or not: JAX goes on without a word.

    It is no error: a run that was moved to another machine opens there.
    """
    there = nearest(folder)
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    if not writable and processes.index() == 0:  # the first process alone writes
        note(
            f"run.compilation_cache: {there} is no folder that can be written; compiled programs "
            "are not kept"
        )


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
