"""Where metrics are written to, by the first process alone, and whether they still may be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.files import MetricsLog
from medmoe_jax.storage.spool import Spool
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord


class Checked(Hook):
    """Ends the run before anything is written that is not to be; stands before all that write."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` raises where nothing more may be written."""
        self._check = check

    def on_start(self, progress: Progress) -> None:
        """Before the metrics log is cut."""
        self._check()

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Before a line."""
        self._check()

    def on_save(self, progress: Progress) -> None:
        """Before a checkpoint."""
        self._check()


class MetricsFile(Hook):
    """A line of JSON for every step."""

    def __init__(self, path: Path, confirm: Callable[[], None]) -> None:
        """Write a log, whose lines after the step that the run starts from are cut off.

        Args:
          path: its place.
          confirm: raises where nothing more may be written.
        """
        self._path, self._confirm = path, confirm

    def on_start(self, progress: Progress) -> None:
        """Open it."""
        self._log = MetricsLog(self._path, progress.step)

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Write a line."""
        self._log.write(record.step, {**record.metrics, **record.details})

    def on_save(self, progress: Progress) -> None:
        """Bring all lines to the disk, before the checkpoint that vouches for them."""
        self._log.sync()

    def mark(self) -> list[Any]:
        """What tells the lines so far from others, for the checkpoint that vouches for them."""
        return self._log.mark()

    def on_end(self, progress: Progress) -> None:
        """Close it, unless it is another program's by now."""
        self._confirm()
        self._log.close()


class TensorBoard(Hook):
    """The metrics of every few steps, for TensorBoard."""

    def __init__(self, folder: Path, every: int) -> None:
        """Write into `folder` every so many steps."""
        self._files, self._every = Spool(folder), every

    def on_start(self, progress: Progress) -> None:
        """Open a file of events."""
        # Imported here: tensorboardX imports torch wherever that is installed. Its SummaryWriter
        # has a thread that ends where the disk is full, and leaves the run waiting for it.
        from tensorboardX.event_file_writer import EventsWriter

        self._files.folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self._files.folder / "events"))

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Write a step's metrics where that is due, or they hold what comes seldom."""
        if record.rare or progress.is_due(record.step, self._every):
            from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
            from tensorboardX.summary import scalar

            for name, value in record.metrics.items():
                summary = scalar(f"{progress.stage}/{name}", value)
                self._writer.write_event(
                    Event(wall_time=time.time(), step=record.step, summary=summary)
                )

    def on_save(self, progress: Progress) -> None:
        """Bring the events to where they are kept."""
        self._writer.flush()
        self._files.sync()

    def on_end(self, progress: Progress) -> None:
        """Close the file."""
        self._writer.close()
        self._files.close()
