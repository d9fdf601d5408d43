"""One form for the rows of a source: a text around the first user turn of each."""

from __future__ import annotations

import dataclasses
import hashlib

from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.medical.row import Row
from medmoe_jax.errors import UserError

TEXT = "{text}"  # in a prompt: the row's own


class Prompt:
    """What a source's rows are put into."""

    def __init__(self, where: str, text: str) -> None:
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

    def conversation(self, row: Conversation) -> Conversation:
        """A conversation row in this form; one without a user turn stays as it is."""
        turns = list(row["conversations"])
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                turns[i] = {**turn, "content": self._of(turn["content"])}
                break
        return {**row, "conversations": turns}

    def digest(self, content: str) -> str:
        """The digest of rows in this form, made from the rows' own."""
        return hashlib.blake2b(f"{content} {self._of(TEXT)}".encode(), digest_size=16).hexdigest()

    def _of(self, text: str) -> str:
        return self.before + text + self.after
