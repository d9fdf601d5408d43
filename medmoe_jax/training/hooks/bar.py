"""The progress bar; for the first process alone."""

from __future__ import annotations

from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.terminal import StepBar


class Bar(Hook):
    """Loss, tokens a second and the time left, on a bar or in lines."""

    def __init__(self, every: int) -> None:
        """Print a line every so many steps where no bar can be drawn."""
        self._every = every

    def on_start(self, progress: Progress) -> None:
        """Draw the bar."""
        self._bar = StepBar(progress.stage, progress.last, progress.step, self._every)

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Move it on."""
        loss, speed = record.metrics["loss"], record.metrics["tokens_per_second"]
        self._bar.update(record.step, f"loss {loss:.4f}, {speed:,.0f} tok/s")

    def on_end(self, progress: Progress) -> None:
        """Leave it as it is."""
        self._bar.close()
