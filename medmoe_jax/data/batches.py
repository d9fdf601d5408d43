"""Batches of packed rows, the same for every number of processes, and exact after a resume.

A stream has S *virtual shards*, fixed by the recipe. Each shard owns every S-th row of each data
set, shuffles them anew in every epoch, mixes the data sets by weight and packs rows first-fit into
sequences of T tokens. Row i of every global batch comes from shard i mod S. A process reads the
shards it was given; states are kept by shard, so another number of processes continues the stream.

Axis legend: B rows of this process's part of the global batch, T tokens of a row.
"""

import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset, ThreadPrefetchDatasetIterator

from medmoe_jax.data.encode import Encoded, Encoder
from medmoe_jax.data.templates import Template
from medmoe_jax.data.tokenizers import Tokenizer
from medmoe_jax.errors import UserError

ARRAYS = ("tokens", "loss_mask", "segment_ids", "positions")
COUNTS = ("rows", "tokens", "target_tokens", "truncated_rows", "rows_without_target")
# Rows are packed into this many sequences at a time: more waste less, and mix epochs further.
PACK_BINS = 32
CACHE_BYTES = 256 << 20
ROW_OVERHEAD = 512  # bytes of Python objects around a remembered row
AHEAD = 4

Batch = dict[str, np.ndarray]


def array_names(languages: bool) -> tuple[str, ...]:
    """The arrays of a batch; with `languages` it says which language a token is of."""
    return (*ARRAYS, "language_ids") if languages else ARRAYS


# What this process knows by shard ("0", "1", ...) to what all processes know together.
Merge = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class EncodedRows(Sequence):
    """Rows of a data set, encoded at first use and remembered while they fit in `budget` bytes."""

    def __init__(self, rows: Sequence[dict], encoder: Encoder, budget: int = CACHE_BYTES):
        self._rows = rows
        self._encoder = encoder
        self._left = budget
        self._memory: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        """`codes` int32 [N] (see `Encoded`) and `facts`, COUNTS of the row and its language id."""
        element = self._memory.get(index)
        if element is None:
            encoded = self._encoder(self._rows[index])
            element = {"codes": encoded.codes, "facts": _facts(encoded)}
            if self._left > 0:
                self._left -= encoded.codes.nbytes + ROW_OVERHEAD
                self._memory[index] = element
        return element

    def __repr__(self) -> str:
        return f"EncodedRows({self._rows!r})"


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches; batches are made ahead in a background thread.

    `next()` gives numpy arrays int32 [B, T]: `tokens`, `loss_mask` (1 = this token is a target),
    `segment_ids` (0 = padding, 1.. = the packed rows) and `positions` (from 0 in each packed row);
    and `language_ids` (-1 = padding or unknown) if the encoder was given languages.
    """

    def __init__(
        self,
        sources: Sequence[EncodedRows],
        weights: Sequence[float] | None,
        encoder: Encoder,
        global_batch: int,
        shards: int,
        seed: int,
        pack: bool,
        shard_ids: Sequence[int],
    ):
        self._sources, self._weights, self._encoder = sources, weights, encoder
        self._global_batch, self._shards, self._seed, self._pack = global_batch, shards, seed, pack
        self.shard_ids = tuple(shard_ids)
        rows = {shard: iter(self._packed(self._mixed(shard), shard)) for shard in self.shard_ids}
        rows = _ShardRows(rows, encoder, global_batch // shards)
        self._batches = ThreadPrefetchDatasetIterator(rows, AHEAD)
        # Ends the thread while the interpreter is still whole.
        weakref.finalize(self, self.__dict__.pop, "_batches", None)

    def __next__(self) -> Batch:
        return next(self._batches)

    def counters(self, merge: Merge = dict) -> dict[str, int]:
        """What the batches given so far held, by the names in COUNTS."""
        counts = [shard["counts"] for shard in merge(self.get_state()).values()]
        return dict(zip(COUNTS, np.sum(counts, axis=0).tolist(), strict=True))

    def get_state(self) -> dict[str, dict]:
        """The position in the stream, as JSON values by shard ("0", "1", ...)."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, dict]) -> None:
        """Continues from a state; states of other shards in it are passed over.

        Raises UserError when a shard of this stream has no state.
        """
        missing = [str(shard) for shard in self.shard_ids if str(shard) not in state]
        if missing:
            raise UserError(
                f"the saved data state lacks shard {', '.join(missing)} (it has "
                f"{', '.join(state) or 'none'}); the number of data shards must stay as it was"
            )
        self._batches.set_state({str(shard): state[str(shard)] for shard in self.shard_ids})

    def steps_per_epoch(self, merge: Merge = dict) -> int:
        """Global batches in one epoch: as many rows as all used data sets hold together.

        Counted by packing that many rows of every shard, so it encodes the data once; what it
        encodes is remembered for the stream.
        """
        sequences = {str(shard): self._sequences(shard) for shard in self.shard_ids}
        return math.ceil(sum(merge(sequences).values()) / self._global_batch)

    def close(self) -> None:
        """Stops the background thread."""
        self._batches.close()

    def _sequences(self, shard: int) -> int:
        """How many an epoch of the shard packs into."""
        rows = sum(len(_shard_of(source, shard, self._shards)) for source in self._sources)
        return sum(1 for _ in self._packed(self._mixed(shard).slice(slice(rows)), shard))

    def _mixed(self, shard: int) -> grain.MapDataset:
        """The endless sequence of this shard's rows."""
        parts = [_shard_of(source, shard, self._shards) for source in self._sources]
        if self._weights is None:
            parts = [grain.MapDataset.concatenate(parts)]
        parts = [
            part.shuffle(seed=_seed(self._seed, shard, number)).repeat()
            for number, part in enumerate(parts)
        ]
        return grain.MapDataset.mix(parts, self._weights)

    def _packed(self, rows: grain.MapDataset, shard: int) -> grain.IterDataset:
        """Sequences of T codes. Unpacked is packed with one row to a sequence."""
        inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return FirstFitPackIterDataset(
            rows.to_iter_dataset(inline),
            length_struct={"codes": self._encoder.length},
            num_packing_bins=PACK_BINS if self._pack else 1,
            max_sequences_per_bin=None if self._pack else 1,
            meta_features=("facts",),
            padding_struct={"codes": self._encoder.tokenizer.pad_id * 2},
            seed=_seed(self._seed, shard, -1),
        )


def make_stream(
    datasets: Mapping[str, Sequence[dict]],
    weights: Mapping[str, float] | None,
    tokenizer: Tokenizer,
    template: Template,
    mask: str,
    length: int,
    global_batch: int,
    shards: int,
    seed: int,
    pack: bool = True,
    shard_ids: Sequence[int] | None = None,
    languages: Mapping[str, int] | None = None,
) -> BatchStream:
    """The training stream over named data sets (random access to conversation rows).

    `weights` are relative rows drawn from each data set (0 leaves one out); None draws every row of
    all data sets once an epoch. `shard_ids` are the shards this process reads (None: all).
    Raises UserError when the parts do not fit together.
    """
    names = _used(datasets, weights)
    shard_ids = tuple(range(shards)) if shard_ids is None else tuple(sorted(shard_ids))
    if length < 2:
        raise UserError(f"length {length}: a sequence needs at least 2 tokens")
    if shards < 1 or global_batch < 1 or global_batch % shards:
        raise UserError(
            f"the global batch ({global_batch}) must be a multiple of the data shards ({shards})"
        )
    if not shard_ids or len(set(shard_ids)) < len(shard_ids) or set(shard_ids) - {*range(shards)}:
        raise UserError(f"shard_ids {shard_ids}: expected distinct numbers from 0 to {shards - 1}")
    for name in names:
        if len(datasets[name]) < shards:
            raise UserError(
                f"data set {name!r} has {len(datasets[name])} rows, fewer than the {shards} data "
                "shards; use fewer shards or leave it out"
            )
    encoder = Encoder(tokenizer, template, mask, length, languages)
    sources = [EncodedRows(datasets[n], encoder, CACHE_BYTES // len(names)) for n in names]
    shares = None if weights is None else [float(weights[name]) for name in names]
    return BatchStream(sources, shares, encoder, global_batch, shards, seed, pack, shard_ids)


def epoch_batches(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    template: Template,
    mask: str,
    length: int,
    batch: int,
    shards: int = 1,
    shard_ids: Sequence[int] | None = None,
    languages: Mapping[str, int] | None = None,
) -> Iterator[Batch]:
    """Batches for evaluation: each row once, in order, one row to a sequence.

    The last batch is filled up with padding (`segment_ids` 0). As in training, row i of a batch
    belongs to shard i mod `shards`, and only the rows of `shard_ids` are given, so that every
    process makes the same number of steps. Arrays as those of `BatchStream`.
    """
    if batch % shards:
        raise UserError(f"the batch ({batch}) must be a multiple of the data shards ({shards})")
    encoder = Encoder(tokenizer, template, mask, length, languages)
    mine = range(shards) if shard_ids is None else shard_ids
    own = [i for i in range(batch) if i % shards in set(mine)]
    for start in range(0, len(rows), batch):
        numbers = [start + i for i in own]
        yield _assemble([_alone(rows, number, encoder) for number in numbers], encoder)


class _ShardRows:
    """Whole batches from the shards' sequences; the state and the counts are kept by shard."""

    def __init__(self, sequences: dict[int, grain.DatasetIterator], encoder: Encoder, rounds: int):
        self._sequences, self._encoder, self._rounds = sequences, encoder, rounds
        self._counts = {shard: np.zeros(len(COUNTS), np.int64) for shard in sequences}

    def __iter__(self) -> "_ShardRows":
        return self

    def __next__(self) -> Batch:
        elements = []
        for _ in range(self._rounds):
            for shard, sequence in self._sequences.items():
                element = next(sequence)
                self._counts[shard] += np.sum(element["facts"], axis=0)[: len(COUNTS)]
                elements.append(element)
        return _assemble(elements, self._encoder)

    def get_state(self) -> dict[str, dict]:
        return {
            str(shard): {"sequences": sequence.get_state(), "counts": self._counts[shard].tolist()}
            for shard, sequence in self._sequences.items()
        }

    def set_state(self, state: Mapping[str, dict]) -> None:
        for shard, sequence in self._sequences.items():
            sequence.set_state(state[str(shard)]["sequences"])
            self._counts[shard] = np.asarray(state[str(shard)]["counts"], np.int64)


def _assemble(elements: Sequence[dict], encoder: Encoder) -> Batch:
    codes_BxT = np.stack([element["codes"] for element in elements])
    segments_BxT = np.stack([element["codes_segment_ids"] for element in elements])
    batch = {
        "tokens": codes_BxT >> 1,
        "loss_mask": codes_BxT & 1,
        "segment_ids": segments_BxT,
        "positions": np.stack([element["codes_positions"] for element in elements]),
    }
    if encoder.languages is not None:
        ids = [[-1, *(int(facts[-1]) for facts in element["facts"])] for element in elements]
        rows = [np.asarray(i, np.int32)[s] for i, s in zip(ids, segments_BxT, strict=True)]
        batch["language_ids"] = np.stack(rows)
    return batch


def _alone(rows: Sequence[dict], number: int, encoder: Encoder) -> dict:
    """A sequence that holds one row, or only padding when there is no such row."""
    codes_T = np.full(encoder.length, encoder.tokenizer.pad_id * 2, np.int32)
    segments_T, positions_T = np.zeros_like(codes_T), np.zeros_like(codes_T)
    facts = []
    if number < len(rows):
        encoded = encoder(rows[number])
        count = len(encoded.codes)
        codes_T[:count], segments_T[:count], positions_T[:count] = encoded.codes, 1, range(count)
        facts = [_facts(encoded)]
    return {
        "codes": codes_T,
        "codes_segment_ids": segments_T,
        "codes_positions": positions_T,
        "facts": facts,
    }


def _facts(encoded: Encoded) -> np.ndarray:
    """int64 [6]: what COUNTS names, for one row, and its language id."""
    targets = int(encoded.loss_mask.sum())
    count = len(encoded.codes)
    values = [1, count, targets, encoded.truncated, targets == 0, encoded.language_id]
    return np.asarray(values, np.int64)


def _used(datasets: Mapping[str, Sequence], weights: Mapping[str, float] | None) -> list[str]:
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
