"""One form for the rows of a source: a text around the first user turn of each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from medmoe_jax.data.medical.row import Row
from medmoe_jax.errors import UserError

TEXT = "{text}"  # in a prompt: the row's own


class Prompt:
    """What a source's rows are put into."""

    def __init__(self, where: str, text: str):
        """
        Args:
          where: the field, for messages.
          text: the form; the turn's own text stands in place of `{text}`.

        Raises:
          UserError: the form has no place, or several, for the turn's own text.
        """
        if text.count(TEXT) != 1:
            raise UserError(f"{where}: '{text}' must hold {TEXT} once, where a row's own text goes")
        self.before, _, self.after = text.partition(TEXT)

    def row(self, row: Row) -> Row:
        """A collection's row in this form; what may be shortened is still its body alone."""
        start, stop = (place + len(self.before) for place in row.body)
        return dataclasses.replace(row, prompt=self._of(row.prompt), body=(start, stop))

    def conversation(self, row: dict) -> dict:
        """A conversation row in this form; one without a user turn stays as it is."""
        turns = list(row["conversations"])
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                turns[i] = {**turn, "content": self._of(turn["content"])}
                break
        return {**row, "conversations": turns}

    def digest(self, content: str) -> str:
        """Of rows in this form, from that of the rows."""
        return hashlib.blake2b(f"{content} {self._of(TEXT)}".encode(), digest_size=16).hexdigest()

    def _of(self, text: str) -> str:
        return self.before + text + self.after


class Prompted(Sequence):
    """Conversation rows in a prompt's form, each made when it is asked for."""

    def __init__(self, rows: Sequence[dict], prompt: Prompt):
        self._rows, self._prompt = rows, prompt

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._prompt.conversation(self._rows[index])

    def __repr__(self) -> str:
        return f"Prompted({self._rows!r})"
