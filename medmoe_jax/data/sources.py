"""Named sources of conversation rows: files, built data sets, and readers of known collections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from medmoe_jax.data import builder, medical, rows
from medmoe_jax.data.demo import corpus
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.medical.row import Row, shorten
from medmoe_jax.data.prompts import Prompt, Prompted
from medmoe_jax.errors import UserError

_DEMO = {
    "demo_general": corpus.pretraining_rows,
    "demo_knowledge": corpus.knowledge_rows,
    "demo_alignment": corpus.alignment_rows,
}


class RowFitter:
    """Shortens the body of a collection's row so that prompt and answer fit `length` tokens.

    Attributes:
      shortened: rows it has shortened so far.
    """

    def __init__(self, encoder: Encoder, length: int):
        self.encoder = encoder
        self.length = length
        self.shortened = 0

    def __call__(self, row: Row) -> Row:
        """The row, or a shorter one with the same answer."""
        whole = len(self.encoder(row.conversation()).codes)
        if whole <= self.length:
            return row
        self.shortened += 1
        answer = whole - self._prompt_tokens(row.prompt)
        return shorten(row, self.length - answer, self._prompt_tokens)

    def _prompt_tokens(self, prompt: str) -> int:
        return len(self.encoder.prompt([{"role": "user", "content": prompt}]))


def open_source(
    name: str, path: str, reader: str, split: str, prompt: str, fit: Callable[[Row], Row]
) -> tuple[Sequence[dict], str]:
    """Rows of a source with random access, and a digest of their content.

    Args:
      name: for messages.
      path: of the reader `rows`: a JSON/JSONL file (optionally .gz) or a built data set.
      reader: `rows`, a collection of `data.medical`, or a part of the demo corpus.
      split: of a collection.
      prompt: the form of each row's first user turn (`data.prompts`).
      fit: applied to each row of a collection.

    Raises:
      UserError: an unknown reader, a path with a reader that takes none, a prompt without a place
        for the row's own text, or bad rows.
    """
    check_source(name, path, reader)
    form = Prompt(f"data.sources.{name}.prompt", prompt)
    if reader == "rows" and Path(path).is_dir():
        return Prompted(builder.open_dataset(path), form), form.digest(builder.content_digest(path))
    if reader == "rows" or reader in _DEMO:
        found = rows.read_file(path) if reader == "rows" else _DEMO[reader]()
        return _in_memory([form.conversation(row) for row in found])
    return _in_memory([fit(form.row(row)).conversation() for row in medical.rows(reader, split)])


def check_source(name: str, path: str, reader: str) -> None:
    """What can be said against a source before it is read.

    Raises:
      UserError: an unknown reader, no file at `path`, or a path with a reader that takes none.
    """
    where = f"data.sources.{name}"
    if reader == "rows":
        if not path:
            raise UserError(f"{where}.path is empty; name a file or a built data set")
        if not Path(path).exists():
            raise UserError(f"{where}.path: there is no file or folder '{path}'")
    elif reader not in _DEMO and reader.partition(":")[0] not in medical.SETS:
        known = ", ".join(["rows", *_DEMO, *medical.SETS])
        raise UserError(f"{where}.reader: '{reader}' is none of {known}")
    elif path:
        raise UserError(f"{where}: reader '{reader}' takes no path")


def _in_memory(found: list[dict]) -> tuple[Sequence[dict], str]:
    digest = hashlib.blake2b(digest_size=16)
    for row in found:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found, digest.hexdigest()
