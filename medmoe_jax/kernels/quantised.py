"""Weights that are stored in fewer bits than they are computed with, and unpacked in VMEM.

Axes: D input width, O output width, of the weight; a row runs along O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Quantised(Protocol):
    """A weight `[D, O]` as a pytree of arrays `[rows, O]`; `base.quantised` has two.

    Attributes:
      rows_held: how many rows of the weight a row of each array holds; 0 = its one row holds all.
    """

    rows_held: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        ...

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The weight's values."""
        ...

    @staticmethod
    def unpack(*arrays: jax.Array) -> jax.Array:
        """Float32 values of the rows and columns that parts of the arrays hold.

        It also runs in a kernel, where bytes come widened to int32.
        """
        ...


class Storage(NamedTuple):
    """How a quantised weight lies in memory.

    Attributes:
      rows_held, unpack: see `Quantised`.
      itemsizes: bytes of a number of each array.
    """

    rows_held: tuple[int, ...]
    itemsizes: tuple[int, ...]
    unpack: Callable[..., jax.Array]

    @property
    def granule(self) -> int:
        """Rows of the weight at whose multiples blocks may be cut: whole tiles of each array."""
        arrays = zip(self.rows_held, self.itemsizes, strict=True)
        return math.lcm(*(held * 32 // size for held, size in arrays if held))

    def holds(self, rows: int) -> bool:
        """Whether so many rows of the weight fill whole rows of each array."""
        return not any(held and rows % held for held in self.rows_held)

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a block of the weight."""
        arrays = zip(self.rows_held, self.itemsizes, strict=True)
        return columns * sum(size * (rows // held if held else 1) for held, size in arrays)

    def values(self, blocks: Sequence[Any], dtype: DTypeLike) -> jax.Array:
        """A block of the weight, of references to its arrays' blocks."""
        arrays = (block[...] for block in blocks)
        # TPUs compute with bytes as int32 only.
        wide = (a.astype(jnp.int32) if a.dtype.itemsize == 1 else a for a in arrays)
        return self.unpack(*wide).astype(dtype)


def storage_of(weight: Any) -> Storage | None:
    """How a quantised weight lies in memory; None = it is an array."""
    if not hasattr(weight, "rows_held"):
        return None
    itemsizes = tuple(array.dtype.itemsize for array in jax.tree.leaves(weight))
    return Storage(weight.rows_held, itemsizes, weight.unpack)
