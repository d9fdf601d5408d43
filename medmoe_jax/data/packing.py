"""Rows packed into sequences, first-fit, the rows of an epoch by themselves.

Some sequences, the bins, are filled at the same time: a row goes into the first that has room.
Where none has, or an epoch ends, they come in an order of their own and new ones are begun. So all
rows of an epoch come before those of the next, however few they are; the price is the room that
the last sequence of an epoch may leave.

Axis legend: T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np

from medmoe_jax.data.encoded_rows import Element, Facts


class PackedSequence(TypedDict):
    """A sequence: arrays int32 [T], and the facts of each row in it."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    facts: list[Facts]


class Packing(NamedTuple):
    """How rows become sequences.

    Attributes:
      length: T; no row is longer.
      bins: sequences that are filled at the same time.
      epoch: rows of an epoch; None = that is not known.
      seed: of the order of the sequences.
    """

    length: int
    bins: int
    epoch: int | None
    seed: int


def as_sequence(rows: Sequence[Element], length: int, pad_id: int) -> PackedSequence:
    """Rows one behind another, each a segment (1, 2, ...) whose positions begin at 0."""
    tokens_T = np.full(length, pad_id, np.int32)
    loss_mask_T, segments_T, positions_T = np.zeros((3, length), np.int32)
    at = 0
    for number, row in enumerate(rows, start=1):
        count = len(row["tokens"])
        own = slice(at, at + count)
        tokens_T[own], loss_mask_T[own] = row["tokens"], row["loss_mask"]
        segments_T[own], positions_T[own] = number, range(count)
        at += count
    return {
        "tokens": tokens_T,
        "loss_mask": loss_mask_T,
        "segment_ids": segments_T,
        "positions": positions_T,
        "facts": [row["facts"] for row in rows],
    }


class BinGroups(grain.IterDataset):
    """Rows in groups of bins: each a list of sequences, a sequence a list of rows."""

    def __init__(self, rows: grain.IterDataset, packing: Packing) -> None:
        super().__init__(rows)
        self._packing = packing

    def __iter__(self) -> _BinGroupIterator:
        return _BinGroupIterator(iter(self._parent), self._packing)


class _BinGroupIterator(grain.DatasetIterator):
    def __init__(self, rows: grain.DatasetIterator, packing: Packing) -> None:
        super().__init__(rows)
        self._packing, self._number, self._read = packing, 0, 0
        # The row that begins the next group, and the state before it.
        self._kept: tuple[Element, dict[str, Any]] | None = None

    def __next__(self) -> list[list[Element]]:
        length, bins, epoch, seed = self._packing
        group: list[list[Element]] = []
        room: list[int] = []
        while not (group and epoch and self._read % epoch == 0):
            before = self._parent.get_state()
            try:
                row, self._kept = self._kept[0] if self._kept else next(self._parent), None
            except StopIteration:
                if not group:
                    raise
                break
            size = len(row["tokens"])
            place = next((i for i, left in enumerate(room) if size <= left), len(group))
            if place == bins:
                self._kept = row, before
                break
            if place == len(group):
                group.append([])
                room.append(length)
            group[place].append(row)
            room[place] -= size
            self._read += 1
        order = np.random.default_rng((seed, self._number)).permutation(len(group))
        self._number += 1
        return [group[place] for place in order]

    def get_state(self) -> dict[str, Any]:
        rows = self._kept[1] if self._kept else self._parent.get_state()
        return {"rows": rows, "read": self._read, "group": self._number}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._parent.set_state(state["rows"])
        self._kept, self._read, self._number = None, state["read"], state["group"]
