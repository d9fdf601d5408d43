"""The permutation's Pallas kernels for TPU: counting picks, and adding up rows fetched by index.

Axes: M pairs or rows, E experts, R experts, "none" and padding, N source rows, K rows added,
D width, in `sum_rows` filled up to whole tiles, W = D 32-bit words of a row, or D/2 of bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.tiles import LANES, ceil_div, options

MAX_EXPERTS = 1024
MAX_PAIRS = 2**24  # a count is exact in float32 up to here
_COUNT_BLOCK = 512
_ROW_BYTES = 16 * 2**20  # for the blocks of one step of `sum_rows`, both copies of each


def _count_kernel(picks_ref, position_ref, sizes_ref, next_ref):
    """Pass 0 counts each expert's pairs; pass 1 hands out rows, from `next` on, in order of pairs.

    Prefix sums are products with triangles of ones, which the matrix unit takes.
    """
    phase, block = pl.program_id(0), pl.program_id(1)
    R, M = next_ref.shape[0], picks_ref.shape[1]
    hit_RxM = jax.lax.broadcasted_iota(jnp.int32, (R, M), 0) == picks_ref[...]
    ones_RxM = jnp.where(hit_RxM, 1.0, 0.0)

    @pl.when((phase == 0) & (block == 0))
    def _():
        next_ref[...] = jnp.zeros_like(next_ref)

    @pl.when((phase == 1) & (block == 0))
    def _():
        sizes_ref[...] = next_ref[...].astype(jnp.int32)
        row = jax.lax.broadcasted_iota(jnp.int32, (R, R), 0)
        earlier_RxR = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (R, R), 1) < row, 1.0, 0.0)
        next_ref[...] = jnp.dot(
            earlier_RxR,
            next_ref[...],
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    @pl.when(phase == 1)
    def _():
        column = jax.lax.broadcasted_iota(jnp.int32, (M, M), 1)
        earlier_MxM = jax.lax.broadcasted_iota(jnp.int32, (M, M), 0) < column
        before_RxM = jnp.dot(
            ones_RxM.astype(jnp.bfloat16),
            jnp.where(earlier_MxM, 1.0, 0.0).astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        rows_RxM = jnp.where(hit_RxM, before_RxM + next_ref[:, :1], 0.0)
        position_ref[...] = jnp.sum(rows_RxM, axis=0, keepdims=True).astype(jnp.int32)

    next_ref[...] += jnp.sum(ones_RxM, axis=1, keepdims=True)


def count(picks_M: jax.Array, n_experts: int, backend: str) -> tuple[jax.Array, jax.Array]:
    """`(position_M, sizes_E)` of a stable counting sort; see `medmoe_jax.kernels.permute`.

    Raises:
      UserError: more experts or pairs than the kernel counts.
    """
    M = picks_M.size
    if n_experts > MAX_EXPERTS or not 0 < M <= MAX_PAIRS:
        raise UserError(
            f"sorting {M} picks of {n_experts} experts: the kernel takes 1 to {MAX_PAIRS} picks "
            f"and {MAX_EXPERTS} experts; use backend 'xla'"
        )
    rows = 8 * ceil_div(n_experts + 1, 8)
    block = min(_COUNT_BLOCK, LANES * ceil_div(M, LANES))
    blocks = ceil_div(M, block)
    # A pick of -1 counts nowhere: the tail of the last block.
    picks_NxM = jnp.pad(picks_M, (0, blocks * block - M), constant_values=-1)
    position_NxM, sizes_RxL = pl.pallas_call(
        _count_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((blocks, 1, block), jnp.int32),
            jax.ShapeDtypeStruct((rows, LANES), jnp.int32),
        ],
        grid=(2, blocks),
        in_specs=[pl.BlockSpec((None, 1, block), lambda phase, n: (n, 0, 0))],
        out_specs=[
            pl.BlockSpec((None, 1, block), lambda phase, n: (n * phase, 0, 0)),
            pl.BlockSpec((rows, LANES), lambda phase, n: (0, 0)),
        ],
        scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.float32)],
        name="count_picks",
        **options(backend, ("arbitrary", "arbitrary")),
    )(picks_NxM.reshape(blocks, 1, block))
    return position_NxM.reshape(-1)[:M], sizes_RxL[:n_experts, 0]


def _words(rows_NxD):
    """Rows of 32-bit words: two bfloat16 share a sublane, so one row alone cannot be fetched.

    A bfloat16 row becomes half as many words: its first half in the low, its second half in the
    high 16 bits. Halves end at a multiple of 128; where D is an odd multiple, zeros fill up.
    """
    if rows_NxD.dtype == jnp.float32:
        return rows_NxD
    half = LANES * ceil_div(rows_NxD.shape[1], 2 * LANES)
    low_NxW = rows_NxD[:, :half]
    high_NxW = jnp.pad(rows_NxD[:, half:], ((0, 0), (0, 2 * half - rows_NxD.shape[1])))

    def bits(x_NxW):
        return jax.lax.bitcast_convert_type(x_NxW, jnp.uint16).astype(jnp.uint32)

    return bits(low_NxW) | (bits(high_NxW) << 16)


def _sum_kernel(index_ref, next_ref, live_ref, rows_ref, out_ref, words_ref, total_ref, arrived):
    """One step adds row `index[k, m]` to each m of a block, while the next step's rows travel."""
    k, K = pl.program_id(1), pl.num_programs(1)
    step, steps = pl.program_id(0) * K + k, pl.num_programs(0) * K
    slot = jax.lax.rem(step, 2)

    def travel(index_ref, slot, action):
        def one(m, _):
            # Index -1 fetches row 0, which then counts nothing.
            row = pl.ds(jnp.maximum(index_ref[0, m], 0), 1)
            copy = pltpu.make_async_copy(
                rows_ref.at[row], words_ref.at[slot, pl.ds(m, 1)], arrived.at[slot]
            )
            action(copy)
            return _

        jax.lax.fori_loop(0, out_ref.shape[0], one, 0)

    @pl.when(step == 0)
    def _():
        travel(index_ref, slot, lambda copy: copy.start())

    @pl.when(step + 1 < steps)
    def _():
        travel(next_ref, 1 - slot, lambda copy: copy.start())

    @pl.when(k == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    travel(index_ref, slot, lambda copy: copy.wait())
    D, W = out_ref.shape[1], words_ref.shape[2]
    live_Mx1 = live_ref[...].reshape(-1, 1) > 0
    words_MxW = words_ref[slot]
    if words_MxW.dtype == jnp.float32:
        total_ref[...] += jnp.where(live_Mx1, words_MxW, 0.0)
    else:
        low_MxW = jax.lax.bitcast_convert_type(words_MxW << 16, jnp.float32)
        high_MxW = jax.lax.bitcast_convert_type(words_MxW & jnp.uint32(0xFFFF0000), jnp.float32)
        total_ref[:, :W] += jnp.where(live_Mx1, low_MxW, 0.0)
        if D > W:  # rows of one tile have no second half
            total_ref[:, W:] += jnp.where(live_Mx1, high_MxW[:, : D - W], 0.0)

    @pl.when(k == K - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _row_block(M: int, D: int) -> int:
    """Rows a step, a power of two: two copies of fetched words and of the output, one total.

    Raises:
      UserError: a width of which not even 8 rows fit.
    """
    block = 256
    while block > 8 and (block * D * 20 > _ROW_BYTES or block >= 2 * M):
        block //= 2
    if block * D * 20 > _ROW_BYTES:
        raise UserError(f"rows of width {D}: 8 of them do not fit; use backend 'xla'")
    return block


def sum_rows(rows_NxD: jax.Array, index_KxM: jax.Array, backend: str) -> jax.Array:
    """`out[m] = Σ_k rows[index[k, m]]`, in order of k, added in float32; index -1 adds nothing.

    Raises:
      UserError: see `_row_block`.
    """
    K, M = index_KxM.shape
    width = rows_NxD.shape[1]
    # A row travels in whole tiles.
    rows_NxD = jnp.pad(rows_NxD, ((0, 0), (0, -width % LANES)))
    D = rows_NxD.shape[1]
    words_NxW = _words(rows_NxD)
    block = _row_block(M, D)
    blocks = ceil_div(M, block)
    index_KxM = jnp.pad(index_KxM, ((0, 0), (0, blocks * block - M)), constant_values=-1)
    # One line a step, in the order of steps.
    index_SxB = index_KxM.reshape(K, blocks, block).swapaxes(0, 1).reshape(blocks * K, 1, block)

    def line(ahead, memory):
        def which(n, k):
            return jnp.minimum(n * K + k + ahead, blocks * K - 1), 0, 0

        return pl.BlockSpec((None, 1, block), which, memory_space=memory)

    sums_MxD = pl.pallas_call(
        _sum_kernel,
        out_shape=jax.ShapeDtypeStruct((M, D), rows_NxD.dtype),
        grid=(blocks, K),
        in_specs=[
            line(0, pltpu.SMEM),
            line(1, pltpu.SMEM),
            line(0, pltpu.VMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((block, D), lambda n, k: (n, 0)),
        scratch_shapes=[
            pltpu.VMEM((2, block, words_NxW.shape[1]), words_NxW.dtype),
            pltpu.VMEM((block, D), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        name="sum_rows",
        **options(backend, ("arbitrary", "arbitrary")),
    )(index_SxB, index_SxB, jnp.where(index_SxB < 0, 0, 1), words_NxW)
    return sums_MxD[:, :width]
