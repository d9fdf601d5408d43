"""Training rows of files that are larger than memory, read and encoded while they are trained on.

A data shard owns equally much of the files as any other, in blocks (`data.blocks`) that come in a
new order every epoch. Their rows are shuffled in a window as they come, and encoded when they leave
it. A window ends with its shard's epoch, so that each row comes once in it. Grain keeps the place
of all this, so that a stream goes on exactly where it was.

Axis legend: S data shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FlatMapIterDataset

from medmoe_jax.data.blocks import Block, File, deal, make_blocks
from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.encoded_rows import Element, element
from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.data.order import endless
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import PAIR

_TRIED = 100
# Stands behind the last row of an epoch, where its last window ends.
_END = object()

# Makes a conversation row of an item that stands at a place.
Read = Callable[[Any, str], Conversation]


INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class _Reading(grain.experimental.FlatMapTransform):
    """Makes blocks their rows, each with its block; the last of an epoch has an end, too."""

    max_fan_out = 1 << 40

    def __init__(self, blocks: int, no_row: str) -> None:
        self._blocks, self._no_row, self._empty = blocks, no_row, 0

    def flat_map(self, element: tuple[Block, bool]) -> Sequence[Any]:
        block, is_last = element
        rows = block.read()
        self._empty = 0 if len(rows) else self._empty + 1
        if self._empty > 2 * self._blocks:  # a whole epoch
            raise UserError(self._no_row)
        return _OfBlock(block, rows, is_last)


class _OfBlock(OnDemand[Any]):
    """Rows, each with the block that it is of, and an end if it is the last block."""

    def __init__(self, block: Block, rows: Sequence[Any], is_last: bool) -> None:
        self._block, self._rows, self._is_last = block, rows, is_last

    def __len__(self) -> int:
        return len(self._rows) + self._is_last

    def item(self, index: int) -> Any:
        if self._is_last and index == len(self._rows):
            return _END
        return self._block, self._rows[index]


class Each(grain.experimental.FlatMapTransform):
    """Makes each element those that a function gives."""

    max_fan_out = 1 << 40

    def __init__(self, parts: Callable[[Any], Sequence[Any]]) -> None:
        self._parts = parts

    def flat_map(self, element: Any) -> Sequence[Any]:
        return self._parts(element)


class _Windows(grain.IterDataset):
    """Makes rows windows of at most `size` of an epoch, each a list in an order of its own."""

    def __init__(self, rows: grain.IterDataset, size: int, seed: int) -> None:
        super().__init__(rows)
        self._order = size, seed

    def __iter__(self) -> _WindowIterator:
        return _WindowIterator(iter(self._parent), *self._order)


class _WindowIterator(grain.DatasetIterator):
    # Grain's own windows do not end with an epoch, and its shuffle takes a quarter of a
    # millisecond a row.

    def __init__(self, rows: grain.DatasetIterator, size: int, seed: int) -> None:
        super().__init__(rows)
        self._size, self._seed, self._number = size, seed, 0

    def __next__(self) -> list[Any]:
        rows = []
        while len(rows) < self._size:
            if (row := next(self._parent)) is not _END:
                rows.append(row)
            elif rows:
                break
        generator = np.random.default_rng((self._seed, self._number, 1))  # not that of the blocks
        self._number += 1
        return [rows[place] for place in generator.permutation(len(rows))]

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._parent.get_state(), "window": self._number}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._parent.set_state(state["rows"])
        self._number = state["window"]


class StreamedRows:
    """The training rows of some files, cut at `length` tokens.

    Only the first rows are encoded when it is made, so that a wrong form or template shows before
    anything else begins.

    Attributes:
      name: of the data set.
      files: of which the rows are.
      encoder: what encodes the rows.
      length: tokens at which a row is cut.
      window: rows that are shuffled together, of all data shards.
      blocks: of each data shard.
      digest: of the files' content.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[File],
        read: Read,
        encoder: Encoder,
        length: int,
        window: int,
        shards: int,
    ) -> None:
        """
        Args:
          name, files, encoder, length, window: see the class.
          read: makes a conversation row of an item that stands at a place.
          shards: S, which share the rows.

        Raises:
          UserError: a file cannot be read, there is no row or there are fewer rows than shards, or
            one of the first rows cannot be used.
        """
        PAIR.check("length", length)
        self.name, self.encoder, self.length, self.window = name, encoder, length, window
        self.files, self._read = files, read
        blocks = make_blocks(files, shards)
        read_one = ((block, rows) for block in blocks if len(rows := block.read()))
        first, rows = next(read_one, (None, ()))
        if first is None:
            shown = ", ".join(file.shown for file in files)
            raise UserError(f"source '{name}': {shown}: no row in it")
        self.blocks = deal(blocks, shards)
        if not all(self.blocks):
            raise UserError(
                f"source '{name}': its files have fewer rows than the {shards} data shards; use "
                "fewer data shards"
            )
        for number in range(min(len(rows), _TRIED)):
            self._encode((first, rows[number]))

    @property
    def digest(self) -> str:
        """A hash of the files' content and the window, upon which the order of rows depends."""
        told = [[file.digest() for file in self.files], self.window]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def endless(self, shard: int, seed: int) -> grain.IterDataset:
        """The training rows of a shard, epoch after epoch; `seed`: of the order."""
        shards, own = len(self.blocks), self.blocks[shard]
        no_row = (
            f"source '{self.name}': data shard {shard} of {shards} holds no row; use fewer data "
            "shards"
        )
        blocks = endless(grain.MapDataset.source(own), seed).map_with_index(
            lambda index, block: (block, (index + 1) % len(own) == 0)
        )
        rows = FlatMapIterDataset(blocks.to_iter_dataset(INLINE), _Reading(len(own), no_row))
        windows = _Windows(rows, max(1, self.window // shards), seed)
        return FlatMapIterDataset(FlatMapIterDataset(windows, Each(list)), Each(self._encode))

    def _encode(self, found: tuple[Block, Any]) -> list[Element]:
        """The training rows of a row of a block. Raises UserError that begins with its place."""
        block, row = found
        item = block.decode(row)
        try:
            encoded = self.encoder.rows(self._read(item, "row"))
        except UserError:
            # Its place is known only where it is looked for, and stands in the second error.
            place = block.place(row)
            whole = self._read(item, place)
            try:
                encoded = self.encoder.rows(whole)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        return [element(one.cut(self.length)) for one in encoded]

    def __repr__(self) -> str:
        return f"StreamedRows({self.name!r}, {[file.shown for file in self.files]})"
