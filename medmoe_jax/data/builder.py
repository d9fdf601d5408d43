"""Data sets on disk: built once from rows, then read at random by index.

A data set is a TensorFlow Datasets folder in the ArrayRecord format (TensorFlow itself is not
needed), so `tfds.builder_from_directory` reads it too. Each record holds a conversation as JSON
text and its language.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from medmoe_jax.data.conversation import Conversation, Rows
from medmoe_jax.data.duplicates import Placed, Repeats
from medmoe_jax.data.files import read_items
from medmoe_jax.data.hub import is_name
from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.data.rows import RowReader
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.objects import listing
from medmoe_jax.storage.partials import drop_empty, make_folders, partial_of, sweep
from medmoe_jax.storage.places import check_makeable, is_remote, local, place

VERSION = "1.0.0"
SPLIT = "train"
# Beside the records of a data set from which rows were left out: how many, and a line for each.
CLEANED, REMOVED = "cleaned.json", "removed.jsonl"


class Conversations(OnDemand[Conversation]):
    """The rows of a built data set, read by index; it pickles, and keeps the order of building."""

    def __init__(self, folder: str | Path) -> None:
        from medmoe_jax.data import tfds_records  # takes a third of a second

        self.folder = Path(folder)
        self._records = tfds_records.read(self.folder, SPLIT)

    def __len__(self) -> int:
        return len(self._records)

    def item(self, index: int) -> Conversation:
        """A row by its number."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        record = self._records[index % len(self)]
        talk = json.loads(record["conversation"])
        # A list of turns, or a whole row where there is more than turns.
        row: Conversation = (
            talk if isinstance(talk, dict) else {"conversations": talk, "language": ""}
        )
        row["language"] = _decoded(record["language"])
        return row

    def __repr__(self) -> str:
        return f"Conversations({str(self.folder)!r})"

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Conversations, (self.folder,)


def build(
    rows: Iterable[Conversation],
    out_dir: str | Path,
    name: str,
    repeats: Repeats | None = None,
) -> Path:
    """Writes conversation rows to the data set folder `out_dir/name/1.0.0` and returns its path.

    The folder appears whole or not at all: an error or a kill in between leaves nothing under the
    final name. Rows that are `repeats` are left out, and CLEANED and REMOVED say so. Raises
    UserError for a bad name, for a name that is taken, and when there is no row to write.
    """
    from medmoe_jax.data import tfds_records  # takes a third of a second

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"data set name {name!r}: use lower-case letters, digits and '_', "
            "with a letter at the start"
        )
    final = local(out_dir) / name / VERSION
    if final.exists():
        raise UserError(f"{final} already exists; choose another name or delete that folder first")
    rows = _not_empty(rows if repeats is None else _kept(rows, repeats), name)
    out = final.parents[1]
    check_makeable(out)
    made = make_folders(out)
    partial = partial_of(out / name)
    try:
        sweep(out / name)
        partial.mkdir()
        written = tfds_records.write(rows, partial, name, VERSION, SPLIT)
        if repeats is not None:
            _tell(repeats, written)
        final.parent.mkdir(exist_ok=True)
        written.rename(final)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
        drop_empty(made)
    return final


def build_from_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    name: str = "",
    reader: RowReader | None = None,
    split: str = SPLIT,
    repeats: Repeats | None = None,
) -> Path:
    """Builds a data set under `output` from all that `read_rows` reads; returns its folder.

    `name` defaults to the first file's name; `reader` says what is made of a row; `repeats` are
    rows of the same inputs that are left out.
    Raises UserError for bad files or rows; see `data.rows` and `build`.
    """
    if not inputs:
        raise UserError("no input file given")
    stem = Path(inputs[0]).name.split(".")[0]
    name = name or re.sub(r"^[^a-z]+|[^a-z0-9]+", "_", stem.lower()).strip("_") or "conversations"
    reader = reader or RowReader()
    return build(_rows_of(inputs, reader, split), output, name, repeats)


def _rows_of(inputs: Sequence[str | Path], reader: RowReader, split: str) -> Iterator[Conversation]:
    for _, row in read_rows(inputs, reader, split):
        yield row
    reader.check_columns()


def read_rows(inputs: Sequence[str | Path], reader: RowReader, split: str = SPLIT) -> Placed:
    """Yields `(place, row)` of built data sets and all that `data.files` reads, one at a time.

    Raises:
      UserError: nothing readable is there, or a row cannot be used.
    """
    for path in inputs:
        if is_built(path):
            yield from open_rows(path, reader, split).placed()
        else:
            for place, item in read_items(path, split):
                yield place, reader(item, place)


def is_built(path: str | Path) -> bool:
    """Whether a path is that of a built data set, and no name or file."""
    return not is_name(str(path)) and is_dataset(path)


def open_rows(path: str | Path, reader: RowReader, split: str = SPLIT) -> Rows:
    """The rows of a built data set, with what the reader leaves out and adds.

    Raises UserError where the reader asks for other columns, and, when a row is read that cannot
    be used without what is left out, one that begins with its place.
    """
    if reader.columns or split != SPLIT:
        raise UserError(f"{path}: a data set that was built has one split and our own columns")
    rows = Rows(open_dataset(path), f"{path}, row {{}}".format)
    if not reader.changes:
        return rows
    return rows.changed(lambda number, row: reader(row, rows.place(number)))


def open_dataset(folder: str | Path) -> Conversations:
    """Opens a built data set: its version folder, or a folder above that holds just this one.

    Raises UserError when there is no data set, or more than one.
    """
    return Conversations(_resolve(folder))


def is_dataset(folder: str | Path) -> bool:
    """Whether a data set was built in a folder, or in one below it."""
    if is_remote(folder):
        names = [one.name for one in listing(place(folder))]
        return any(re.fullmatch(r"([^/]+/){0,2}dataset_info\.json", name) for name in names)
    return bool(_found(local(folder)))


def content_digest(folder: str | Path) -> str:
    """SHA-256 (hex) of a data set's records and features: equal wherever the folder lies."""
    folder = _resolve(folder)
    digest = hashlib.sha256((folder / "features.json").read_bytes())
    for path in sorted(folder.glob("*.array_record*")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _resolve(folder: str | Path) -> Path:
    folder = fetched(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; build a data set there first")
    found = _found(folder)
    if not found:
        raise UserError(f"{folder}: holds no data set (no dataset_info.json); build one first")
    if len(found) > 1:
        names = ", ".join(str(path) for path in sorted(found))
        raise UserError(f"{folder}: holds several data sets; name one of {names}")
    return found[0]


def _found(folder: Path) -> list[Path]:
    """The data sets in a folder and down to two below it; one half-written is none."""
    return [
        info.parent
        for pattern in ("", "*/", "*/*/")
        for info in folder.glob(f"{pattern}dataset_info.json")
        if (info.parent / "features.json").is_file()
        and not any(part.startswith(".") for part in info.relative_to(folder).parts)
    ]


def _not_empty(rows: Iterable[Conversation], name: str) -> Iterator[Conversation]:
    """The same rows; the first is read now, so that an empty input fails before any writing."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"data set {name!r}: there is no row to write; check the input files")
    return itertools.chain([first], rows)


def _kept(rows: Iterable[Conversation], repeats: Repeats) -> Iterator[Conversation]:
    """The rows that repeat no other. Raises UserError where they are not the rows looked at."""
    if len(repeats.by_number) == repeats.rows > 0:
        raise UserError(f"each of the {repeats.rows:,} rows is held out; there is none to write")
    count = 0
    for number, row in enumerate(rows):
        count += 1
        if number not in repeats.by_number:
            yield row
    if count != repeats.rows:
        raise UserError(
            f"the input held {repeats.rows:,} rows when they were compared and {count:,} when they "
            "were written; build it again when nothing changes it"
        )


def _tell(repeats: Repeats, folder: Path) -> None:
    """Writes CLEANED and REMOVED."""
    told = {"rows": repeats.rows, "kept": repeats.rows - len(repeats.by_number), **repeats.told}
    (folder / CLEANED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    with open(folder / REMOVED, "w", encoding="utf-8") as file:
        for repeat in repeats.by_number.values():
            file.write(json.dumps(repeat._asdict(), ensure_ascii=False) + "\n")


def _decoded(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
