"""Medical sets as data: a card in cards/*.toml says where a set lies and how its rows are made.

| field | is |
|---|---|
| `title`, `get`, `licence`, `note` | for people |
| `checked` | how the layout is known: `files` were read, `code` reads it so, `docs` say so |
| `folder` | names of its folder below the data folder; the first that is there holds |
| `hub` | id of the same files on the Hugging Face hub |
| `files` | split -> files; ` | ` parts alternatives, `{x}` is each value of `expand.x` |
| `expand` | values of such a place: a list, or a table of what stands for them in a file's name |
| `format`, `columns`, `records` | of the files, where their ending does not tell |
| `where`, `rows_of` | rows that belong to the set, or to a split: field -> values (`*`: any) |
| `hold_out` | there are no files of `dev`: a fifth of `train`, by a hash of this field |
| `form` and its fields | how a record becomes a prompt and an answer (`forms`) |
| `languages`, `language_by`, `part` | of the rows; a field that tells the language, or the part |
| `guide` | what a model that has not been trained on the set must be told besides |
| `metric`, `also`, `max_tokens` | how answers are scored |
| `like` | another card, whose fields hold where this one has none |
| `parquet` | fields that differ in Parquet files |
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_jax.errors import UserError

SPLITS = ("train", "dev", "test")
# Form -> its fields, and whether each must be there.
FORMS: dict[str, dict[str, bool]] = {
    "exam": dict(question=True, options=True, answer=True, counts_from=False, several=False)
    | dict(context=False, cut=False),
    "label": dict(text=True, answer=True, labels=True, before=False, after=False, other=False),
    "text": dict(text=True, answer=True, before=False, after=False, allowed=False, tidy=False),
    "entities": dict(text=False, tokens=False, tags=False, glue=False, mentions=False)
    | dict(types=True, before=False, suffix=False, comma=False, none=False, separator=False),
    "relations": dict(text=True, before=False),
}
# Those of a form's fields that are no text.
_NO_TEXT = ("labels", "types", "tidy", "counts_from", "several")
SEVERAL = ("drop", "only", "keep")  # what becomes of questions with several right options
_OVERRIDES = "parquet"
# By the beginning of a field's type: what TOML must have there, and its name.
_TYPES = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "tuple": (list, "a list"),
    "Mapping": (dict, "a table"),
}


@dataclass(frozen=True)
class MedicalSet:
    """A card; its fields are described at the top of the module."""

    name: str
    title: str
    folder: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    form: str
    group: str
    get: str
    licence: str
    checked: str
    read: Mapping[str, Any]
    hub: str = ""
    note: str = ""
    languages: tuple[str, ...] = ("en",)
    language_by: Mapping[str, object] = field(default_factory=dict)
    part: str = ""
    expand: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    format: str = ""
    columns: tuple[str, ...] = ()
    records: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows_of: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    hold_out: str = ""
    guide: str = ""
    metric: str = "accuracy"
    also: tuple[str, ...] = ()
    max_tokens: int = 16
    parquet: Mapping[str, object] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the set has, wherever its files lie."""
        held = {"dev"} if self.hold_out else set()
        return tuple(s for s in SPLITS if s in self.files or s in held)

    @property
    def split_rule(self) -> str:
        """How the splits come about, in words."""
        if self.hold_out and "dev" not in self.files:
            return "a fifth of the training rows, drawn by a hash, is held out as dev"
        return "official files"

    @property
    def kind(self) -> str:
        """'choice' or 'generate'."""
        several = self.read.get("several") in ("keep", "only")
        return "choice" if self.form in ("exam", "label") and not several else "generate"

    def for_file(self, suffix: str) -> MedicalSet:
        """The card as it holds for files of this ending."""
        if suffix != f".{_OVERRIDES}" or not self.parquet:
            return self
        known = {f.name for f in dataclasses.fields(self)}
        own = {k: v for k, v in self.parquet.items() if k in known}
        read = {**self.read, **{k: v for k, v in self.parquet.items() if k not in known}}
        return dataclasses.replace(self, **own, read=read)


def load_cards(path: Path) -> dict[str, MedicalSet]:
    """The sets of a file of cards.

    Raises:
      UserError: no such file, not TOML, or a card that lacks a field, has an unknown one or one of
        a wrong type.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # digits and depths too
        raise UserError(f"{path}: not TOML ({error})") from error
    return {name: _card(name, _whole(name, tables, path), path) for name in tables}


def _whole(name: str, tables: dict, path: Path) -> dict:
    """A card with the fields of the one that it is like."""
    table = tables[name]
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name!r} is no table; write [{name}]")
    if "like" not in table:
        return table
    other = table["like"]
    if other not in tables or other == name:
        raise UserError(f"{path}: {name}.like: there is no card {other!r} in this file")
    return {**_whole(other, tables, path), **{k: v for k, v in table.items() if k != "like"}}


def _card(name: str, table: dict, path: Path) -> MedicalSet:
    where = f"{path}: {name}"
    form = table.get("form")
    if form not in FORMS:
        raise UserError(f"{where}.form: {form!r} is none of {', '.join(FORMS)}")
    own = {f.name: f for f in dataclasses.fields(MedicalSet)}
    given = {k: v for k, v in table.items() if k in own and k not in ("name", "read")}
    read = {k: v for k, v in table.items() if k not in given}
    unknown = [k for k in read if k not in FORMS[form]]
    if unknown:
        raise UserError(f"{where}: form {form!r} has no field {unknown[0]!r}")
    lacking = [k for k, must in FORMS[form].items() if must and k not in read]
    lacking += [
        f.name
        for f in own.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in (*given, "name", "read")
    ]
    if lacking:
        raise UserError(f"{where}: the field {lacking[0]!r} is missing")
    for key, value in given.items():
        kind, named = _TYPES[re.split(r"\W", str(own[key].type))[0]]
        if not isinstance(value, kind) and not (key == "folder" and isinstance(value, str)):
            raise UserError(f"{where}.{key}: {value!r} must be {named}")
    for key in read.keys() - set(_NO_TEXT):
        if not isinstance(read[key], str):
            raise UserError(f"{where}.{key}: {read[key]!r} must be a text")
    if (first := read.get("counts_from", 0)) not in (0, 1) or type(first) is not int:
        raise UserError(f"{where}.counts_from: {first!r} must be 0 or 1")
    if "several" in read and read["several"] not in SEVERAL:
        raise UserError(f"{where}.several: {read['several']!r} is none of {', '.join(SEVERAL)}")
    if read.get("several") in ("keep", "only") and "metric" not in given:
        raise UserError(
            f"{where}.metric: say how answers with several right options are scored, such as "
            "'letters_exact'"
        )
    _check_files(given["files"], where)
    return MedicalSet(name=name, read=read, **{k: _frozen(k, v) for k, v in given.items()})


def _check_files(files: dict, where: str) -> None:
    if not files or set(files) - set(SPLITS):
        raise UserError(f"{where}.files: write lists of files for some of {', '.join(SPLITS)}")
    for split, sources in files.items():
        if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
            raise UserError(f"{where}.files.{split}: must be a list of texts")


def _frozen(name: str, value):
    """A TOML value as the card holds it: tuples for lists, tables of texts for places."""
    if name == "folder":
        return (value,) if isinstance(value, str) else tuple(value)
    if name == "files":
        return {split: tuple(sources) for split, sources in value.items()}
    if name == "expand":
        tables = {k: v if isinstance(v, dict) else {x: x for x in v} for k, v in value.items()}
        return {k: {str(a): str(b) for a, b in v.items()} for k, v in tables.items()}
    return tuple(value) if isinstance(value, list) else value
