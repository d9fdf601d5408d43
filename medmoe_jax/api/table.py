"""Rows shown as a table: `medmoe_jax.Table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medmoe_jax import screen
from medmoe_jax.evaluation.html import TableSection


@dataclass(frozen=True)
class Table:
    """Rows with a column for each of their keys; in a notebook and in text they are a table.

    Attributes:
      rows: dictionaries; what one lacks, or what is None, stays empty.
    """

    rows: Sequence[Mapping[str, Any]]

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of all rows, in the order in which they come."""
        return tuple(dict.fromkeys(key for row in self.rows for key in row))

    def _cells(self) -> list[list[str]]:
        return [[_cell(row.get(name)) for name in self.columns] for row in self.rows]

    def __repr__(self) -> str:
        numbers = [
            name
            for name in self.columns
            if not any(isinstance(row.get(name), str) for row in self.rows)
        ]
        words = [name for name in self.columns if name not in numbers]
        rows = [[_cell(row.get(name)) for name in (*words, *numbers)] for row in self.rows]
        table = screen.ScreenTable([*map(str, words)], [*map(str, numbers)], rows)
        return screen.plain(table)

    def _repr_html_(self) -> str:
        return TableSection("", [*map(str, self.columns)], self._cells()).body()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
