"""Which source each row is of, so that every step and every data shard has a mixture's shares.

Think of a circle on which each source holds as much as its share. The S shards stand around it
at equal distances, and turn by a constant angle from row to row; a row is of the source at its
shard's place. So of each S rows that come together a source has its share, rounded up or down. The
angle is near the golden section of the circle, and is some whole distances between shards and the
golden section of one: turns by the golden section do not come near places of before. So neither
does the rounding add up from row to row, nor does a shard keep to one source, whatever the shares.

Axis legend: S data shards.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

_GOLDEN = (5**0.5 - 1) / 2


def source_of(row: int, shard: int, shards: int, weights: Sequence[float]) -> int:
    """The number of the source of a shard's row.

    Args:
      row: its number in the shard, from 0.
      shard, shards: which of how many, S.
      weights: of each source, above 0.
    """
    angle = round(shards * _GOLDEN) + _GOLDEN  # in distances between two shards
    place = (shard + (row + 1) * angle) % shards / shards
    *ends, total = itertools.accumulate(weights)
    return bisect.bisect(ends, place * total)


class Mixture(grain.IterDataset):
    """A shard's rows of several sources without end, mixed by weight."""

    def __init__(
        self,
        sources: Sequence[grain.IterDataset],
        weights: Sequence[float],
        shard: int,
        shards: int,
    ) -> None:
        super().__init__(sources)
        self._sources = sources
        self._source_of = functools.partial(
            source_of, shard=shard, shards=shards, weights=tuple(weights)
        )

    def __iter__(self) -> _MixtureIterator:
        return _MixtureIterator([iter(source) for source in self._sources], self._source_of)


class _MixtureIterator(grain.DatasetIterator):
    def __init__(
        self, sources: Sequence[grain.DatasetIterator], source_of: Callable[[int], int]
    ) -> None:
        super().__init__(sources)
        self._source_of, self._row = source_of, 0

    def __next__(self) -> Any:
        source = self._parents[self._source_of(self._row)]
        self._row += 1
        return next(source)

    def get_state(self) -> dict[str, Any]:
        return {"sources": [source.get_state() for source in self._parents], "row": self._row}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for source, own in zip(self._parents, state["sources"], strict=True):
            source.set_state(own)
        self._row = state["row"]
