"""Prompts with their completions as trees, and rows that are filled with trees.

Axes: B rows, T slots of a row.

A prompt stands in a row once and its completions follow it; what several of them begin with stands
there once, too. The last token of a completion is predicted and never read, so a choice among
letters is as long as its prompt. Trees lie side by side in rows, each a segment of its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.inference.prefixes import common

_STEPS = 8  # lengths of rows between a power of two and the next; half as many beyond `_LONG`
_LEAST = 16  # slots that lengths of rows are multiples of
_ROW = 512  # slots that a prompt's completions may fill, be the prompt as short as it may
_LONG = 1024  # slots; a longer tree decides about the length of its own rows only
_SAMPLE = 1000  # trees by which the length of rows is chosen


class Tree(NamedTuple):
    """The tokens of a prompt and its completions that are read, and what they are asked.

    Attributes:
      tokens, positions: of each slot; positions are those of the whole texts.
      last: the last slot that continues it.
      at, targets: of every token of every completion, one after the other: the slot before it, and
        the token.
      counts: the number of tokens of each completion.
      longest: tokens of the longest text.
      language: the expert of the prompt's language, or -1.
    """

    tokens: list[int]
    positions: list[int]
    last: list[int]
    at: list[int]
    targets: list[int]
    counts: list[int]
    longest: int
    language: int

    @property
    def size(self) -> int:
        """Slots that it takes of a row: for its tokens, and for what they are asked."""
        return max(len(self.tokens), len(self.at))


def portions(prompt: int, completions: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Completions of a prompt of that length, in order, as many to a tree as it has room for.

    A tree may be twice as long as its prompt, so that no number of completions makes a row endless.
    """
    room = max(_ROW - prompt, prompt)
    out: list[list[tuple[int, ...]]] = []
    left = 0
    for ids in sorted(completions):
        if not out or len(ids) > left:
            out.append([])
            left = room
        out[-1].append(ids)
        left -= len(ids)
    return out


def grow(prompt: Sequence[int], completions: Sequence[Sequence[int]], language: int) -> Tree:
    """The tree of a prompt and its completions, which are sorted."""
    P = len(prompt)
    longest = P + max(map(len, completions))
    tree = Tree(list(prompt), list(range(P)), [0] * P, [], [], [], longest, language)
    path: list[int] = []  # slots of the completion before, as far as it is read
    before: Sequence[int] = ()
    for ids in completions:
        shared = min(common(before, ids), len(path))
        for slot in path[shared:]:
            tree.last[slot] = len(tree.tokens) - 1
        del path[shared:]
        for depth in range(shared, len(ids) - 1):
            path.append(len(tree.tokens))
            tree.tokens.append(ids[depth])
            tree.positions.append(P + depth)
            tree.last.append(0)
        tree.at.extend([P - 1, *path[: len(ids) - 1]])
        tree.targets.extend(ids)
        tree.counts.append(len(ids))
        before = ids
    for slot in (*range(P), *path):
        tree.last[slot] = len(tree.tokens) - 1
    return tree


class Filled(NamedTuple):
    """A batch of rows: the trees of each by number, and its shape, which may have more rows."""

    rows: list[list[int]]
    count: int
    slots: int


def _length(tokens: int) -> int:
    """The length of a row that has room for that many tokens."""
    steps = _STEPS if tokens <= _LONG else _STEPS // 2
    step = max(_LEAST, (1 << (tokens - 1).bit_length()) // (2 * steps))
    return -(-tokens // step) * step


def pack(sizes: Sequence[int], batch: int, step: int, balance: float) -> list[Filled]:
    """Batches of rows that hold trees of these sizes, longest first.

    Most have one shape: the length of rows for which the slots cost least, be they filled or not.

    Args:
      sizes: slots of each tree.
      batch: rows of a batch.
      step: what the number of rows of the last batch is rounded up to.
      balance: slots of a row with which attention costs a slot as much as all else.
    """
    if not sizes:
        return []
    sample = sorted(sizes, reverse=True)[:: len(sizes) // _SAMPLE + 1]
    lengths = [_length(min(sample[0], _LONG))]
    while lengths[-1] < 2 * lengths[0]:
        lengths.append(_length(lengths[-1] + 1))

    def cost(slots: int) -> float:
        filled = _fill(sample, batch, step, slots)
        return sum(one.count * one.slots * (1 + one.slots / balance) for one in filled)

    return _fill(sizes, batch, step, min(lengths, key=cost))


def _fill(sizes: Sequence[int], batch: int, step: int, slots: int) -> list[Filled]:
    """Rows of that length, or of that of a longer tree in their batch: best fit, longest first."""
    rows: list[list[int]] = []
    lengths: list[int] = []
    rooms: list[tuple[int, int]] = []  # (slots left, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[i], 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            # Only where no row of the batches before has room: a long tree's neighbours fill up.
            if len(rows) % batch == 0:
                lengths.append(max(slots, _length(sizes[i])))
            room, row = lengths[-1], len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(rooms, (room - sizes[i], row))
    out = [Filled(rows[b * batch :][:batch], batch, length) for b, length in enumerate(lengths)]
    used = [sum(sizes[i] for i in row) for row in out[-1].rows]
    count = min(batch, -(-len(used) // step) * step)
    out[-1] = Filled(out[-1].rows, count, min(out[-1].slots, _length(max(used))))
    return out


class Packed(NamedTuple):
    """Rows of trees, int32 `[B, T]` each; slots that hold none are segment 0.

    Attributes:
      tokens, segments, positions, languages: of each slot.
      last, lengths: see `base.attention.Branches`.
      at, targets: what is asked: the slot before a token, and the token; -1 asks nothing.
    """

    tokens: Any
    segments: Any
    positions: Any
    languages: Any
    last: Any
    lengths: Any
    at: Any
    targets: Any


def lay(trees: Sequence[Tree], filled: Filled) -> Packed:
    """The arrays of a batch; questions of a row stand in the order of its trees."""
    out = Packed(*np.zeros((len(Packed._fields), filled.count, filled.slots), np.int32))
    out.languages[:], out.targets[:] = -1, -1
    out.last[:] = np.arange(filled.slots)
    for b, row in enumerate(filled.rows):
        start = asked = 0
        for segment, tree in enumerate((trees[i] for i in row), 1):
            here = np.s_[b, start : start + len(tree.tokens)]
            out.tokens[here], out.positions[here] = tree.tokens, tree.positions
            out.segments[here], out.languages[here] = segment, tree.language
            out.lengths[here] = tree.longest
            out.last[here] = np.add(tree.last, start)
            questions = np.s_[b, asked : asked + len(tree.at)]
            out.at[questions] = np.add(tree.at, start)
            out.targets[questions] = tree.targets
            start, asked = start + len(tree.tokens), asked + len(tree.at)
    return out
