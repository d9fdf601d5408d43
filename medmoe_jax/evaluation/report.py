"""The outcome of an evaluation: as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.errors import UserError

COLUMNS = ("task", "language", "metric", "score", "95% interval", "majority", "n", "also")


@dataclass(frozen=True)
class Result:
    """A task's score between 0 and 1, its 95% interval, and that of the majority answer."""

    task: str
    language: str
    group: str
    kind: str
    metric: str
    score: float
    low: float
    high: float
    majority: float | None
    n: int
    also: dict[str, float] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The texts of a table row, in the order of `COLUMNS`, scores in percent."""
        return [
            self.task,
            self.language,
            self.metric,
            f"{100 * self.score:.1f}",
            f"{100 * self.low:.1f} – {100 * self.high:.1f}",
            "" if self.majority is None else f"{100 * self.majority:.1f}",
            str(self.n),
            ", ".join(f"{name} {100 * value:.1f}" for name, value in self.also.items()),
        ]


@dataclass(frozen=True)
class Report:
    """Results of tasks, and the settings they were got with."""

    results: Sequence[Result]
    settings: dict = field(default_factory=dict)

    def average(self, group: str) -> float | None:
        """Mean score of a group's tasks, each weighing the same; None without any."""
        scores = [r.score for r in self.results if r.group == group]
        return sum(scores) / len(scores) if scores else None

    def table(self) -> Table:
        """The results as a table for the terminal."""
        table = Table(title="Evaluation", header_style="bold")
        for name in COLUMNS:
            numeric = name in ("score", "95% interval", "majority", "n")
            table.add_column(name, justify="right" if numeric else "left")
        for result in self.results:
            table.add_row(*result.cells())
        return table

    def to_dict(self) -> dict:
        """The report as plain JSON data."""
        return {"settings": self.settings, "results": [asdict(r) for r in self.results]}

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the report as JSON; the file is whole or absent at any time."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        write_text(path, text)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Report:
        """Reads a saved report. Raises UserError where the file is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls([Result(**result) for result in data["results"]], data["settings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a saved evaluation report ({error})") from error
