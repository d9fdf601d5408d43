"""Batches of packed rows, the same for every number of processes, and exact after a resume.

A stream has S *virtual shards*, fixed by the recipe. Each shard owns every S-th row of each data
set (of streamed files: blocks of as many rows as another's), shuffles them anew in every epoch,
mixes the data sets by weight (`data.mixing`) and packs rows into sequences of T tokens
(`data.packing`), an epoch by itself: as many rows as all its data sets hold.
Row i of every global batch comes from shard i mod S. A process reads the shards it was given;
states are kept by shard, so another number of processes continues the stream.

Axis legend: B rows of this process's part of the global batch, T tokens of a row.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import FlatMapIterDataset, LimitIterDataset, ThreadPrefetchDatasetIterator

from medmoe_jax.data.encoded_rows import EncodedRows, RowCounts
from medmoe_jax.data.mixing import Mixture
from medmoe_jax.data.order import endless
from medmoe_jax.data.packing import BinGroups, PackedSequence, Packing, as_sequence
from medmoe_jax.data.streamed_rows import INLINE, Each, StreamedRows
from medmoe_jax.errors import UserError

ARRAYS = ("tokens", "loss_mask", "segment_ids", "positions")
# Sequences that are filled at the same time. More of them leave less padding.
PACK_BINS = 32
AHEAD = 4
# Stands in every saved state; to be raised when rows come in another order.
ORDER = 2

Batch = dict[str, np.ndarray]
TrainingRows = EncodedRows | StreamedRows


def array_names(languages: bool) -> tuple[str, ...]:
    """The arrays of a batch; with `languages` it says which language a token is of."""
    return (*ARRAYS, "language_ids") if languages else ARRAYS


# What this process knows by shard ("0", "1", ...) to what all processes know together.
Merge = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class StreamSpec:
    """How rows become global batches.

    Attributes:
      global_batch: sequences a step.
      shards: virtual shards; they divide global_batch.
      seed: of shuffling and packing.
      pack: several rows to a sequence, or one.
      shard_ids: the shards that this process reads; None = all.
    """

    global_batch: int
    shards: int = 1
    seed: int = 0
    pack: bool = True
    shard_ids: Sequence[int] | None = None

    @property
    def own_shards(self) -> tuple[int, ...]:
        """The shards that this process reads, in order."""
        return tuple(range(self.shards) if self.shard_ids is None else sorted(self.shard_ids))

    def check(self) -> None:
        """Raise UserError when the parts do not fit together."""
        own = self.own_shards
        if self.shards < 1 or self.global_batch < 1 or self.global_batch % self.shards:
            raise UserError(
                f"the global batch ({self.global_batch}) must be a multiple of the data shards "
                f"({self.shards})"
            )
        if not own or len(set(own)) < len(own) or set(own) - {*range(self.shards)}:
            raise UserError(
                f"shard_ids {own}: expected distinct numbers from 0 to {self.shards - 1}"
            )


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches; batches are made ahead in a background thread.

    `next()` gives numpy arrays int32 [B, T]: `tokens`, `loss_mask` (1 = this token is a target),
    `segment_ids` (0 = padding, 1.. = the packed rows) and `positions` (from 0 in each packed row);
    and `language_ids` (-1 = padding or unknown) if the encoder was given languages.
    """

    def __init__(
        self, sources: Sequence[TrainingRows], weights: Sequence[float] | None, spec: StreamSpec
    ) -> None:
        self._sources, self._weights, self._spec = sources, weights, spec
        self.shard_ids = spec.own_shards
        rows = {shard: iter(self._packed(self._rows(shard), shard)) for shard in self.shard_ids}
        batches = _ShardRows(rows, spec.global_batch // spec.shards, self._knows_languages)
        self._batches = ThreadPrefetchDatasetIterator(batches, AHEAD)
        # Ends the thread while the interpreter is still whole.
        weakref.finalize(self, self.__dict__.pop, "_batches", None)

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def _encoded(self) -> list[EncodedRows]:
        """Those sources that are not streamed."""
        return [source for source in self._sources if isinstance(source, EncodedRows)]

    @property
    def _knows_languages(self) -> bool:
        return self._sources[0].encoder.languages is not None

    def counters(self, merge: Merge = dict) -> dict[str, int]:
        """What the batches given so far held, by the names in `RowCounts`."""
        counts = [shard["counts"] for shard in merge(self.get_state()).values()]
        return dict(zip(RowCounts._fields, np.sum(counts, axis=0).tolist(), strict=True))

    def get_state(self) -> dict[str, dict]:
        """The position in the stream, as JSON values by shard ("0", "1", ...)."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, dict]) -> None:
        """Continues from a state; states of other shards in it are passed over.

        Raises UserError when a shard of this stream has no state, or one of another order of rows.
        """
        missing = [str(shard) for shard in self.shard_ids if str(shard) not in state]
        if missing:
            raise UserError(
                f"the saved data state lacks shard {', '.join(missing)} (it has "
                f"{', '.join(state) or 'none'}); the number of data shards must stay as it was"
            )
        own = {str(shard): state[str(shard)] for shard in self.shard_ids}
        if any(shard.get("order") != ORDER for shard in own.values()):
            raise UserError(
                "the saved data state is of another version of medmoe_jax, in which other rows "
                "come next; finish the stage with that version, or remove its folder to run it anew"
            )
        self._batches.set_state(own)

    def steps_per_epoch(self, merge: Merge = dict) -> int:
        """Global batches in one epoch: as many rows as all used data sets hold together.

        Counted by packing that many rows of every shard, so it encodes the data once; what it
        encodes is remembered for the stream.
        """
        sequences = {str(shard): self._sequences(shard) for shard in self.shard_ids}
        return math.ceil(sum(merge(sequences).values()) / self._spec.global_batch)

    def close(self) -> None:
        """Stops the background thread."""
        self._batches.close()

    def _sequences(self, shard: int) -> int:
        """How many an epoch of the shard packs into."""
        epoch = LimitIterDataset(self._rows(shard), self._epoch(shard))
        return sum(1 for _ in self._packed(epoch, shard))

    def _epoch(self, shard: int) -> int:
        """How many rows an epoch of the shard has, without those that are streamed."""
        return sum(len(_shard_of(source, shard, self._spec.shards)) for source in self._encoded)

    def _rows(self, shard: int) -> grain.IterDataset:
        """The endless sequence of this shard's rows."""
        shards = self._spec.shards
        seeds = [_seed(self._spec.seed, shard, number) for number in range(len(self._sources))]
        if self._weights is None:
            parts = [_shard_of(source, shard, shards) for source in self._encoded]
            whole = grain.MapDataset.concatenate(parts)
            return endless(whole, seeds[0]).to_iter_dataset(INLINE)
        rows = [
            source.endless(shard, seed)
            if isinstance(source, StreamedRows)
            else endless(_shard_of(source, shard, shards), seed).to_iter_dataset(INLINE)
            for source, seed in zip(self._sources, seeds, strict=True)
        ]
        return rows[0] if len(rows) == 1 else Mixture(rows, self._weights, shard, shards)

    def _packed(self, rows: grain.IterDataset, shard: int) -> grain.IterDataset:
        """Sequences of T tokens."""
        source = self._sources[0]
        if self._spec.pack:
            counted = len(self._encoded) == len(self._sources)
            epoch, seed = self._epoch(shard), _seed(self._spec.seed, shard, -1)
            packing = Packing(source.length, PACK_BINS, epoch if counted else None, seed)
            together = FlatMapIterDataset(BinGroups(rows, packing), Each(list))
        else:
            together = rows.map(lambda row: [row])
        pad_id = source.encoder.tokenizer.pad_id
        return together.map(lambda some: as_sequence(some, source.length, pad_id))


def make_stream(
    datasets: Mapping[str, TrainingRows], weights: Mapping[str, float] | None, spec: StreamSpec
) -> BatchStream:
    """The training stream over named data sets of one encoder and length.

    `weights` are relative rows drawn from each data set (0 leaves one out); None draws every row of
    all data sets once an epoch, which those that are streamed cannot do. Raises UserError when the
    parts do not fit together.
    """
    names = _used(datasets, weights)
    spec.check()
    for name in names:
        source = datasets[name]
        if isinstance(source, StreamedRows):
            if weights is None:
                raise UserError(f"data set {name!r} is streamed, so it needs a mixture weight")
            if len(source.blocks) != spec.shards:
                raise UserError(
                    f"data set {name!r} is streamed in {len(source.blocks)} data shards, not "
                    f"{spec.shards}"
                )
        else:
            check_shards(name, len(source), spec.shards)
    shares = None if weights is None else [float(weights[name]) for name in names]
    return BatchStream([datasets[name] for name in names], shares, spec)


def check_shards(name: str, rows: int, shards: int) -> None:
    """Raise UserError for a data set with fewer training rows than data shards."""
    if rows < shards:
        raise UserError(
            f"data set {name!r} has {rows} rows, fewer than the {shards} data shards; use fewer "
            "shards or leave it out"
        )


def epoch_batches(
    rows: EncodedRows,
    batch: int,
    shards: int = 1,
    shard_ids: Sequence[int] | None = None,
    length: int | None = None,
) -> Iterator[Batch]:
    """Batches for evaluation: each training row once, in order, one to a sequence.

    The last batch is filled up with padding (`segment_ids` 0). As in training, row i of a batch
    belongs to shard i mod `shards`, and only the rows of `shard_ids` are given, so that every
    process makes the same number of steps. Arrays as those of `BatchStream`, of `length` tokens
    (None: where the rows are cut).
    """
    if batch % shards:
        raise UserError(f"the batch ({batch}) must be a multiple of the data shards ({shards})")
    mine = range(shards) if shard_ids is None else shard_ids
    own = [i for i in range(batch) if i % shards in set(mine)]
    languages, pad_id = rows.encoder.languages is not None, rows.encoder.tokenizer.pad_id
    for start in range(0, len(rows), batch):
        some = [[rows[start + i]] if start + i < len(rows) else [] for i in own]
        sequences = [as_sequence(one, length or rows.length, pad_id) for one in some]
        yield _assemble(sequences, languages)


class _ShardRows:
    """Whole batches from the shards' sequences; the state and the counts are kept by shard."""

    def __init__(
        self, sequences: dict[int, grain.DatasetIterator], rounds: int, knows_languages: bool
    ):
        self._sequences, self._rounds, self._knows_languages = sequences, rounds, knows_languages
        self._counts = {shard: np.zeros(len(RowCounts._fields), np.int64) for shard in sequences}

    def __iter__(self) -> _ShardRows:
        return self

    def __next__(self) -> Batch:
        elements = []
        for _ in range(self._rounds):
            for shard, sequence in self._sequences.items():
                element = next(sequence)
                self._counts[shard] += np.sum([f.counts for f in element["facts"]], axis=0)
                elements.append(element)
        return _assemble(elements, self._knows_languages)

    def get_state(self) -> dict[str, dict]:
        return {
            str(shard): {
                "sequences": sequence.get_state(),
                "counts": self._counts[shard].tolist(),
                "order": ORDER,
            }
            for shard, sequence in self._sequences.items()
        }

    def set_state(self, state: Mapping[str, dict]) -> None:
        for shard, sequence in self._sequences.items():
            sequence.set_state(state[str(shard)]["sequences"])
            self._counts[shard] = np.asarray(state[str(shard)]["counts"], np.int64)


def _assemble(sequences: Sequence[PackedSequence], knows_languages: bool) -> Batch:
    batch = {name: np.stack([sequence[name] for sequence in sequences]) for name in ARRAYS}
    if knows_languages:
        ids = [[-1, *(facts.language_id for facts in s["facts"])] for s in sequences]
        rows = [
            np.asarray(i, np.int32)[s["segment_ids"]] for i, s in zip(ids, sequences, strict=True)
        ]
        batch["language_ids"] = np.stack(rows)
    return batch


def _used(datasets: Mapping[str, TrainingRows], weights: Mapping[str, float] | None) -> list[str]:
    """The names of the data sets that rows are drawn from, in sorted order."""
    given = dict.fromkeys(datasets, 1.0) if weights is None else weights
    if set(given) != set(datasets):
        odd = ", ".join(repr(name) for name in sorted(set(given) ^ set(datasets)))
        raise UserError(f"data sets and mixture weights must have the same names; see {odd}")
    for name, weight in given.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"mixture weight of {name!r} is {weight}; give a number from 0 up")
    names = sorted(name for name, weight in given.items() if weight > 0)
    if not names:
        raise UserError("the mixture is empty: give at least one data set a weight above 0")
    return names


def _shard_of(source: EncodedRows, shard: int, shards: int) -> grain.MapDataset:
    return grain.MapDataset.source(source)[shard::shards]


def _seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part."""
    return zlib.crc32(repr(parts).encode())
