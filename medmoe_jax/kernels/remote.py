"""Rows from device to device by remote DMA, as many as each has for each other: Pallas for TPU.

Axes: N rows here before, M rows here after, D width, P devices along the mesh axis.

`jax.lax.ragged_all_to_all` is the same in XLA. Here every parcel leaves at once and straight into
its place on the other chip. A DMA has a fixed size, so a parcel of n rows goes as one copy for each
bit of n; rows are kept apart (`[N, 1, D]`), so that a copy may begin at any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from medmoe_jax.errors import UserError

# Kernels that may run at the same time need different barriers; exchanges follow one another.
_COLLECTIVE_ID = 7


def _kernel(
    start_P,
    count_P,
    landing_P,
    expected_P,
    x_ref,
    _,
    out_ref,
    sent,
    arrived,
    *,
    most: int,
    axis: str,
):
    """`sent` and `arrived` count the bytes of copies from and to this device."""
    P = start_P.shape[0]
    sizes = [1 << bit for bit in reversed(range(most.bit_length()))]

    def each_copy(rows, begin, land, device, act):
        """`act` on the copy of every bit of `rows`, larger ones first."""
        for size in sizes:
            before = rows & ~(2 * size - 1)

            @pl.when(rows & size != 0)
            def _(size=size, before=before):
                act(
                    pltpu.make_async_remote_copy(
                        x_ref.at[pl.ds(begin + before, size)],
                        out_ref.at[pl.ds(land + before, size)],
                        sent,
                        arrived,
                        device_id={axis: device},
                    )
                )

    def each_device(body):
        jax.lax.fori_loop(0, P, lambda p, carry: (body(p), carry)[1], 0)

    # Nobody writes before everybody's result is there to be written to.
    barrier = pltpu.get_barrier_semaphore()
    each_device(lambda p: pl.semaphore_signal(barrier, 1, device_id={axis: p}))
    pl.semaphore_wait(barrier, P)
    each_device(
        lambda p: each_copy(count_P[p], start_P[p], landing_P[p], p, lambda copy: copy.start())
    )
    each_device(lambda p: each_copy(count_P[p], 0, 0, p, lambda copy: copy.wait_send()))
    each_device(lambda p: each_copy(expected_P[p], 0, 0, p, lambda copy: copy.wait_recv()))


def _run(x_NxD, parcels, rows: int, most: int, axis: str, backend: str):
    width = x_NxD.shape[1]
    x_Nx1xD, zeros = x_NxD[:, None], jnp.zeros((rows, 1, width), x_NxD.dtype)
    out_Mx1xD = pl.pallas_call(
        functools.partial(_kernel, most=most, axis=axis),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
        ),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(collective_id=_COLLECTIVE_ID, has_side_effects=True),
        interpret=pltpu.InterpretParams(detect_races=True) if backend == "interpret" else False,
        name="remote_exchange",
    )(*parcels, x_Nx1xD, zeros)
    return out_Mx1xD[:, 0]


def _swap(x_P, axis: str):
    return jax.lax.all_to_all(x_P, axis, split_axis=0, concat_axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _exchange(x_NxD, parcels, rows: int, most: int, axis: str, backend: str):
    return _run(x_NxD, parcels, rows, most, axis, backend)


def _exchange_fwd(x_NxD, parcels, rows, most, axis, backend):
    return _run(x_NxD, parcels, rows, most, axis, backend), (parcels, x_NxD.shape[0])


def _exchange_bwd(rows, most, axis, backend, saved, dy_MxD):
    """Every row's gradient goes back where the row came from."""
    (start, count, landing, expected), before = saved
    back = (_swap(landing, axis), expected, _swap(start, axis), count)
    return _run(dy_MxD, back, before, most, axis, backend), None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def remote_exchange(
    x_NxD, parcels: Sequence[Any], rows: int, most: int, axis: str, *, backend: str
):
    """Send rows along a mesh axis, inside `jax.shard_map`.

    Args:
      x_NxD: what is sent from; no row to two devices.
      parcels: four int32 `[P]`: the first row for each device, how many, where they begin on that
        device (parcels do not overlap there), and how many rows each device sends here.
      rows: M.
      most: no parcel has more rows.
      axis: the mesh axis.
      backend: "pallas", or "interpret", which also detects races.

    Returns:
      `[M, D]` in x's dtype, zero where nothing landed.

    Raises:
      UserError: another backend: plain JAX cannot send as much as there is.
    """
    if backend not in ("pallas", "interpret"):
        raise UserError(f"remote_exchange: backend '{backend}' is none of pallas, interpret")
    return _exchange(x_NxD, tuple(parcels), rows, most, axis, backend)
