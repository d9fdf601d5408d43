"""Scores while a stage trains: the best step's checkpoint kept, a stage ended that gets no better.

A score is better where it is larger; `loss`, where it is smaller. Of equals the first is the best.
While the ranks of a bank still shrink, scores are told but judge nothing: a step of then has more
ranks than the stage is to end with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.errors import UserError
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.step import TrainState
from medmoe_jax.training.terminal import note

LOSS = "loss"
MEAN = "mean"
_PREFIX = "eval/"

# Scores by name of the state after a step; all processes call it alike.
Measure = Callable[[int, TrainState], Mapping[str, float]]


class Evaluations(Hook):
    """Adds `eval/NAME` to the metrics of every so many steps and of the last one."""

    def __init__(
        self,
        section: ConfigDict,
        measures: Sequence[Measure],
        hold: Callable[[int], None],
        metrics: Path,
        first: int = 0,
    ) -> None:
        """
        Args:
          section: the stage's `evaluation`.
          measures: what gives the scores.
          hold: lets the checkpoint of a step stay, in the place of the one that it held before.
          metrics: the metrics log, from which the scores before a restart are read.
          first: the first step that may be the best, or be compared with it.
        """
        self._section, self._measures, self._first = section, measures, first
        self._hold, self._metrics = hold, metrics
        self._found: list[tuple[int, float]] = []  # (step, the score that judges it)

    @property
    def best(self) -> tuple[int, float] | None:
        """The best step so far, and its score; None without any."""
        sign = -1 if self._section.best == LOSS else 1
        return max(self._found, key=lambda found: sign * found[1], default=None)

    def on_start(self, progress: Progress) -> None:
        """Know again what was found before a restart."""
        if not self._section.best:
            return
        read = from_first_process(lambda: self._read(progress.step))
        self._found = [(step, value) for step, value in read]
        if self.best:
            self._hold(self.best[0])
        self._end_if_no_better(progress)

    def on_step(self, progress: Progress) -> dict[str, float]:
        """Have the metrics told at once where the step is to be scored."""
        if progress.is_due(progress.step, self._section.every):
            progress.settle()
        return {}

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Score the step where that is due: no other hook has found fault with it."""
        if not progress.is_due(record.step, self._section.every):
            return
        scores: dict[str, float] = {}
        for measure in self._measures:
            scores |= measure(record.step, progress.state)
        record.metrics |= {_PREFIX + name: value for name, value in scores.items()}
        record.rare = True
        if self._section.best:
            self._judge(progress, scores)
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        note(f"{progress.stage}: after step {record.step} {told}{self._told_best()}")
        self._end_if_no_better(progress)

    def _judge(self, progress: Progress, scores: Mapping[str, float]) -> None:
        name = self._section.best
        if name not in scores:
            raise UserError(
                f"stages.{progress.stage}.evaluation.best: '{name}' is none of {', '.join(scores)}"
            )
        if progress.step < self._first:
            return
        self._found.append((progress.step, scores[name]))
        if self.best == self._found[-1]:
            self._hold(progress.step)
            progress.save()

    def _told_best(self) -> str:
        if self.best:
            return f"; the best {self._section.best} is that of step {self.best[0]}"
        if self._section.best:
            return f"; ranks shrink until step {self._first}, from which on the best is looked for"
        return ""

    def _end_if_no_better(self, progress: Progress) -> None:
        if not (self._section.patience and self.best):
            return
        since = sum(step > self.best[0] for step, _ in self._found)
        if since >= self._section.patience and progress.step < progress.last:
            note(f"{progress.stage}: ends after step {progress.step}, {since} were no better")
            progress.end()

    def _read(self, last: int) -> list[tuple[int, float]]:
        if not self._metrics.exists():
            return []
        name = _PREFIX + self._section.best
        lines = read_metrics(self._metrics)
        return [
            (line["step"], line[name])
            for line in lines
            if self._first <= line["step"] <= last and name in line
        ]
