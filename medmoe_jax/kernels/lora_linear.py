"""A frozen linear layer with its low-rank adapters, in one reading of the input.

Axes: T tokens, D input width, O output width, R rank columns of all banks on the site; K is the
contracted and N the output width of the kernel: D and O forward, O and D in the input gradient.

    y = x·W + ((drop(x)·A) ∘ gate)·B

As separate products, the adapter reads x again, writes an output-sized term, and reads both terms
to add them. Here each block of x that is in VMEM for W is multiplied by A too, and the low-rank
term joins the accumulator of x·W before that is written. The input gradient has the same form,

    dx = dy·Wᵀ + drop(((dy·Bᵀ) ∘ gate)·Aᵀ)

and runs in the same kernel. Dropout is made there, block by block, by the counts of
`kernels.dropout`; the dropped x is never in memory.

The sites of a projection group have each its own A: one call a site computes nothing twice and
reads x no more often than the base products alone, whereas h = x·A made for the group beforehand
would cost one more reading of x. Where W is frozen, as it mostly is, no gradient of it is computed
and no buffer of its size is made for one. A quantised W (`kernels.quantised`) travels as it is
stored and is unpacked in VMEM; it never has a gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.dropout import Counter, Dropout, dropped
from medmoe_jax.kernels.quantised import Quantised, Storage, storage_of
from medmoe_jax.kernels.tiles import (
    LANES,
    SMALLEST,
    KernelMemory,
    Tiles,
    ceil_div,
    cheapest,
    check_backend,
    check_floats,
    fitting,
    keep,
    options,
    tile_of,
)

# Columns of x that dropout takes at a time.
STRIP = 512
# What the kernel calls its results for the policies of `jax.checkpoint`.
PRODUCT, RANK_COLUMNS, LAST_RANK_COLUMNS = "product", "rank_columns", "last_rank_columns"


class LoraShape(NamedTuple):
    """What block sizes depend on.

    Attributes:
      T, K, N, R: tokens, widths, rank columns.
      itemsize, gate_itemsize: bytes of a value, and of a gate or 0.
      dropout: whether there is any.
      weight: how a quantised W lies in memory; None = W is an array of values.
      transposed: whether W's rows run along K.
    """

    T: int
    K: int
    N: int
    R: int
    itemsize: int
    gate_itemsize: int
    dropout: bool = False
    weight: Storage | None = None
    transposed: bool = False

    def grid(self, t: Tiles) -> tuple[int, int, int]:
        """Blocks of rows, of outputs and of the contracted width."""
        return ceil_div(self.T, t.m), ceil_div(self.N, t.n), ceil_div(self.K, t.k)

    def copies(self, t: Tiles) -> int:
        """Copies of a block of x: one computes, one travels; where x is one block, none travels."""
        nm, _, nk = self.grid(t)
        return 1 if nm == nk == 1 else 2

    def vmem(self, t: Tiles) -> int:
        """Bytes of all blocks and accumulators."""
        x = self.itemsize * t.m * t.k * self.copies(t)
        gates = 2 * self.gate_itemsize * t.m * self.R
        moving = t.m * (t.n + self.R) + (t.k + t.n) * self.R
        kept = t.m * (4 * t.n + 4 * self.R + self.itemsize * self.R)
        # Values of a quantised block, and about three arrays of it in float32 while it is unpacked.
        unpacked = t.k * t.n * (self.itemsize + 3 * 4) if self.weight else 0
        # A column of words fills whole tiles, 128 wide.
        words = 2 * 4 * t.m * LANES if self.dropout else 0
        moved = self.itemsize * moving + self._weight_bytes(t.k, t.n)
        return x + 2 * moved + gates + kept + unpacked + words

    def _weight_bytes(self, k: int, n: int) -> int:
        if self.weight is None:
            return k * n * self.itemsize
        return self.weight.size(*((n, k) if self.transposed else (k, n)))

    @property
    def steps(self) -> tuple[int, int]:
        """What blocks along K and along N are multiples of, where they are not whole."""
        rows = LANES if self.weight is None else math.lcm(LANES, self.weight.granule)
        return (LANES, rows) if self.transposed else (rows, LANES)

    def traffic(self, t: Tiles) -> int:
        """HBM bytes: a block that does not change between two steps is not fetched again."""
        nm, nn, nk = self.grid(t)
        rows, k, n = nm * t.m, nk * t.k, nn * t.n
        x = rows * k * (1 if nk == 1 else nn)
        w = self._weight_bytes(k, n) * (1 if nk == nn == 1 else nm)
        a = k * self.R * (1 if nk == 1 else nm)
        b = self.R * n * (1 if nn == 1 else nm)
        moved = x + a + b + rows * (n + self.R)
        return moved * self.itemsize + w + rows * self.R * self.gate_itemsize


def _candidates(shape: LoraShape, cores: int) -> list[Tiles]:
    """Block sizes to choose from; every core has a block of rows where there are rows enough."""
    rows, (along_k, along_n) = ceil_div(shape.T, 16 * cores) * 16, shape.steps
    return [
        Tiles(min(rows, m), tile_of(shape.K, k, along_k), tile_of(shape.N, n, along_n))
        for m in (2048, 1024, 512, 256, 128)
        for k in (shape.K, 1024, 512, 256)
        for n in (2048, 1024, 512, 256)
    ]


def fits(
    T: int,
    D: int,
    O: int,
    R: int,
    dtype: DTypeLike,
    weight: jax.Array | Quantised,
    memory: KernelMemory = SMALLEST,
) -> bool:
    """Whether the kernel can tile these shapes, forward and backward, with all it may be given.

    Args:
      T, D, O, R: tokens, widths and rank columns of one device.
      dtype: of x.
      weight: W, of which only the form counts.
      memory: what the device has.
    """
    itemsize, stored = jnp.dtype(dtype).itemsize, storage_of(weight)
    if stored and not stored.holds(D):
        return False
    both = (
        LoraShape(T, D, O, R, itemsize, 4, True, stored),
        LoraShape(T, O, D, R, itemsize, 4, True, stored, transposed=True),
    )
    return all(fitting(_candidates(shape, memory.cores), shape.vmem, memory) for shape in both)


def tiling(shape: LoraShape, memory: KernelMemory = SMALLEST) -> tuple[Tiles, pl.CostEstimate]:
    """Blocks of the kernel, and its cost.

    Where all of K fits, x is fetched once and W once for each block of rows.
    """
    what = f"a [{shape.K}, {shape.N}] weight beside {shape.R} rank columns"
    t = cheapest(what, _candidates(shape, memory.cores), shape.vmem, shape.traffic, memory)
    nm, nn, nk = shape.grid(t)
    rows = nm * t.m
    k = (nk - 1) * t.k + _whole_lanes(shape.K, t.k)
    n = (nn - 1) * t.n + _whole_lanes(shape.N, t.n)
    flops = 2 * rows * (k * n + k * shape.R + n * shape.R)
    return t, pl.CostEstimate(flops, 0, shape.traffic(t))


def _dot(x, w, transposed: bool):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _kernel(
    x_ref,
    a_ref,
    b_ref,
    w_refs,
    gate_refs,
    word_refs,
    y_ref,
    h_ref,
    y_sum,
    h_sum,
    gated,
    *,
    K: int,
    N: int,
    transposed: bool,
    rate: float | None,
    weight: Storage | None,
):
    n, k = pl.program_id(1), pl.program_id(2)
    first, last = k == 0, k == pl.num_programs(2) - 1
    (tk, tn), contracted = (x_ref.shape[1], y_ref.shape[1]), 1 if transposed else 0

    def drop(block, strip=slice(None)):
        if rate is None:
            return block
        token, column = word_refs
        return dropped(block, token[...], column[:, strip], rate)

    def inside(block, axis, start):
        """The block, from `start` on, without what is no whole lanes outside the array."""
        return keep(block, axis, 0, K - k * tk - start) if K % tk % LANES else block

    # Read at each use: a value of it that lived from one to the next would take its room once more.
    def x(strip):
        return inside(x_ref[:, strip], 1, strip.start)

    def add(columns, width):
        """Add to the first columns of this block, by the first of its contracted width."""
        w = w_refs[0][...] if weight is None else weight.values(w_refs, x_ref.dtype)
        w = inside(w[:columns, :width] if transposed else w[:width, :columns], contracted, 0)
        y_sum[:, :columns] += _dot(x(pl.ds(0, width)), w, transposed)

    def add_strip(start, width: int):
        strip = pl.ds(start, width)
        a = inside(a_ref[:, strip] if transposed else a_ref[strip], contracted, start)
        h_sum[...] += _dot(x(strip) if transposed else drop(x(strip), strip), a, transposed)

    def add_h(width: int):
        # In strips: all of a block after dropout would take its room up to three times more.
        strips = 0 if transposed or rate is None else width // STRIP

        @pl.loop(0, strips)
        def _(i):
            add_strip(pl.multiple_of(i * STRIP, STRIP), STRIP)

        if width > strips * STRIP:
            add_strip(strips * STRIP, width - strips * STRIP)

    @pl.when(first)
    def _():
        y_sum[...] = jnp.zeros_like(y_sum)

    _by_block(lambda width: _by_block(lambda columns: add(columns, width), n, N, tn), k, K, tk)

    # h is made with the first block of outputs and serves the others of the same rows.
    @pl.when(n == 0)
    def _():
        @pl.when(first)
        def _():
            h_sum[...] = jnp.zeros_like(h_sum)

        _by_block(add_h, k, K, tk)

        @pl.when(last)
        def _():
            h = h_sum[...]
            h_ref[...] = h.astype(h_ref.dtype)
            for gate in gate_refs:
                h = h * gate[...].astype(jnp.float32)
            gated[...] = h.astype(gated.dtype)

    @pl.when(last)
    def _():
        low_rank = _dot(gated[...], b_ref[...], transposed)
        y = y_sum[...] + (drop(low_rank) if transposed else low_rank)
        y_ref[...] = y.astype(y_ref.dtype)


def _whole_lanes(width: int, block: int) -> int:
    """What is computed of the last block along a width: not what lies outside by whole lanes."""
    return min(ceil_div(width % block or block, LANES) * LANES, block)


def _by_block(compute: Callable[[int], None], index, width: int, block: int) -> None:
    """Compute with all of the block, or with as much of the last one as there is."""
    tail, last = _whole_lanes(width, block), ceil_div(width, block) - 1
    if tail == block:
        compute(block)
    else:
        pl.when(index < last)(functools.partial(compute, block))
        pl.when(index == last)(functools.partial(compute, tail))


def _weight_blocks(weight: Storage | None, t: Tiles, transposed: bool) -> list[pl.BlockSpec]:
    """A block of W, of each of its arrays."""

    def block(held: int):
        if transposed:
            rows = t.n // held if held else 1
            return pl.BlockSpec((rows, t.k), lambda m, n, k: (n if held else 0, k))
        rows = t.k // held if held else 1
        return pl.BlockSpec((rows, t.n), lambda m, n, k: (k if held else 0, n))

    return [block(held) for held in (weight.rows_held if weight else (1,))]


def _pallas(
    x_TxK,
    w_KxN,
    a_KxR,
    gate_TxR,
    b_RxN,
    dropout,
    transposed: bool,
    backend: str,
    memory: KernelMemory,
):
    """`(y, h)`; where `transposed`, W, A and B are given as `[N, K]`, `[R, K]` and `[N, R]`."""
    T, K = x_TxK.shape
    R, N = a_KxR.shape[0 if transposed else 1], w_KxN.shape[0 if transposed else 1]
    gates = () if gate_TxR is None else (gate_TxR,)
    gate_itemsize, weight = sum(gate.dtype.itemsize for gate in gates), storage_of(w_KxN)
    shape = LoraShape(
        T, K, N, R, x_TxK.dtype.itemsize, gate_itemsize, dropout is not None, weight, transposed
    )
    t, cost = tiling(shape, memory)
    grid = shape.grid(t)
    last_k = grid[2] - 1

    def oriented(shape, index):
        """A block of a matrix, as it lies in memory."""
        if transposed:
            return pl.BlockSpec(shape[::-1], lambda m, n, k: index(m, n, k)[::-1])
        return pl.BlockSpec(shape, index)

    per_row = pl.BlockSpec((t.m, R), lambda m, n, k: (m, 0))
    words, word_specs = (), ()
    if dropout is not None:
        token_T, column_D = dropout.counter
        words = (token_T[:, None], column_D[None])
        width, axis = (t.n, 1) if transposed else (t.k, 2)
        along_d = pl.BlockSpec((1, width), lambda *step: (0, step[axis]))
        word_specs = (pl.BlockSpec((t.m, 1), lambda m, n, k: (m, 0)), along_d)
    y_TxN, h_TxR = pl.pallas_call(
        functools.partial(
            _kernel,
            K=K,
            N=N,
            transposed=transposed,
            rate=None if dropout is None else dropout.rate,
            weight=weight,
        ),
        out_shape=(
            jax.ShapeDtypeStruct((T, N), x_TxK.dtype),
            jax.ShapeDtypeStruct((T, R), x_TxK.dtype),
        ),
        grid=grid,
        in_specs=[
            pl.BlockSpec((t.m, t.k), lambda m, n, k: (m, k)),
            # Only the first block of outputs needs A: then the last one stays, and none is fetched.
            oriented((t.k, R), lambda m, n, k: (jnp.where(n == 0, k, last_k), 0)),
            oriented((R, t.n), lambda m, n, k: (0, n)),
            _weight_blocks(weight, t, transposed),
            [per_row for _ in gates],
            list(word_specs),
        ],
        out_specs=(pl.BlockSpec((t.m, t.n), lambda m, n, k: (m, n)), per_row),
        scratch_shapes=[
            pltpu.VMEM((t.m, t.n), jnp.float32),
            pltpu.VMEM((t.m, R), jnp.float32),
            pltpu.VMEM((t.m, R), x_TxK.dtype),
        ],
        cost_estimate=cost,
        **options(backend, ("parallel", "arbitrary", "arbitrary"), memory.limit),
        name="lora_linear",
    )(x_TxK, a_KxR, b_RxN, jax.tree.leaves(w_KxN), list(gates), list(words))
    # A loop that stacks a result would take the kernel into its own fusion, where the VMEM that it
    # asks for is not granted.
    return jax.lax.optimization_barrier((y_TxN, h_TxR))


def _gate(h_TxR, gate_TxR):
    """`h ∘ gate`, multiplied in float32; h where there is no gate."""
    if gate_TxR is None:
        return h_TxR
    return (h_TxR.astype(jnp.float32) * gate_TxR.astype(jnp.float32)).astype(h_TxR.dtype)


def _drop(x_TxD, dropout: Dropout | None):
    """x after dropout, which may be none."""
    return x_TxD if dropout is None else dropout(x_TxD)


def _xla(x_TxK, w_KxN, a_KxR, gate_TxR, b_RxN, dropout, transposed: bool):
    read_TxK = x_TxK if transposed else _drop(x_TxK, dropout)
    h_TxR = _dot(read_TxK, a_KxR, transposed).astype(x_TxK.dtype)
    low_rank_TxN = _dot(_gate(h_TxR, gate_TxR), b_RxN, transposed)
    low_rank_TxN = _drop(low_rank_TxN, dropout) if transposed else low_rank_TxN
    return (_dot(x_TxK, w_KxN, transposed) + low_rank_TxN).astype(x_TxK.dtype), h_TxR


def _forward(x, w, a, gate, b, dropout, transposed, backend, memory):
    if backend == "xla" or storage_of(w) is None:
        w = w.astype(x.dtype)
    operands = (x, w, a.astype(x.dtype), gate, b.astype(x.dtype), dropout, transposed)
    return _xla(*operands) if backend == "xla" else _pallas(*operands, backend, memory)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _lora_linear(
    x_TxD,
    w_DxO,
    a_DxR,
    gate_TxR,
    b_RxO,
    counter,
    rate: float,
    backend,
    columns,
    memory: KernelMemory,
):
    dropout = None if counter is None else Dropout(counter, rate)
    return _forward(x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, dropout, False, backend, memory)[0]


def _lora_linear_fwd(x, w, a, gate, b, counter, rate, backend, columns, memory):
    """Each argument comes as its value and whether its derivative is asked for."""
    x_TxD, a_DxR, b_RxO = x.value, a.value, b.value
    w_DxO = jax.tree.map(lambda leaf: leaf.value, w)
    gate_TxR = None if gate is None else gate.value
    dropout = None if counter is None else Dropout(Counter(*(c.value for c in counter)), rate)
    y_TxO, h_TxR = _forward(x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, dropout, False, backend, memory)
    # For the policies of `jax.checkpoint`: who keeps h need not run the kernel again for it.
    y_TxO, h_TxR = checkpoint_name(y_TxO, PRODUCT), checkpoint_name(h_TxR, columns)
    trained = w_DxO if storage_of(w_DxO) is None and w.perturbed else None
    counter = None if dropout is None else dropout.counter
    return y_TxO, (x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, counter, h_TxR, trained)


def _lora_linear_bwd(rate, backend, columns, memory, saved, dy_TxO):
    del columns
    x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, counter, h_TxR, trained = saved
    dropout = None if counter is None else Dropout(counter, rate)
    dx_TxD, dh_TxR = _forward(dy_TxO, w_DxO, b_RxO, gate_TxR, a_DxR, dropout, True, backend, memory)

    def over_tokens(left, right, dtype):
        dims = (((0,), (0,)), ((), ()))
        sums = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
        return sums.astype(dtype)

    da_DxR = over_tokens(_drop(x_TxD, dropout), _gate(dh_TxR, gate_TxR), a_DxR.dtype)
    db_RxO = over_tokens(_gate(h_TxR, gate_TxR), dy_TxO, b_RxO.dtype)
    dw_DxO = None if trained is None else over_tokens(x_TxD, dy_TxO, w_DxO.dtype)
    dgate = None if gate_TxR is None else _gate(h_TxR, dh_TxR).astype(gate_TxR.dtype)
    return dx_TxD, dw_DxO, da_DxR, dgate, db_RxO, None


_lora_linear.defvjp(_lora_linear_fwd, _lora_linear_bwd, symbolic_zeros=True)


def lora_linear(
    x_TxD: jax.Array,
    w_DxO: jax.Array | Quantised,
    a_DxR: jax.Array,
    gate_TxR: jax.Array | None,
    b_RxO: jax.Array,
    *,
    backend: str,
    columns: str = RANK_COLUMNS,
    dropout: Dropout | None = None,
    memory: KernelMemory = SMALLEST,
) -> jax.Array:
    """`y = x·W + ((drop(x)·A) ∘ gate)·B`: a frozen linear layer and all banks of its site.

    Args:
      x_TxD: float32 or bfloat16.
      w_DxO: the weight; its gradient is computed only where it is asked for; none if quantised.
      a_DxR, b_RxO: the experts of all banks side by side, R = Σ E·r; cast to x's dtype for the
        product, while their gradients are accumulated in float32 and rounded once, to their dtype.
      gate_TxR: weights in rank space, s and Λ folded in (or into B); None for ones.
      backend: see `medmoe_jax.kernels`.
      columns: the name by which a policy of `jax.checkpoint` may keep x·A; that of y is PRODUCT.
      dropout: on the input of A; its counter has words `[T]` and `[D]`. None = none.
      memory: what the device has.

    Returns:
      `y_TxO` in x's dtype, accumulated in float32.

    Raises:
      UserError: shapes or dtypes that do not fit together; on "pallas" and "interpret" also more
        rank columns than fit VMEM (thousands).

    Example, with one rank column that adds up x, and is halved by its gate:
      >>> x_TxD, w_DxO = jnp.array([[1.0, 2.0]]), jnp.eye(2)
      >>> a_DxR, b_RxO = jnp.ones((2, 1)), jnp.array([[10.0, 20.0]])
      >>> gate_TxR = jnp.array([[0.5]])
      >>> lora_linear(x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, backend="xla").tolist()
      [[16.0, 32.0]]
    """
    check_backend(backend)
    gate = {} if gate_TxR is None else {"gate_TxR": gate_TxR}
    stored = storage_of(w_DxO)
    plain = {} if stored else {"w_DxO": cast(jax.Array, w_DxO)}
    check_floats(x_TxD=x_TxD, a_DxR=a_DxR, b_RxO=b_RxO, **plain, **gate)
    (T, D), (R, O) = x_TxD.shape, b_RxO.shape
    expected = {"w_DxO": (D, O), "a_DxR": (D, R), "gate_TxR": (T, R)}
    for name, array in {"w_DxO": w_DxO, "a_DxR": a_DxR, **gate}.items():
        if array.shape != expected[name]:
            raise UserError(
                f"{name} has shape {array.shape}; with x {x_TxD.shape} and b {b_RxO.shape} it "
                f"must have {expected[name]}"
            )
    if stored and not stored.holds(D):
        raise UserError(f"w_DxO is quantised in whole blocks, which its {D} rows do not fill")
    counter, rate = (None, 0.0) if dropout is None else dropout
    return _lora_linear(
        x_TxD, w_DxO, a_DxR, gate_TxR, b_RxO, counter, rate, backend, columns, memory
    )
