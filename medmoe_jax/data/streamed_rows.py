"""Training rows of files that are larger than memory, read and encoded while they are trained on.

A data shard owns every S-th block of the files (`data.blocks`), in a new order every epoch. The
rows of its blocks are shuffled in a window as they come, and encoded when they leave it. Grain
keeps the place of all this, so that a stream goes on exactly where it was.

Axis legend: S data shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FlatMapIterDataset

from medmoe_jax.data.blocks import Block, File, make_blocks
from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.encoded_rows import Element, element
from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.data.order import endless
from medmoe_jax.errors import UserError

_TRIED = 100

# Makes a conversation row of an item that stands at a place.
Read = Callable[[Any, str], Conversation]


INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class _Reading(grain.experimental.FlatMapTransform):
    """Makes blocks their rows, each with its block."""

    max_fan_out = 1 << 40

    def __init__(self, blocks: int, where: str) -> None:
        self._blocks, self._where, self._empty = blocks, where, 0

    def flat_map(self, element: Block) -> Sequence[tuple[Block, Any]]:
        rows = element.read()
        self._empty = 0 if len(rows) else self._empty + 1
        if self._empty > 2 * self._blocks:  # a whole epoch
            raise UserError(f"{self._where} holds no row; use fewer data shards")
        return _OfBlock(element, rows)


class _OfBlock(OnDemand[tuple[Block, Any]]):
    """Rows, each with the block that it is of."""

    def __init__(self, block: Block, rows: Sequence[Any]) -> None:
        self._block, self._rows = block, rows

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> tuple[Block, Any]:
        return self._block, self._rows[index]


class _Each(grain.experimental.FlatMapTransform):
    """Makes each element those that a function gives."""

    max_fan_out = 1 << 40

    def __init__(self, parts: Callable[[Any], Sequence[Any]]) -> None:
        self._parts = parts

    def flat_map(self, element: Any) -> Sequence[Any]:
        return self._parts(element)


def _shuffled(rows: list[Any], generator: np.random.Generator) -> list[Any]:
    return [rows[number] for number in generator.permutation(len(rows))]


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
          shards: S, to have as many blocks.

        Raises:
          UserError: a file cannot be read, there is no row or there are fewer blocks than shards,
            or one of the first rows cannot be used.
        """
        if length < 2:
            raise UserError(f"length {length}: a sequence needs at least 2 tokens")
        self.name, self.encoder, self.length, self.window = name, encoder, length, window
        self.files, self._read = files, read
        self.blocks = make_blocks(files, shards)
        read_one = ((block, rows) for block in self.blocks if len(rows := block.read()))
        first, rows = next(read_one, (None, ()))
        if first is None:
            shown = ", ".join(file.shown for file in files)
            raise UserError(f"source '{name}': {shown}: no row in it")
        if len(self.blocks) < shards:
            raise UserError(
                f"source '{name}': its files have {len(self.blocks)} rows or blocks, fewer than "
                f"the {shards} data shards; use fewer shards"
            )
        for number in range(min(len(rows), _TRIED)):
            self._encode((first, rows[number]))

    @property
    def digest(self) -> str:
        """A hash of the files' content and the window, upon which the order of rows depends."""
        told = [[file.digest() for file in self.files], self.window]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def endless(self, shard: int, shards: int, seed: int) -> grain.IterDataset:
        """The training rows of a shard, epoch after epoch.

        Args:
          shard, shards: which of how many.
          seed: of the order.
        """
        own = grain.MapDataset.source(self.blocks)[shard::shards]
        blocks = endless(own, seed).to_iter_dataset(INLINE)
        where = f"source '{self.name}': data shard {shard} of {shards}"
        rows = FlatMapIterDataset(blocks, _Reading(len(own), where))
        window = max(1, self.window // shards)
        # Grain's own shuffle in a window takes a quarter of a millisecond a row.
        windows = rows.batch(window, batch_fn=list).random_map(_shuffled, seed=seed)
        return FlatMapIterDataset(FlatMapIterDataset(windows, _Each(list)), _Each(self._encode))

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
