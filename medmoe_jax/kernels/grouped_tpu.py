"""Products of sorted rows with their group's matrix, in Pallas for TPU.

Axes: M rows, K contracted width, N output width, G groups, V visits.

Rows are sorted, so a tile of rows meets few groups. One *visit* is a tile together with one group
that has rows in it; the list of visits is computed from the sizes beforehand and read by the block
index maps (scalar prefetch), so a tile that several groups share is fetched once, computed once a
group, and rows of other groups are masked. The rows after the last group form a group of their own,
which zeroes its tiles and computes nothing. (The idea of visits is that of MegaBlocks, Gale et al.
2022, arXiv 2211.15841, and of its TPU rendition in JAX.)

Visits number at most `tiles + G`, so the rows computed exceed M by at most `G · tile`: `row_tile`
bounds that share.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from medmoe_jax.kernels.tiles import SMALLEST, Tiles, ceil_div, cheapest, keep, options, tile_of

# Rows that group borders may add, as a divisor of M: a quarter.
BORDER_SHARE = 4


class Visits(NamedTuple):
    """Which tile meets which group, int32 `[V]` each.

    Attributes:
      group: the group; the last one where there is nothing to do.
      tile: the tile of rows, ascending.
      low, high: the group's rows within the tile; `low == high` where there is nothing to do.
    """

    group: jax.Array
    tile: jax.Array
    low: jax.Array
    high: jax.Array


def row_tile(rows: int, groups: int) -> int:
    """Rows a tile, a power of two in 8..512, so that borders add at most a quarter of the rows."""
    tile = 512
    while tile > 8 and (tile * groups * BORDER_SHARE > rows or tile >= 2 * rows):
        tile //= 2
    return tile


def make_visits(sizes_G: jax.Array, rows: int, tile: int) -> Visits:
    """The visits of groups of `sizes_G` consecutive rows; an empty group has one, of no rows."""
    G = sizes_G.shape[0]
    tiles = ceil_div(rows, tile)
    # The rows after the last group, up to the end of the last tile, are group G.
    end = jnp.append(jnp.cumsum(sizes_G.astype(jnp.int32)), tiles * tile)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    first_tile = start // tile
    count = jnp.maximum(ceil_div(end, tile) - first_tile, 1)
    last_visit = jnp.cumsum(count)
    visit_V = jnp.arange(tiles + G, dtype=jnp.int32)
    group_V = jnp.searchsorted(last_visit, visit_V, side="right", method="compare_all")
    group_V = jnp.minimum(group_V, G)
    tile_V = first_tile[group_V] + visit_V - (last_visit - count)[group_V]
    tile_V = jnp.minimum(tile_V, tiles - 1)
    low_V = jnp.clip(start[group_V] - tile_V * tile, 0, tile)
    high_V = jnp.clip(end[group_V] - tile_V * tile, 0, tile)
    high_V = jnp.where(group_V < G, high_V, low_V)
    return Visits(jnp.minimum(group_V, G - 1), tile_V, low_V, high_V)


def _contract(x, w, dims):
    return jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=jnp.float32)


def _product_kernel(
    group_V, tile_V, low_V, high_V, x_ref, w_ref, y_ref, sum_ref, *, K: int, transposed: bool
):
    del group_V
    v, k = pl.program_id(1), pl.program_id(2)
    tk = x_ref.shape[1]
    low, high = low_V[v], high_V[v]

    @pl.when((k == 0) & ((v == 0) | (tile_V[v] != tile_V[jnp.maximum(v - 1, 0)])))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(low < high)
    def _():
        @pl.when(k == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        x, w = x_ref[...], w_ref[...]
        if K % tk:
            x = keep(x, 1, 0, K - k * tk)
            w = keep(w, 1 if transposed else 0, 0, K - k * tk)
        sum_ref[...] += _contract(x, w, ((1,), (1,)) if transposed else ((1,), (0,)))

        @pl.when(k == pl.num_programs(2) - 1)
        def _():
            row = jax.lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
            mine = (row >= low) & (row < high)
            y_ref[...] = jnp.where(mine, sum_ref[...].astype(y_ref.dtype), y_ref[...])


class GroupedShape(NamedTuple):
    """What block sizes depend on: rows, widths, groups, bytes of an operand and of a result."""

    M: int
    K: int
    N: int
    G: int
    itemsize: int
    out_itemsize: int

    def candidates(self) -> list[Tiles]:
        """Block sizes to choose from, the largest first.

        Outputs have at least two blocks where they are wide enough: v5p has two cores a chip.
        """
        m, half = row_tile(self.M, self.G), ceil_div(self.N, 2)
        widths = (32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128)
        return [
            Tiles(m, tile_of(self.K, k), tile_of(self.N, min(n, half)))
            for k in widths
            for n in widths
        ]

    def grid(self, t: Tiles) -> tuple[int, int, int, int]:
        """Tiles of rows, visits, and blocks of K and of N."""
        tiles = ceil_div(self.M, t.m)
        return tiles, tiles + self.G, ceil_div(self.K, t.k), ceil_div(self.N, t.n)

    def cost(self, t: Tiles, traffic: int) -> pl.CostEstimate:
        """FLOPs of every step of the grid, and the bytes given."""
        _, visits, nk, nn = self.grid(t)
        return pl.CostEstimate(
            flops=2 * visits * t.m * nk * t.k * nn * t.n,
            transcendentals=0,
            bytes_accessed=traffic,
        )


def product_tiling(shape: GroupedShape) -> tuple[Tiles, pl.CostEstimate]:
    """Blocks of `product`, and its cost at most."""

    def vmem(t):
        moving = t.m * t.k + t.k * t.n + t.m * t.n
        return 2 * shape.itemsize * moving + 4 * t.m * t.n

    def traffic(t):
        # A block that does not change between two steps of the grid is not fetched again.
        tiles, visits, nk, nn = shape.grid(t)
        x = (tiles if nk == 1 else visits) * t.m * nk * t.k * nn
        w = (shape.G if nk == 1 else visits) * nk * t.k * nn * t.n
        return (x + w + tiles * t.m * nn * t.n) * shape.itemsize

    what = f"a grouped [{shape.K}, {shape.N}] product"
    t = cheapest(what, shape.candidates(), vmem, traffic, SMALLEST)
    return t, shape.cost(t, traffic(t))


def product(
    x_MxK: jax.Array, w_GxKxN: jax.Array, sizes_G: jax.Array, *, transposed: bool, backend: str
) -> jax.Array:
    """`x[rows of g] · w[g]`, `[M, N]` in x's dtype; w is `[G, N, K]` where `transposed`."""
    M, K = x_MxK.shape
    G, N = w_GxKxN.shape[0], w_GxKxN.shape[1 if transposed else 2]
    itemsize = x_MxK.dtype.itemsize
    t, cost = product_tiling(GroupedShape(M, K, N, G, itemsize, itemsize))
    visits = make_visits(sizes_G, M, t.m)
    w_block = (None, t.n, t.k) if transposed else (None, t.k, t.n)

    def w_index(n, v, k, group_V, *_):
        return (group_V[v], n, k) if transposed else (group_V[v], k, n)

    return pl.pallas_call(
        functools.partial(_product_kernel, K=K, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((M, N), x_MxK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(ceil_div(N, t.n), visits.group.shape[0], ceil_div(K, t.k)),
            in_specs=[
                pl.BlockSpec((t.m, t.k), lambda n, v, k, _, tile_V, *__: (tile_V[v], k)),
                pl.BlockSpec(w_block, w_index),
            ],
            out_specs=pl.BlockSpec((t.m, t.n), lambda n, v, k, _, tile_V, *__: (tile_V[v], n)),
            scratch_shapes=[pltpu.VMEM((t.m, t.n), jnp.float32)],
        ),
        cost_estimate=cost,
        **options(backend, ("parallel", "arbitrary", "arbitrary")),
        name="grouped_product",
    )(*visits, x_MxK, w_GxKxN.astype(x_MxK.dtype))


def _gradient_kernel(group_V, tile_V, low_V, high_V, x_ref, y_ref, w_ref, sum_ref):
    del tile_V
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    low, high, group = low_V[v], high_V[v], group_V[v]

    @pl.when((v == 0) | (group != group_V[jnp.maximum(v - 1, 0)]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(low < high)
    def _():
        # Both: rows of neither group nor array may be NaN on either side.
        x, y = keep(x_ref[...], 0, low, high), keep(y_ref[...], 0, low, high)
        sum_ref[...] += _contract(x, y, ((0,), (0,)))

    @pl.when((v == last) | (group != group_V[jnp.minimum(v + 1, last)]))
    def _():
        w_ref[...] = sum_ref[...].astype(w_ref.dtype)


def gradient_tiling(shape: GroupedShape) -> tuple[Tiles, pl.CostEstimate]:
    """Blocks of `weight_gradient`, and its cost at most."""

    def vmem(t):
        moving = 2 * shape.itemsize * t.m * (t.k + t.n)
        return moving + (2 * shape.out_itemsize + 4) * t.k * t.n

    def traffic(t):
        tiles, _, nk, nn = shape.grid(t)
        read = tiles * t.m * nk * nn * (t.k + t.n) * shape.itemsize
        return read + shape.G * nk * t.k * nn * t.n * shape.out_itemsize

    what = f"a grouped [{shape.K}, {shape.N}] weight gradient"
    t = cheapest(what, shape.candidates(), vmem, traffic, SMALLEST)
    return t, shape.cost(t, traffic(t))


def weight_gradient(
    x_MxK: jax.Array, y_MxN: jax.Array, sizes_G: jax.Array, *, dtype: DTypeLike, backend: str
) -> jax.Array:
    """`x[rows of g]ᵀ · y[rows of g]`, `[G, K, N]` of `dtype`; zero for an empty group."""
    (M, K), N, G = x_MxK.shape, y_MxN.shape[1], sizes_G.shape[0]
    shape = GroupedShape(M, K, N, G, x_MxK.dtype.itemsize, jnp.dtype(dtype).itemsize)
    t, cost = gradient_tiling(shape)
    visits = make_visits(sizes_G, M, t.m)
    return pl.pallas_call(
        _gradient_kernel,
        out_shape=jax.ShapeDtypeStruct((G, K, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(ceil_div(K, t.k), ceil_div(N, t.n), visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((t.m, t.k), lambda k, n, v, _, tile_V, *__: (tile_V[v], k)),
                pl.BlockSpec((t.m, t.n), lambda k, n, v, _, tile_V, *__: (tile_V[v], n)),
            ],
            out_specs=pl.BlockSpec(
                (None, t.k, t.n), lambda k, n, v, group_V, *_: (group_V[v], k, n)
            ),
            scratch_shapes=[pltpu.VMEM((t.k, t.n), jnp.float32)],
        ),
        cost_estimate=cost,
        **options(backend, ("parallel", "parallel", "arbitrary")),
        name="grouped_weight_gradient",
    )(*visits, x_MxK, y_MxN)
