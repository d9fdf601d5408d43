"""Matrix products over rows sorted by expert: full experts, and low-rank ones.

Axes: M rows (one for each pick of each token), D input width, O output width, E experts, r rank,
P experts packed side by side, S = E / P packs, R = P·r rank columns of a pack.

Rows are sorted so that expert e owns `sizes_E[e]` consecutive ones. Rows after the last expert's
are padding: whatever they hold, even NaN, their output and their gradient are zero. No row is
dropped, and no buffer has both a row and an expert dimension but the packed rank columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import grouped_blocks, grouped_tpu
from medmoe_jax.kernels.tiles import LANES, ceil_div, check_backend, check_floats

# What x·A is called for the policies of `jax.checkpoint`. y has no name: it is K times as large as
# a layer's own output, and cheap to make again.
RANK_COLUMNS = "grouped_rank_columns"


def _forward(x, w, sizes, transposed, backend):
    if backend == "xla":
        return grouped_blocks.product(x, w, sizes, transposed=transposed)
    return grouped_tpu.product(x, w, sizes, transposed=transposed, backend=backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MxK, w_GxKxN, sizes_G, transposed: bool, backend: str):
    return _forward(x_MxK, w_GxKxN, sizes_G, transposed, backend)


def _product_fwd(x_MxK, w_GxKxN, sizes_G, transposed, backend):
    y_MxN = _forward(x_MxK, w_GxKxN, sizes_G, transposed, backend)
    return y_MxN, (x_MxK, w_GxKxN, sizes_G)


def _product_bwd(transposed, backend, saved, dy_MxN):
    x_MxK, w_GxKxN, sizes_G = saved
    dx_MxK = _forward(dy_MxN, w_GxKxN, sizes_G, not transposed, backend)
    pair = (dy_MxN, x_MxK) if transposed else (x_MxK, dy_MxN)
    if backend == "xla":
        dw = grouped_blocks.weight_gradient(*pair, sizes_G, dtype=w_GxKxN.dtype)
    else:
        dw = grouped_tpu.weight_gradient(*pair, sizes_G, dtype=w_GxKxN.dtype, backend=backend)
    return dx_MxK, dw, None


_product.defvjp(_product_fwd, _product_bwd)


def _check(x_MxD, sizes_E, backend: str, *, weight_M=None, **weights) -> None:
    """UserError unless ranks, dtypes, widths and numbers of experts agree."""
    check_backend(backend)
    check_floats(x_MxD=x_MxD, **weights)
    M, E = x_MxD.shape[0], sizes_E.shape[0]
    if not jnp.issubdtype(sizes_E.dtype, jnp.integer):
        raise UserError(f"sizes_E is {sizes_E.dtype}; give the number of rows of each expert")
    for name, weight in weights.items():
        if weight.shape[0] != E:
            raise UserError(f"{name} has {weight.shape[0]} experts, sizes_E has {E}")
    if weight_M is not None and weight_M.shape != (M,):
        raise UserError(f"weight_M has shape {weight_M.shape}; x_MxD has {M} rows")


def _check_width(what: str, width: int, x_MxD) -> None:
    if x_MxD.shape[1] != width:
        raise UserError(f"x_MxD has width {x_MxD.shape[1]}, {what} expects {width}")


def grouped_matmul(
    x_MxD: jax.Array, w_ExDxO: jax.Array, sizes_E: jax.Array, *, backend: str
) -> jax.Array:
    """`y[m] = x[m] · w[expert of m]`: the linear layers of full experts.

    Args:
      x_MxD: float32 or bfloat16, rows sorted by expert.
      w_ExDxO: float32 or bfloat16; cast to x's dtype for the product, while its gradient is
        accumulated in float32 and rounded once, to w's dtype.
      sizes_E: integers, rows of each expert; their sum is at most M.
      backend: see `medmoe_jax.kernels`.

    Returns:
      `y_MxO` in x's dtype, accumulated in float32.

    Raises:
      UserError: shapes or dtypes that do not fit together.

    Example, one row for the first of two experts and two for the second:
      >>> x_MxD = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
      >>> w_ExDxO = jnp.array([[[1.0], [1.0]], [[10.0], [0.0]]])
      >>> grouped_matmul(x_MxD, w_ExDxO, jnp.array([1, 2]), backend="xla").tolist()
      [[3.0], [10.0], [30.0]]
    """
    _check(x_MxD, sizes_E, backend, w_ExDxO=w_ExDxO)
    _check_width("w_ExDxO", w_ExDxO.shape[1], x_MxD)
    return _product(x_MxD, w_ExDxO, sizes_E.astype(jnp.int32), False, backend)


def _experts_a_pack(E: int, r: int) -> int:
    return min(E, max(1, LANES // r))


def _packed(matrix_ExrxN, P: int):
    """P experts' rank columns side by side: `[S, P·r, N]`, zeros after the last expert."""
    E, r, N = matrix_ExrxN.shape
    S = ceil_div(E, P)
    return jnp.pad(matrix_ExrxN, ((0, S * P - E), (0, 0), (0, 0))).reshape(S, P * r, N)


# Under `checkpoint` what is kept for the gradient is h and the weights, not their float32 products.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _weighted(h_MxR, weight_M, sizes_E, P: int, r: int):
    """Each row's weight on the rank columns of its own expert, zero elsewhere and on padding."""
    M = h_MxR.shape[0]
    mine_MxR = (jnp.arange(M) < jnp.sum(sizes_E))[:, None]
    # Where a pack is one expert, whose columns they are is known.
    if P > 1:
        place_M = jnp.repeat(jnp.arange(sizes_E.shape[0]) % P, sizes_E, total_repeat_length=M)
        mine_MxR &= place_M[:, None] == (jnp.arange(P * r) // r)[None]
    weight_MxR = jnp.where(mine_MxR, weight_M.astype(jnp.float32)[:, None], 0.0)
    return (h_MxR.astype(jnp.float32) * weight_MxR).astype(h_MxR.dtype)


def grouped_lora(
    x_MxD: jax.Array,
    a_ExrxD: jax.Array,
    b_ExrxO: jax.Array,
    weight_M: jax.Array,
    sizes_E: jax.Array,
    *,
    backend: str,
) -> jax.Array:
    """`y[m] = weight[m] · (x[m] · a[e]ᵀ) · b[e]`, e the expert of row m: low-rank experts.

    On TPU the matrix unit works on 128 columns at a time: an expert of rank 16 costs as much as
    one of rank 128. So experts are packed side by side until they fill it, and a row's weight is
    zero on its neighbours' columns. A pack counts as one group: P times fewer borders between
    groups, dense lanes, and still bound by memory (128 rank columns make 128 FLOPs a byte of x,
    where v5p, the least of the three chips, has 166). Elsewhere P is 1.

    The two products are two calls. One fused kernel would save a read of h, `R / (D + O)` of the
    bytes, but not its write: the gradients of b and of the weights need h, and recomputing it
    would read x again.

    Args:
      x_MxD: float32 or bfloat16, rows sorted by expert.
      a_ExrxD, b_ExrxO: as for `grouped_matmul`'s w. Both have the wide dimension last, where TPU
        tiles have 128 lanes; a bank's `lora_a [D, E, r]` is transposed by the caller.
      weight_M: the routing weight of each row, with s and the like folded in.
      sizes_E: integers, rows of each expert; their sum is at most M.
      backend: see `medmoe_jax.kernels`.

    Returns:
      `y_MxO` in x's dtype; both products accumulate in float32.

    Raises:
      UserError: shapes or dtypes that do not fit together.

    Example, experts of rank 1 that add up their row and write the sum, the second one tenfold:
      >>> x_MxD = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> a_ExrxD, b_ExrxO = jnp.ones((2, 1, 2)), jnp.array([[[1.0]], [[10.0]]])
      >>> weight_M, sizes_E = jnp.array([1.0, 0.5]), jnp.array([1, 1])
      >>> grouped_lora(x_MxD, a_ExrxD, b_ExrxO, weight_M, sizes_E, backend="xla").tolist()
      [[3.0], [35.0]]
    """
    _check(x_MxD, sizes_E, backend, weight_M=weight_M, a_ExrxD=a_ExrxD, b_ExrxO=b_ExrxO)
    _check_width("a_ExrxD", a_ExrxD.shape[2], x_MxD)
    (E, r, _), sizes_E = a_ExrxD.shape, sizes_E.astype(jnp.int32)
    if b_ExrxO.shape[1] != r:
        raise UserError(f"a_ExrxD has rank {r}, b_ExrxO {b_ExrxO.shape[1]}")
    P = 1 if backend == "xla" else _experts_a_pack(E, r)
    sizes_S = jnp.pad(sizes_E, (0, -E % P)).reshape(-1, P).sum(axis=1)
    h_MxR = checkpoint_name(
        _product(x_MxD, _packed(a_ExrxD, P), sizes_S, True, backend), RANK_COLUMNS
    )
    h_MxR = _weighted(h_MxR, weight_M, sizes_E, P, r)
    return _product(h_MxR, _packed(b_ExrxO, P), sizes_S, False, backend)
