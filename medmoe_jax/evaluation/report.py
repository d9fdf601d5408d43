"""The outcome of an evaluation: as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from medmoe_jax import json_text
from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.errors import UserError, within
from medmoe_jax.kinds import check_fields, shown
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import place
from medmoe_jax.storage.plain import read_settings

_KINDS: dict[str, Any] = {
    "results": list[dict[str, Any]],
    "settings": dict[str, Any],
    "about": dict[str, Any],
    "failures": list[dict[str, str]],
}
_FAILURE = {"task": str, "error": str}
COLUMNS = ("task", "metric", "score", "95% interval", "chance", "majority", "n")


def titled(task: str, split: str) -> str:
    """A task with its split, as it is asked for."""
    return f"{task}@{split}" if split else task


@dataclass(frozen=True)
class Result:
    """A task's score between 0 and 1, its 95% interval, and those of chance and of one answer.

    majority: of always giving the commonest training answer. chance: of choosing blindly.
    also: further metrics. split, shots: of the items. duplicates: prompts that stood before.
    unparsed: items in whose answer nothing could be read. cut: answers cut at the most tokens.
    shortened: prompts shortened to fit the context. missing: files of the split that lacked.
    """

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
    split: str = ""
    chance: float | None = None
    shots: int = 0
    duplicates: int = 0
    unparsed: int = 0
    cut: int = 0
    shortened: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The task with its split, as it is asked for."""
        return titled(self.task, self.split)

    def cells(self) -> list[str]:
        """The texts of a table row, in the order of `COLUMNS`, scores in percent."""
        return [
            self.title,
            self.metric,
            percent(self.score),
            f"{percent(self.low)}–{percent(self.high)}",
            percent(self.chance),
            percent(self.majority),
            str(self.n),
        ]

    def notes(self) -> list[str]:
        """What must be known of the score besides."""
        told = {
            "answers could not be read": self.unparsed,
            "answers were cut at the most tokens": self.cut,
            "prompts were shortened to fit the context": self.shortened,
            "prompts stand twice": self.duplicates,
        }
        notes = [f"{number} {what}" for what, number in told.items() if number]
        if self.missing:
            notes.append(f"{len(self.missing)} files lacked ({', '.join(self.missing[:3])} …)")
        return notes


def reasons(failures: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """`(names of tasks, why they could not be done)`, each reason once."""
    names: dict[str, list[str]] = {}
    for failure in failures:
        names.setdefault(failure["error"], []).append(failure["task"])
    return [(", ".join(tasks), error) for error, tasks in names.items()]


def percent(value: float | None) -> str:
    """A share in percent with one decimal; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


@dataclass(frozen=True)
class Report:
    """Results of tasks, and what they were got with.

    settings: how the items were asked. about: the model and the versions.
    failures: tasks that could not be done, each with `task` and `error`.
    """

    results: Sequence[Result]
    settings: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    failures: Sequence[dict] = ()

    def average(self, group: str) -> float | None:
        """Mean score of a group's tasks, each weighing the same; None without any."""
        scores = [r.score for r in self.results if r.group == group]
        return sum(scores) / len(scores) if scores else None

    def table(self) -> ScreenTable:
        """The results as a table for the terminal."""
        rows: list[Sequence[str]] = []
        for result in self.results:
            rows.append(result.cells())
            empty = [""] * (len(COLUMNS) - 3)
            rows += [("", name, percent(value), *empty) for name, value in result.also.items()]
        return ScreenTable(COLUMNS[:2], COLUMNS[2:], rows)

    def notes(self) -> list[str]:
        """Lines on the model, on single results, and on tasks that could not be done."""
        about = [f"{key}: {value}" for key, value in self.about.items() if isinstance(value, str)]
        lines = ["; ".join(about)] if about else []
        lines += [f"{r.title}: {', '.join(r.notes())}" for r in self.results if r.notes()]
        return lines + [f"{names}: not done: {error}" for names, error in reasons(self.failures)]

    def to_dict(self) -> dict:
        """The report as plain JSON data."""
        return {
            "settings": self.settings,
            "about": self.about,
            "results": [asdict(r) for r in self.results],
            "failures": list(self.failures),
        }

    def save(self, path: str | Path) -> Path:
        """Writes the report as JSON; the file is whole or absent at any time."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        write_text(path, text)
        return place(path)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a saved report. Raises UserError where the file is not one."""
        data = json_text.settings(read_settings(place(path)), path)
        with within(f"{path}: not a saved evaluation report: "):
            check_fields({"results": None, **data}, _KINDS, "report")
            results = [_result(saved) for saved in data["results"]]
            for failure in data.get("failures", ()):
                check_fields({**dict.fromkeys(_FAILURE), **failure}, _FAILURE, "failures")
        settings, about = data.get("settings", {}), data.get("about", {})
        return cls(results, settings, about, tuple(data.get("failures", ())))


def _result(saved: Mapping[str, Any]) -> Result:
    """A result by its fields. Raises UserError where one lacks, is unknown or of another type."""
    where, known = f"results of {shown(saved.get('task'))}", fields(Result)
    needed = [one.name for one in known if one.default is MISSING is one.default_factory]
    lacking = [name for name in needed if name not in saved]
    unknown = sorted(saved.keys() - {one.name for one in known})
    for names, what in ((lacking, "fields that lack"), (unknown, "fields that are not known")):
        if names:
            raise UserError(f"{where}: {what}: {', '.join(names)}; write it anew by medmoe eval")
    check_fields(saved, get_type_hints(Result), where)
    return Result(**saved)
