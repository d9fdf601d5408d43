"""All sets by name, and the rows of their splits."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.medical import formats, forms
from medmoe_jax.data.medical.cards import MedicalSet, load_cards
from medmoe_jax.data.medical.fields import GoldWithoutText, look, text
from medmoe_jax.data.medical.locate import find_files, has_files
from medmoe_jax.data.medical.row import Row, held_out, normal
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched

LOG = logging.getLogger(__name__)
SETS: dict[str, MedicalSet] = {
    name: entry
    for path in sorted((Path(__file__).parent / "cards").glob("*.toml"))
    for name, entry in load_cards(path).items()
}


@dataclass(frozen=True)
class Split:
    """The rows of a split, and what there is to say of them.

    missing: files of the split that were not there.
    left_out: rows of 'train' that stand in another split as well, and are not among the rows.
    duplicates: rows whose prompt an earlier row of the split has too.
    without_gold: records whose right option has no text, and that are not among the rows.
    """

    rows: list[Row]
    missing: list[str]
    left_out: int = 0
    duplicates: int = 0
    without_gold: int = 0


def add_cards(path: str | os.PathLike) -> list[str]:
    """Makes the sets of a user's file of cards known; returns their names.

    Raises:
      UserError: the file is no file of cards, or one has the name of another set.
    """
    cards = load_cards(fetched(path))
    for name in cards:
        if name in SETS and SETS[name] != cards[name]:
            raise UserError(f"{path}: {name!r} is the name of another set; give yours another")
    SETS.update(cards)
    return list(cards)


def find(name: str) -> tuple[MedicalSet, str | None]:
    """The set of `name`, and the language or part asked for in `name:language`."""
    base, _, part = name.partition(":")
    if base not in SETS and re.search(r"[./]", base):
        raise UserError(f"there is no file or folder {base!r}, nor a medical set of this name")
    if base not in SETS:
        near = difflib.get_close_matches(base, SETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "medmoe eval --list names them"
        raise UserError(f"{base!r} is not a medical set; {hint}")
    entry = SETS[base]
    places = [key for table in entry.expand.values() for key in table]
    named = dict.fromkeys([*entry.languages, *places])
    if part and part not in named and not entry.part:
        near = difflib.get_close_matches(part, named, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{base} has no language {part!r}{hint}; it has {', '.join(named)}")
    return entry, part or None


def default_split(entry: MedicalSet, root: str | os.PathLike | None = None) -> str:
    """The split that is scored where none is asked for: dev, or test where no dev lies there."""
    there = [s for s in ("dev", "test") if s in entry.splits]
    for split in there:
        if has_files(entry, _source(entry, split), root):
            return split
    return there[0] if there else "train"


def size(entry: MedicalSet, split: str, root: str | os.PathLike | None = None) -> int:
    """Bytes of the files of a split that are there."""
    found, _ = find_files(entry, _source(entry, split), root)
    return sum(file.path.stat().st_size for file in found)


def read_split(name: str, split: str, root: str | os.PathLike | None = None) -> Split:
    """The rows of a split of the set `name`, or of one language or part of it (`tico19:fr`).

    Rows of 'train' whose prompt also stands in another split are left out.
    Raises UserError for an unknown name or split and for a corrupt file, FileNotFoundError where
    the data folder or all files of the split are missing.
    """
    entry, part = find(name)
    if split not in entry.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(entry.splits)}")
    rows, missing, without_gold = _read(entry, split, root, part)
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        LOG.warning("%s: %d files of %s are not there: %s", name, len(missing), split, some)
    if without_gold:
        LOG.warning(
            "%s: %d records of %s left out, as their right option has no text",
            *(name, without_gold, split),
        )
    distinct = {normal(row.prompt) for row in rows}
    kept = rows
    if split == "train":
        seen = _evaluated(entry, root)
        kept = [row for row in rows if normal(row.prompt) not in seen]
    left_out = len(rows) - len(kept)
    if left_out:
        LOG.info(
            "%s: %d of %d training rows left out, as they stand in another split too",
            *(name, left_out, len(rows)),
        )
    return Split(kept, missing, left_out, len(rows) - len(distinct), without_gold)


def rows(name: str, split: str, root: str | os.PathLike | None = None) -> Iterator[Row]:
    """The rows of `read_split`."""
    yield from read_split(name, split, root).rows


def training_rows(name: str, split: str, root: str | os.PathLike | None = None) -> list[Row]:
    """Rows to train on. Raises UserError for the split 'test': it is for evaluation only."""
    if split == "test":
        raise UserError(f"{name}: its split 'test' is for evaluation only, and not trained on")
    return read_split(name, split, root).rows


def conversations(
    name: str, split: str, root: str | os.PathLike | None = None
) -> list[Conversation]:
    """The rows of a split as conversations for training."""
    return [row.conversation() for row in training_rows(name, split, root)]


def _evaluated(entry: MedicalSet, root: str | os.PathLike | None) -> frozenset[str]:
    """What stands in the splits of a set that are not trained on, as far as they are there."""
    others = [s for s in entry.splits if s != "train" and has_files(entry, _source(entry, s), root)]
    return frozenset(normal(row.prompt) for s in others for row in _read(entry, s, root, None)[0])


def _source(entry: MedicalSet, split: str) -> str:
    """The split whose files hold the rows of a split."""
    return split if split in entry.files else "train"


def _read(
    entry: MedicalSet, split: str, root: str | os.PathLike | None, part: str | None
) -> tuple[list[Row], list[str], int]:
    """The rows of a split before any is left out for another split, the files that are not there,
    and how many records have a right option without text."""
    source = _source(entry, split)
    places = {key for table in entry.expand.values() for key in table}
    found, missing = find_files(entry, source, root, part if part in places else "")
    labels = _labels(entry, root)
    out, without_gold, parts = [], 0, set()
    for file in found:
        card = entry.for_file(file.path.suffix)
        for where, record in formats.records(card, file):
            if not _belongs(card, split, record, where):
                continue
            language = _language(card, record, file.values, where)
            of = _part(card, record, file.values)
            parts |= {of} - {""}
            asked = part in (None, language, of, *file.values.values())
            try:
                row = forms.FORMS[card.form](card, record, where, language, labels)
            except GoldWithoutText:  # such records stand in published sets
                without_gold += asked
                continue
            if row is not None and asked:
                out.append(replace(row, part=of))
    if not out and part and parts:
        near = difflib.get_close_matches(part, parts, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        some = ", ".join(sorted(parts)[:12]) + (", …" if len(parts) > 12 else "")
        raise UserError(
            f"{entry.name} has no part {part!r} in split {split!r}{hint}; it has {some}"
        )
    if not out:
        raise UserError(f"{entry.name}: no row of split {split!r} is in {found[0].path}")
    return out, missing, without_gold


def _belongs(entry: MedicalSet, split: str, record: dict, where: str) -> bool:
    """Whether a record is of the set, and of the split."""
    wanted = {**entry.where, **entry.rows_of.get(split, {})}
    if "_split" in record:
        return record["_split"] == split
    for path, values in wanted.items():
        value = look(record, path)
        if value is None or (str(value) not in values and "*" not in values):
            return False
    if entry.hold_out and "dev" not in entry.files and split != "test":
        return held_out(text(record, entry.hold_out, where)) == (split == "dev")
    return True


def _language(entry: MedicalSet, record: dict, values: dict[str, str], where: str) -> str:
    if "language" in values:
        return values["language"]
    if entry.language_by:
        key = text(record, str(entry.language_by["field"]), where)
        table = entry.language_by.get("table")
        if isinstance(table, dict) and key not in table:
            raise UserError(f"{where}: {entry.language_by['field']} {key!r} has no language")
        return str(table[key]) if isinstance(table, dict) else key
    return entry.languages[0]


def _part(entry: MedicalSet, record: dict, values: dict[str, str]) -> str:
    if entry.part and entry.part not in values:
        return str(look(record, entry.part) or "")
    return values.get(entry.part or "subject", "")


def _labels(entry: MedicalSet, root: str | os.PathLike | None) -> dict[str, str]:
    """Label in the files -> label in answers; empty where each record lists its own.

    The card gives them, or says `collected`: then they are all answers of the files that are there.
    """
    given = entry.read.get("labels")
    if isinstance(given, dict):
        return dict(given)
    if isinstance(given, list):
        return {label: label for label in given}
    if given != "collected":
        return {}
    found = set()
    for split in entry.files:
        for file in find_files(entry, split, root)[0] if has_files(entry, split, root) else ():
            for where, record in formats.records(entry, file):
                found.add(text(record, str(entry.read["answer"]), where).strip())
    return {label: label for label in sorted(found)}
