"""Which expert a language belongs to: a table that its users edit.

A table is a CSV file with the columns `code,expert,name,note`, one language a row; experts are
numbered in the order of their first row. `families` (seven language families, fifty languages) and
`major` (twelve languages, one expert each) are the published ones (Apollo-MoE, arXiv 2410.10626);
where a published family is not the linguists', the note says so.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import place

COLUMNS = ("code", "expert", "name", "note")
_TABLES = resources.files("medmoe_jax.routing") / "tables"


@dataclass(frozen=True)
class Languages:
    """Languages and their experts.

    Attributes:
      experts: names, by number.
      ids: `{language code: number of its expert}`.
      names: `{language code: name}`.
    """

    experts: tuple[str, ...]
    ids: Mapping[str, int]
    names: Mapping[str, str]


def published() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    return tuple(sorted(file.name.removesuffix(".csv") for file in _TABLES.iterdir()))


def read_languages(table: str) -> Languages:
    """The table of that name, or the one in that file.

    Raises:
      ParameterError: there is no such table.
      UserError: a row lacks a field, or a language stands there twice.
    """
    if table in published():
        where, text = table, (_TABLES / f"{table}.csv").read_text(encoding="utf-8")
    elif place(table).is_file():
        where, text = table, fetched(table).read_text(encoding="utf-8-sig")
    else:
        raise ParameterError(
            f"languages: '{table}' is neither a file nor one of {', '.join(published())}"
        )
    reader = csv.DictReader(text.splitlines())
    if not {"code", "expert"} <= set(reader.fieldnames or ()):
        raise UserError(f"{where}: the first line names the columns {','.join(COLUMNS)}")
    ids: dict[str, int] = {}
    names: dict[str, str] = {}
    experts: dict[str, int] = {}
    for row in reader:
        code, expert = (row["code"] or "").strip(), (row["expert"] or "").strip()
        if not code or not expert:
            raise UserError(f"{where}:{reader.line_num}: a row needs a code and an expert")
        if code in ids:
            raise UserError(f"{where}:{reader.line_num}: language '{code}' stands there twice")
        ids[code] = experts.setdefault(expert, len(experts))
        names[code] = (row.get("name") or code).strip()
    if not ids:
        raise UserError(f"{where}: no language in the table")
    return Languages(tuple(experts), ids, names)
