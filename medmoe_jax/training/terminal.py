"""The person's terminal: one console for lines, tables and the bar of steps."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tqdm import tqdm

from medmoe_jax.screen import Screen, harmless

console = Screen(stderr=True)


def note(text: str) -> None:
    """One line for the person, above a bar of tqdm; in a file it is not broken at a width."""
    with tqdm.external_write_mode(file=sys.stderr):
        console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def say(text: str) -> None:
    """A line of what the command was asked for, on the standard output."""
    print(harmless(text))


class LogHandler(logging.StreamHandler):
    """Log lines for `sys.stderr` as it is at the moment: above a bar while one is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # not that of the stream, which would be kept

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line; a bar of tqdm is drawn anew below it."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The line, which may name what others wrote."""
        return harmless(super().format(record))

    # Read only, as in logging's own handler of last resort.
    @property
    def stream(self) -> TextIO:  # ty: ignore[incompatible-property-override]
        """Where lines go."""
        return sys.stderr


class StepBar:
    """A bar of steps on a terminal; elsewhere a line every few steps.

    Both tell how far the steps are, what the caller says of the last one, and the time left.
    """

    def __init__(self, name: str, steps: int, first: int, every: int) -> None:
        """Draw the bar.

        Args:
          name: of what takes the steps.
          steps, first: how many there are, and how many are made already.
          every: steps from one line to the next where there is no terminal.
        """
        self._name, self._steps, self._first, self._every = name, steps, first, every
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}", markup=False),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=steps, completed=first, words="")

    def update(self, step: int, words: str) -> None:
        """`step` steps are made; `words` say something of the last one."""
        words = f"{words}, {self._left(step)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, words=words)
        elif step % self._every == 0 or step == self._steps:
            note(f"{self._name}: step {step} of {self._steps}, {words}")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> timedelta:
        """The time that the other steps take if they are as fast as those since the start."""
        a_step = (time.monotonic() - self._began) / max(step - self._first, 1)
        return timedelta(seconds=round(a_step * (self._steps - step)))
