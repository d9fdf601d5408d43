"""Answers that are kept as they come, until all of them are written: a command that was stopped
goes on behind them.

They stand beside the output, in OUTPUT.unfinished: a log whose first line says what was asked and
every other one an answer, in the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.files import MetricsLog, read_metrics, remove
from medmoe_jax.errors import UserError
from medmoe_jax.inference.language_model import Answer
from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import exists, place
from medmoe_jax.training.terminal import note

_EVERY = 60.0  # seconds between two times that answers are brought to storage


class Unfinished:
    """The answers that are there so far. As a context manager it closes their file at the end.

    Attributes:
      path: of the file, which is made with the first answer.
      answers: by the number of the prompt, those of an earlier command included.
    """

    def __init__(self, output: str, asked: Mapping[str, Any], total: int) -> None:
        """Read what an earlier command has left.

        Args:
          output: where all of them are to be written.
          asked: on what the answers depend, JSON-able values by name.
          total: how many there are to be.

        Raises:
          UserError: what is left is of other values, or is no such file.
        """
        self.path = place(f"{output}.unfinished")
        self._asked, self._total = dict(asked), total
        self._log: MetricsLog | None = None
        self._synced = 0.0  # when answers were brought to storage last
        found = from_first_process(self._left)
        self.answers = {int(number): Answer(*answer) for number, answer in found.items()}

    def _left(self) -> dict[str, list]:
        """The fields of answers by their numbers."""
        if not exists(self.path):
            return {}
        first, *lines = read_metrics(self.path) or [{}]
        then = first.get("asked")
        if not lines or not isinstance(then, dict):
            lines = []
            remove(self.path)
        elif then != self._asked:
            others = [name for name, value in self._asked.items() if then.get(name) != value]
            raise UserError(
                f"{self.path}: holds {len(lines)} answers of a command that was stopped, with "
                f"other {', '.join(others)}; give that command again, or remove the file to "
                "begin anew"
            )
        return {str(line["step"] - 1): line["answer"] for line in lines}

    def add(self, number: int, answer: Answer) -> None:
        """Keep the answer to the prompt of this number. Of several processes the first one does.

        Raises:
          OSError: the disk is full or cannot be written; the answers before stay.
        """
        if not processes.index():
            self._write(number, answer)
        self.answers[number] = answer

    def _write(self, number: int, answer: Answer) -> None:
        if self._log is None:
            self._log, self._synced = MetricsLog(self.path, self._total), time.monotonic()
            if not self.answers:
                self._log.write(0, {"asked": self._asked})
        self._log.write(number + 1, {"answer": answer})
        if time.monotonic() - self._synced > _EVERY:
            self._log.sync()
            self._synced = time.monotonic()

    def remove(self) -> None:
        """Remove the file, when all that it holds is written elsewhere."""
        self._close()
        remove(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._close()
        if kind is not None and self.answers:
            note(
                f"{len(self.answers)} of {self._total} answers are kept in {self.path}; the same "
                "command goes on behind them"
            )

    def _close(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()
