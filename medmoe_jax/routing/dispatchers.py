"""Dispatchers: tokens become rows sorted by expert, and rows become tokens again.

Axes: T tokens of this device, K picks a token, M = T·K rows, D width, E experts, P devices along
the mesh axis of experts, L = E / P experts of each, C rows that one device may send another,
S = P·C.

A row stands for one pick of one token. No pick is ever left out; picks of E, which stand for none,
come last and belong to no expert. A dispatcher sees one device's tokens: under a mesh it runs
inside `jax.shard_map`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from medmoe_jax.kernels.permute import MAX_EXPERTS, Order, gather, scatter_add, sort_by_expert


class SortedRows(NamedTuple):
    """What the experts of this device work on.

    Attributes:
      x_MxD: sorted by expert; rows after the last expert's hold anything.
      weight_M: float32, of each row's pick.
      sizes_E: int32, rows of each expert of this device.
    """

    x_MxD: Any
    weight_M: Any
    sizes_E: Any


class Dispatcher(Protocol):
    """Brings tokens to their experts and the results back."""

    def dispatch(
        self, x_TxD: jax.Array, picks_TxK: jax.Array, weights_TxK: jax.Array, experts: int
    ) -> tuple[SortedRows, Any]:
        """Rows for the experts of this device, and their journey, which `combine` turns back.

        Args:
          x_TxD: tokens.
          picks_TxK: int32, different experts of each token, or E for none.
          weights_TxK: float32.
          experts: E.
        """
        ...

    def combine(self, journey: Any, y_MxD: jax.Array, /) -> jax.Array:
        """The sum of each token's rows, `[T, D]` in y's dtype."""
        ...


def _sorted(x_TxD, picks_TxK, weights_TxK, experts: int, backend: str) -> tuple[SortedRows, Order]:
    # The counting kernel has no room for more; XLA's sort has.
    counting = backend if experts <= MAX_EXPERTS else "xla"
    order = sort_by_expert(picks_TxK, experts, backend=counting)
    x_MxD = gather(x_TxD, order, backend=backend)
    return SortedRows(x_MxD, weights_TxK.reshape(-1)[order.source_M], order.sizes_E), order


@dataclass(frozen=True)
class LocalDispatcher:
    """Every expert is on this device; tokens stay.

    Attributes:
      backend: what the kernels run by.
    """

    backend: str

    def dispatch(
        self, x_TxD: jax.Array, picks_TxK: jax.Array, weights_TxK: jax.Array, experts: int
    ) -> tuple[SortedRows, Order]:
        """See `Dispatcher`."""
        return _sorted(x_TxD, picks_TxK, weights_TxK, experts, self.backend)

    def combine(self, journey: Order, y_MxD: jax.Array) -> jax.Array:
        """See `Dispatcher`."""
        return scatter_add(y_MxD, journey, backend=self.backend)


class Parcels(NamedTuple):
    """Which rows of an array go where, int32 `[P]` each.

    Attributes:
      start, count: the rows for each device.
      landing: where they begin on that device.
      expected: rows that each device sends here.
    """

    start: Any
    count: Any
    landing: Any
    expected: Any


def _ragged_exchange(x_NxD, parcels: Parcels, rows: int, axis: str):
    """Send parcels along a mesh axis: `[rows, D]`, zero where none landed; TPU and GPU."""
    out = jnp.zeros((rows, x_NxD.shape[1]), x_NxD.dtype)
    return jax.lax.ragged_all_to_all(
        x_NxD,
        out,
        parcels.start,
        parcels.count,
        parcels.landing,
        parcels.expected,
        axis_name=axis,
    )


def _padded_exchange(x_NxD, parcels: Parcels, rows: int, most: int, axis: str):
    """The same on any device: every parcel is filled up to `most` rows, the most that one has."""
    c_1xC = jnp.arange(most, dtype=jnp.int32)[None]
    taken_PxC = jnp.where(
        c_1xC < parcels.count[:, None], parcels.start[:, None] + c_1xC, len(x_NxD)
    )
    x_PxCxD = x_NxD.at[taken_PxC].get(mode="fill", fill_value=0)
    x_PxCxD = _swap(x_PxCxD, axis)
    landing_Px1 = _swap(parcels.landing, axis)[:, None]
    put_PxC = jnp.where(c_1xC < parcels.expected[:, None], landing_Px1 + c_1xC, rows)
    out = jnp.zeros((rows, x_NxD.shape[1]), x_NxD.dtype)
    return out.at[put_PxC].set(x_PxCxD, mode="drop")


def _swap(x, axis: str):
    """Entry p goes to device p, whose entry for this device takes its place."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


class _Journey(NamedTuple):
    """The way of the rows: sorted at home, sent out, sorted where the experts are."""

    home: Order
    out: Parcels
    back: Parcels
    away: Order


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts lie on the devices of a mesh axis in turn; tokens travel to them and back.

    A device has room for the most that the others can send it, so that none is turned away.

    Attributes:
      axis, devices: the mesh axis and P.
      ragged: whether the devices can exchange parcels of different sizes (TPU and GPU).
      backend: what the kernels run by.
    """

    axis: str
    devices: int
    ragged: bool
    backend: str

    def dispatch(
        self, x_TxD: jax.Array, picks_TxK: jax.Array, weights_TxK: jax.Array, experts: int
    ) -> tuple[SortedRows, _Journey]:
        """See `Dispatcher`."""
        P, most = self.devices, self._most(picks_TxK, experts)
        rows, home = _sorted(x_TxD, picks_TxK, weights_TxK, experts, self.backend)
        mine_PxL = rows.sizes_E.reshape(P, -1)
        theirs_PxL = _swap(mine_PxL, self.axis)
        count_P, expected_P = mine_PxL.sum(1), theirs_PxL.sum(1)
        start_P = jnp.cumsum(count_P) - count_P
        here_P = jnp.full(P, jax.lax.axis_index(self.axis) * most, jnp.int32)
        out = Parcels(start_P, count_P, here_P, expected_P)
        slot_P = jnp.arange(P, dtype=jnp.int32) * most
        back = Parcels(slot_P, expected_P, _swap(start_P, self.axis), count_P)
        x_SxD = self._carry(rows.x_MxD, out, P * most, most)
        weight_Sx1 = self._carry(rows.weight_M[:, None], out, P * most, most)
        # The rows of one sender come sorted by expert; slots beyond them are no expert's.
        find = jax.vmap(lambda end_L: jnp.searchsorted(end_L, jnp.arange(most), side="right"))
        expert_PxC = find(jnp.cumsum(theirs_PxL, axis=1)).astype(jnp.int32)
        expert_Sx1 = expert_PxC.reshape(-1, 1)
        rows, away = _sorted(x_SxD, expert_Sx1, weight_Sx1, experts // P, self.backend)
        return rows, _Journey(home, out, back, away)

    def combine(self, journey: _Journey, y_SxD: jax.Array) -> jax.Array:
        """See `Dispatcher`."""
        y_SxD = scatter_add(y_SxD, journey.away, backend=self.backend)
        most = y_SxD.shape[0] // self.devices
        y_MxD = self._carry(y_SxD, journey.back, journey.home.source_M.size, most)
        return scatter_add(y_MxD, journey.home, backend=self.backend)

    def _most(self, picks_TxK, experts: int) -> int:
        """The most rows for one device: a token's picks differ, so L bounds them too."""
        T, K = picks_TxK.shape
        return T * min(K, experts // self.devices)

    def _carry(self, x_NxD, parcels: Parcels, rows: int, most: int):
        if self.ragged:
            return _ragged_exchange(x_NxD, parcels, rows, self.axis)
        return _padded_exchange(x_NxD, parcels, rows, most, self.axis)
