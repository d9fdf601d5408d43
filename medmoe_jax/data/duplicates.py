"""Rows that repeat each other, or rows that are held out for evaluation.

Two rows are *exact* duplicates where all that they say is equal, whatever they say of their
language; *near* ones where the Jaccard similarity of their n-grams (`data.sketches`) is at least a
threshold. Rows that are linked by such pairs, directly or through others, form a group, and its
first row stays. A row *leaks* where it is an exact or near duplicate of a held-out row; all of
these go. Both are a matter of content alone: the order of rows decides nothing but which row of a
group is the first.

Axis legend: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.sketches import WORDS, Sketches
from medmoe_jax.errors import UserError
from medmoe_jax.screen import TerminalBar

SIMILARITY = 0.8
LEAST_SIMILARITY = 0.5  # below it, rows share little more than a form
EXACT, NEAR, HELD_OUT = "exact", "near", "held out"
_AT_ONCE = 64  # rows that are compared with one, at first

Placed = Iterable[tuple[str, Conversation]]


class Repeat(NamedTuple):
    """A row that is not to be trained on.

    Attributes:
      place: where it stands.
      kind: EXACT, NEAR, or HELD_OUT.
      of: where the row, or the item of a task, stands that it repeats.
      similarity: of the two; 1 for exact duplicates. For an item of a task the share of its
        n-grams.
    """

    place: str
    kind: str
    of: str
    similarity: float


@dataclass(frozen=True)
class Repeats:
    """The rows of some data that repeat others.

    Attributes:
      rows: how many were looked at.
      by_number: those that repeat others, by their number.
      similarity: at which two rows are near.
    """

    rows: int
    by_number: Mapping[int, Repeat]
    similarity: float = SIMILARITY

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        counts = Counter(repeat.kind for repeat in self.by_number.values())
        return {kind: counts[kind] for kind in (EXACT, NEAR, HELD_OUT)}

    @property
    def told(self) -> dict[str, int | float]:
        """The counts, and how rows were compared."""
        return {**self.counts, "similarity": self.similarity, "words": WORDS}


def find_repeats(
    rows: Placed,
    held_out: Placed = (),
    leaks: Mapping[int, Repeat] | None = None,
    similarity: float = SIMILARITY,
    within: bool = True,
) -> Repeats:
    """The rows that repeat earlier ones, or some that are held out.

    Args:
      rows, held_out: with their places. They are read once, and stay on the disk only.
      leaks: rows that are known to be held out, by number.
      similarity: Jaccard, at which two rows are near.
      within: whether rows are compared with each other, too.

    Raises:
      UserError: `similarity` is not from LEAST_SIMILARITY to 1.
    """
    check_similarity(similarity)
    found = dict(leaks or {})
    with Sketches() as sketches:
        for place, row in TerminalBar(held_out, "held-out rows", leave=False):
            sketches.add(row, place)
        before = len(sketches)
        for place, row in TerminalBar(rows, "comparing rows", leave=False):
            sketches.add(row, place)
        known = np.array(sorted(found), np.int64) + before
        numbers = np.setdiff1d(np.arange(before, len(sketches)), known)
        like_N = np.full(len(sketches), -1)
        _find_leaks(sketches, before, numbers, similarity, like_N)
        kinds = {number: HELD_OUT for number in np.flatnonzero(like_N >= 0).tolist()}
        if within:
            left = numbers[like_N[numbers] < 0]
            kinds |= _find_groups(sketches, left, similarity, like_N)
        digests_N = sketches.digests()
        for number, kind in kinds.items():
            other, place = int(like_N[number]), sketches.place(number)
            same = digests_N[number] == digests_N[other]
            share = 1.0 if same else sketches.similarity(number, other)
            found[number - before] = Repeat(place, kind, sketches.place(other), share)
        return Repeats(len(sketches) - before, dict(sorted(found.items())), similarity)


def check_similarity(similarity: float) -> None:
    """Raise UserError for a threshold that is none."""
    if not LEAST_SIMILARITY <= similarity <= 1:
        raise UserError(f"similarity {similarity}: give a number from {LEAST_SIMILARITY} to 1")


def _find_leaks(
    sketches: Sketches, before: int, numbers: np.ndarray, similarity: float, like_N: np.ndarray
) -> None:
    """Writes into `like_N`, for each row that is like one of the first `before`, which one."""
    digests_N = sketches.digests()
    held, first = np.unique(digests_N[:before], return_index=True)
    if not len(held) or not len(numbers):
        return
    at = np.minimum(np.searchsorted(held, digests_N[numbers]), len(held) - 1)
    same = held[at] == digests_N[numbers]
    like_N[numbers[same]] = first[at[same]]
    candidates = np.concatenate([np.sort(first), numbers[~same]])
    for bucket in sketches.buckets(candidates, similarity):
        split = np.searchsorted(bucket, before)
        for number in bucket[split:]:
            if like_N[number] < 0:
                like_N[number] = next(sketches.near(number, bucket[:split], similarity), -1)


def _find_groups(
    sketches: Sketches, numbers: np.ndarray, similarity: float, like_N: np.ndarray
) -> dict[int, str]:
    """Kinds of the rows that repeat earlier ones; writes into `like_N` which ones.

    An exact duplicate is like the first row that says the same, a near one like its group's first.
    """
    _, first, which = np.unique(sketches.digests()[numbers], return_index=True, return_inverse=True)
    same_N = numbers[first[which]]
    exact = numbers[same_N != numbers]
    like_N[exact] = same_N[same_N != numbers]
    groups = _Groups(len(sketches))
    for bucket in sketches.buckets(numbers[same_N == numbers], similarity):
        if not len(groups.apart(bucket[0], bucket)):
            continue
        for at in range(1, len(bucket)):
            number, others, some = bucket[at], groups.apart(bucket[at], bucket[:at]), _AT_ONCE
            while len(others):
                other = next(sketches.near(number, others[:some], similarity), None)
                if other is None:
                    others, some = others[some:], 4 * some
                else:
                    groups.join(number, other)
                    others = groups.apart(number, others)
    heads = groups.heads(numbers)
    near = (heads != numbers) & (same_N == numbers)
    like_N[numbers[near]] = heads[near]
    return dict.fromkeys(exact.tolist(), EXACT) | dict.fromkeys(numbers[near].tolist(), NEAR)


class _Groups:
    """Disjoint sets of numbers; each is known by its smallest."""

    def __init__(self, count: int) -> None:
        self._parent_N = np.arange(count)

    def heads(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest number of the set of each."""
        heads = self._parent_N[numbers]
        while np.any((above := self._parent_N[heads]) != heads):
            heads = above
        self._parent_N[numbers] = heads
        return heads

    def apart(self, number: int, others: np.ndarray) -> np.ndarray:
        """Those of some numbers that are in another set than this one."""
        return others[self.heads(others) != self.heads(np.array([number]))]

    def join(self, one: int, other: int) -> None:
        """Makes the sets of two numbers one."""
        heads = self.heads(np.array([one, other]))
        self._parent_N[heads.max()] = heads.min()
