"""Training rows of a data set: its conversations, encoded, each with what it counts for.

Axis legend: N tokens of one row, R training rows of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np

from medmoe_jax.data.conversation import Conversation, Rows, as_rows
from medmoe_jax.data.encode import Encoded, Encoder
from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import PAIR
from medmoe_jax.screen import TerminalBar

CACHE_BYTES = 256 << 20
ROW_OVERHEAD = 512  # bytes of Python objects around a remembered row
_MANY = 5_000
Result = TypeVar("Result")


class RowCounts(NamedTuple):
    """What training rows hold."""

    rows: int
    tokens: int
    target_tokens: int
    truncated_rows: int
    rows_without_target: int


class Facts(NamedTuple):
    """What is known of one training row beside its tokens."""

    counts: RowCounts
    language_id: int


class Element(TypedDict):
    """One training row: `tokens` int32 [N], `loss_mask` int8 [N], and its facts."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    facts: Facts


class EncodedRows(OnDemand[Element]):
    """The training rows of a data set, cut at `length` tokens.

    All conversations are encoded once when it is made, so that one that cannot be used is named
    before anything else begins; what fits in `budget` bytes is remembered.

    Attributes:
      encoder: what encodes them.
      length: tokens at which a row is cut.
      conversations: rows of the data set.
      counts: what all its training rows hold together.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Conversation],
        encoder: Encoder,
        length: int,
        budget: int = CACHE_BYTES,
    ) -> None:
        """
        Args:
          name: of the data set.
          rows: conversation rows.
          encoder, length: see the class.
          budget: bytes to remember.

        Raises:
          UserError: a row that cannot be encoded, named by its place, or a length below 2.
        """
        PAIR.check("length", length)
        self.name, self.encoder, self.length = name, encoder, length
        self._rows = as_rows(rows)
        self._left = budget
        self._memory: dict[int, list[Element]] = {}
        totals, sizes = np.zeros(len(RowCounts._fields), np.int64), []
        # Shown at a terminal where it takes a while.
        quiet = len(self._rows) <= _MANY
        for number in TerminalBar(range(len(self._rows)), f"reading {name}", quiet=quiet):
            parts = self._encode(number)
            sizes.append(len(parts))
            totals += np.sum([part["facts"].counts for part in parts], axis=0)
        # Where training rows and conversations are not one and the same: the conversation of each
        # training row, and the first training row of each conversation.
        self._split: tuple[np.ndarray, np.ndarray] | None = None
        if set(sizes) - {1}:
            self._split = np.repeat(np.arange(len(sizes)), sizes), np.cumsum([0, *sizes])
        self.conversations = len(sizes)
        self.counts = RowCounts(*totals.tolist())

    def __len__(self) -> int:
        return self.conversations if self._split is None else len(self._split[0])

    def item(self, index: int) -> Element:
        """A training row by its number."""
        if self._split is None:
            return self._parts(index)[0]
        at_R, first_N = self._split
        number = int(at_R[index])
        return self._parts(number)[index - int(first_N[number])]

    def __repr__(self) -> str:
        return f"EncodedRows({self.name!r}, {self._rows!r})"

    def _parts(self, number: int) -> list[Element]:
        return self._memory[number] if number in self._memory else self._encode(number)

    def _encode(self, number: int) -> list[Element]:
        """The training rows of a conversation, remembered while there is room."""
        encoded = encoded_at(self._rows, number, self.encoder.rows)
        parts = [element(one.cut(self.length)) for one in encoded]
        if self._left > 0 and number not in self._memory:
            size = sum(part["tokens"].nbytes + part["loss_mask"].nbytes for part in parts)
            self._left -= size + ROW_OVERHEAD * len(parts)
            self._memory[number] = parts
        return parts


def encoded_at(
    rows: Rows, number: int, encode: Callable[[Conversation], list[Result]]
) -> list[Result]:
    """What `encode` makes of a row. Raises UserError that begins with the row's place."""
    try:
        return encode(rows[number])
    except UserError as error:
        raise UserError(f"{rows.place(number)}: {error}") from error


def element(row: Encoded) -> Element:
    """The training row of an encoded one."""
    size, targets = len(row.tokens), int(row.loss_mask.sum())
    counts = RowCounts(1, size, targets, int(row.truncated), int(targets == 0))
    return {
        "tokens": row.tokens,
        "loss_mask": row.loss_mask.astype(np.int8),
        "facts": Facts(counts, row.language_id),
    }
