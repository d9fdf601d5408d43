"""A trace of some steps, for XProf or TensorBoard's profile page; for the first process alone."""

from __future__ import annotations

from pathlib import Path

import jax

from medmoe_jax.storage.spool import Spool
from medmoe_jax.training.hooks.protocol import Hook, Progress
from medmoe_jax.training.terminal import note


class Profiler(Hook):
    """Traces `count` steps from step `first` on; those made before a restart are left out."""

    def __init__(self, folder: Path, first: int, count: int) -> None:
        """Write into `folder`, which XProf and TensorBoard take as their --logdir."""
        self._folder, self._first, self._last = folder, first, first + count - 1
        self._files = Spool(folder)
        self._tracing = False

    def on_start(self, progress: Progress) -> None:
        """Begin, where the next step is to be traced."""
        if progress.last < self._first:
            note(
                f"run.profile: stage '{progress.stage}' ends after step {progress.last}, before "
                f"step {self._first}: nothing is traced"
            )
        self._begin_before(progress.step + 1)

    def on_step(self, progress: Progress) -> dict[str, float]:
        """Begin or end between two steps, after the devices have made the first of them."""
        if progress.step in (self._first - 1, self._last):
            jax.block_until_ready(progress.state)
        if self._tracing and progress.step >= self._last:
            self._stop()
        if progress.step < progress.last:
            self._begin_before(progress.step + 1)
        return {}

    def on_end(self, progress: Progress) -> None:
        """End a trace that the stage's end cuts short."""
        if self._tracing:
            self._stop()
        self._files.close()

    def _begin_before(self, step: int) -> None:
        if not self._tracing and self._first <= step <= self._last:
            jax.profiler.start_trace(self._files.folder)
            self._tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._files.sync()
        self._tracing = False
        note(f"the trace of steps up to {self._last} is in {self._folder}")
