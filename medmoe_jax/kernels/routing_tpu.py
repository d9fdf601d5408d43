"""The router's Pallas kernels for TPU: x is read once, and no probability leaves the chip.

Axes: T tokens, D model, E experts (padded to a multiple of 8), K picks a token, N blocks of tokens,
S sums, P = 2E or 3E.

Experts lie on sublanes and tokens on lanes, so that eight experts fill registers as well as 512 do.

Where x is bfloat16, a float32 factor becomes two or three bfloat16 ones that add up to it, stacked
along the experts: their products are exact, their sum is float32, and up to 40 experts take a
single pass of the matrix unit, where a product of float32 operands takes six.
"""

from __future__ import annotations

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.tiles import ceil_div, keep, options, tile_of

MAX_EXPERTS = 1024
_FEWEST = 8  # tokens: the rows of a register
_MINUS_INF = float("-inf")

Output = TypeVar("Output", jax.Array, jax.ShapeDtypeStruct, pl.BlockSpec)


class Outputs(NamedTuple, Generic[Output]):
    """What the kernel writes: arrays, their shapes or their blocks.

    The sums are one a block of tokens, and their order is fixed.

    Attributes:
      weights_KxT, picks_KxT: float32 and int32.
      z_ExT: logits, float32.
      use_NxEx1, prob_NxEx1: tokens that picked the expert, and Σ probability.
      sums_NxSx1: Σ entropy, Σ logsumexp², tokens overridden, tokens with a non-finite logit.
    """

    weights_KxT: Output
    picks_KxT: Output
    z_ExT: Output
    use_NxEx1: Output
    prob_NxEx1: Output
    sums_NxSx1: Output


def _split(factor, parts: int) -> list[jax.Array]:
    """bfloat16 arrays whose sum is the float32 `factor`: to 16 bits for two, exactly for three."""
    out = []
    for _ in range(parts):
        # Not a pair of casts, which XLA may drop.
        part = jax.lax.reduce_precision(factor, exponent_bits=8, mantissa_bits=7)
        out.append(part.astype(jnp.bfloat16))
        factor = factor - part
    return out


def _dot(a, b, contracted: tuple[int, int], exact: bool):
    return jax.lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=None if exact else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _sum_parts(stacked_PxN, rows: int):
    return sum(stacked_PxN[start : start + rows] for start in range(0, stacked_PxN.shape[0], rows))


def _pick_best(z_ExT, forced_1xT, weights_ref, picks_ref):
    """Write the K picks and, for the time being, their logits; return each expert's place or -1."""
    E = z_ExT.shape[0]
    K = picks_ref.shape[0]
    expert_ExT = jax.lax.broadcasted_iota(jnp.int32, z_ExT.shape, 0)
    # A NaN compares with nothing: it would leave a pick out of range.
    score_ExT = jnp.where(z_ExT == z_ExT, z_ExT, _MINUS_INF)

    def pick(k, place_ExT):
        left_ExT = place_ExT < 0
        best_1xT = jnp.max(jnp.where(left_ExT, score_ExT, _MINUS_INF), axis=0, keepdims=True)
        tied_ExT = left_ExT & (score_ExT == best_1xT)
        pick_1xT = jnp.min(jnp.where(tied_ExT, expert_ExT, E), axis=0, keepdims=True)
        picks_ref[pl.ds(k, 1), :] = pick_1xT
        weights_ref[pl.ds(k, 1), :] = best_1xT
        return jnp.where(expert_ExT == pick_1xT, k, place_ExT)

    place_ExT = jax.lax.fori_loop(0, K, pick, jnp.full(z_ExT.shape, -1, jnp.int32))
    mine_ExT = expert_ExT == forced_1xT
    there_1xT = jnp.max(jnp.where(mine_ExT, place_ExT, -1), axis=0, keepdims=True) >= 0
    override_1xT = (forced_1xT >= 0) & ~there_1xT
    forced_z_1xT = jnp.sum(jnp.where(mine_ExT, z_ExT, 0.0), axis=0, keepdims=True)
    last = pl.ds(K - 1, 1)
    picks_ref[last, :] = jnp.where(override_1xT, forced_1xT, picks_ref[last, :])
    weights_ref[last, :] = jnp.where(override_1xT, forced_z_1xT, weights_ref[last, :])
    place_ExT = jnp.where(override_1xT & (place_ExT == K - 1), -1, place_ExT)
    return jnp.where(override_1xT & mine_ExT, K - 1, place_ExT), override_1xT


def _decide(z_ExT, valid_1xT, forced_1xT, E: int, renormalise: bool, out: Outputs[jax.Array]):
    """Write all outputs of a block of tokens from its logits, whose rows from E on are padding."""
    real_ExT = jax.lax.broadcasted_iota(jnp.int32, z_ExT.shape, 0) < E
    z_ExT = jnp.where(real_ExT, z_ExT, _MINUS_INF)
    place_ExT, override_1xT = _pick_best(z_ExT, forced_1xT, out.weights_KxT, out.picks_KxT)

    top_1xT = jnp.max(z_ExT, axis=0, keepdims=True)
    power_ExT = jnp.exp(z_ExT - top_1xT)
    sum_1xT = jnp.sum(power_ExT, axis=0, keepdims=True)
    lse_1xT = top_1xT + jnp.log(sum_1xT)
    prob_ExT = power_ExT / sum_1xT
    z_KxT = out.weights_KxT[...]
    if renormalise:
        power_KxT = jnp.exp(z_KxT - jnp.max(z_KxT, axis=0, keepdims=True))
        out.weights_KxT[...] = power_KxT / jnp.sum(power_KxT, axis=0, keepdims=True)
    else:
        out.weights_KxT[...] = jnp.exp(z_KxT - top_1xT) / sum_1xT

    p_log_p_ExT = jnp.where(real_ExT, prob_ExT * (z_ExT - lse_1xT), 0.0)
    wrong_ExT = real_ExT & ~(jnp.abs(z_ExT) < float("inf"))
    rows = (
        -jnp.sum(p_log_p_ExT, axis=0, keepdims=True),
        lse_1xT * lse_1xT,
        jnp.where(override_1xT, 1.0, 0.0),
        jnp.max(jnp.where(wrong_ExT, 1.0, 0.0), axis=0, keepdims=True),
    )

    def total(values):
        # By selection: what lies after the last token may be NaN.
        return jnp.sum(jnp.where(valid_1xT > 0, values, 0.0), axis=1, keepdims=True)

    out.z_ExT[...] = z_ExT
    out.use_NxEx1[...] = total(jnp.where(place_ExT >= 0, 1.0, 0.0))
    out.prob_NxEx1[...] = total(prob_ExT)
    for s, row_1xT in enumerate(rows):
        out.sums_NxSx1[s : s + 1, :] = total(row_1xT)


def _route_kernel(*refs, E: int, D: int, renormalise: bool):
    x_ref, kernel_ref, bias_ref, valid_ref, forced_ref, *outputs, z_ref = refs
    d, last = pl.program_id(1), pl.num_programs(1) - 1
    tail = D % x_ref.shape[1]
    exact = x_ref.dtype == jnp.bfloat16

    @pl.when(d == 0)
    def _():
        z_ref[...] = jnp.zeros_like(z_ref)

    @pl.when(d < last)
    def _():
        z_ref[...] += _dot(kernel_ref[...], x_ref[...], (1, 1), exact)

    @pl.when(d == last)
    def _():
        x_TxD = keep(x_ref[...], 1, 0, tail) if tail else x_ref[...]
        z_ref[...] += _dot(kernel_ref[...], x_TxD, (1, 1), exact)
        z_ExT = _sum_parts(z_ref, bias_ref.shape[0]) + bias_ref[...]
        _decide(z_ExT, valid_ref[...], forced_ref[...], E, renormalise, Outputs(*outputs))


def _enough(some):
    """At least `_FEWEST` tokens, the further ones zero: Mosaic has no code for three and less."""
    return jnp.pad(some, [(0, _FEWEST - some.shape[0])] + [(0, 0)] * (some.ndim - 1))


def _blocks(T: int, D: int, E: int) -> tuple[int, int, int]:
    """Padded experts, and the block sizes of tokens and of the model width."""
    if E > MAX_EXPERTS:
        raise UserError(
            f"a router of {E} experts: the kernel takes up to {MAX_EXPERTS}; use backend 'xla'"
        )
    return 8 * ceil_div(E, 8), tile_of(T, 512), tile_of(D, 1024)


def route(
    x_TxD: jax.Array,
    kernel_DxE: jax.Array,
    bias_E: jax.Array,
    valid_T: jax.Array,
    forced_T: jax.Array,
    top_k: int,
    renormalise: bool,
    backend: str,
) -> Outputs[jax.Array]:
    """See `medmoe_jax.kernels.routing.route`.

    Raises:
      UserError: more experts than fit beside a block of tokens.
    """
    if (tokens := x_TxD.shape[0]) < _FEWEST:
        x_TxD, valid_T, forced_T = map(_enough, (x_TxD, valid_T, forced_T))
        out = route(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, top_k, renormalise, backend)
        return out._replace(
            weights_KxT=out.weights_KxT[:, :tokens],
            picks_KxT=out.picks_KxT[:, :tokens],
            z_ExT=out.z_ExT[:, :tokens],
        )
    (T, D), E = x_TxD.shape, kernel_DxE.shape[1]
    rows, block_t, block_d = _blocks(T, D, E)
    blocks = ceil_div(T, block_t)
    kernel = jnp.pad(kernel_DxE.T, ((0, rows - E), (0, -D % block_d)))
    if x_TxD.dtype == jnp.bfloat16:
        kernel = jnp.concatenate(_split(kernel, 3))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    token = pl.BlockSpec((1, block_t), lambda t, d: (0, t))
    pick = pl.BlockSpec((top_k, block_t), lambda t, d: (0, t))
    expert = pl.BlockSpec((None, rows, 1), lambda t, d: (t, 0, 0))
    return pl.pallas_call(
        functools.partial(_route_kernel, E=E, D=D, renormalise=renormalise),
        out_shape=Outputs(
            weights_KxT=f32((top_k, T)),
            picks_KxT=jax.ShapeDtypeStruct((top_k, T), jnp.int32),
            z_ExT=f32((rows, T)),
            use_NxEx1=f32((blocks, rows, 1)),
            prob_NxEx1=f32((blocks, rows, 1)),
            sums_NxSx1=f32((blocks, 4, 1)),
        ),
        grid=(blocks, ceil_div(D, block_d)),
        in_specs=[
            pl.BlockSpec((block_t, block_d), lambda t, d: (t, d)),
            pl.BlockSpec((kernel.shape[0], block_d), lambda t, d: (0, d)),
            pl.BlockSpec((rows, 1), lambda t, d: (0, 0)),
            token,
            token,
        ],
        out_specs=Outputs(
            weights_KxT=pick,
            picks_KxT=pick,
            z_ExT=pl.BlockSpec((rows, block_t), lambda t, d: (0, t)),
            use_NxEx1=expert,
            prob_NxEx1=expert,
            sums_NxSx1=pl.BlockSpec((None, 4, 1), lambda t, d: (t, 0, 0)),
        ),
        scratch_shapes=[pltpu.VMEM((kernel.shape[0], block_t), jnp.float32)],
        **options(backend, ("parallel", "arbitrary")),
        name="route",
    )(
        x_TxD,
        kernel,
        jnp.pad(bias_E, (0, rows - E))[:, None],
        jnp.pad(valid_T, (0, blocks * block_t - T)).astype(jnp.int32)[None],
        forced_T[None],
    )


def _gradient_kernel(x_ref, dz_ref, kernel_ref, dx_ref, dkernel_ref, sum_ref, *, T: int):
    t, last = pl.program_id(1), pl.num_programs(1) - 1
    exact = x_ref.dtype == jnp.bfloat16
    dx_ref[...] = _dot(dz_ref[...], kernel_ref[...], (0, 0), exact).astype(dx_ref.dtype)

    @pl.when(t == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # Rows after the last token may be NaN, which the zeros of dz would not undo.
    x_TxD = keep(x_ref[...], 0, 0, T - t * x_ref.shape[0]) if T % x_ref.shape[0] else x_ref[...]
    sum_ref[...] += _dot(dz_ref[: sum_ref.shape[0]], x_TxD, (1, 0), exact)

    @pl.when(t == last)
    def _():
        dkernel_ref[...] = _sum_parts(sum_ref, dkernel_ref.shape[0])


def gradients(
    x_TxD: jax.Array, kernel_DxE: jax.Array, dz_ExT: jax.Array, backend: str
) -> tuple[jax.Array, jax.Array]:
    """`(dx_TxD in x's dtype, dkernel_DxE float32)` of the logits' product, in one pass over x."""
    if (tokens := x_TxD.shape[0]) < _FEWEST:
        dx_TxD, dkernel_DxE = gradients(_enough(x_TxD), kernel_DxE, _enough(dz_ExT.T).T, backend)
        return dx_TxD[:tokens], dkernel_DxE
    (T, D), E = x_TxD.shape, kernel_DxE.shape[1]
    rows, block_t, block_d = _blocks(T, D, E)
    dz = jnp.pad(dz_ExT, ((0, rows - E), (0, -T % block_t)))
    kernel = jnp.pad(kernel_DxE.T, ((0, rows - E), (0, 0)))
    summed = rows
    if x_TxD.dtype == jnp.bfloat16:
        # dz · kernel, without the product of both low parts; the first two make dz for dkernel.
        (dz_high, dz_low), (high, low) = _split(dz, 2), _split(kernel, 2)
        dz = jnp.concatenate([dz_high, dz_low, dz_high])
        kernel = jnp.concatenate([high, high, low])
        summed = 2 * rows
    x_block = pl.BlockSpec((block_t, block_d), lambda d, t: (t, d))
    dx_TxD, dkernel_ExD = pl.pallas_call(
        functools.partial(_gradient_kernel, T=T),
        out_shape=[
            jax.ShapeDtypeStruct((T, D), x_TxD.dtype),
            jax.ShapeDtypeStruct((rows, D), jnp.float32),
        ],
        grid=(ceil_div(D, block_d), ceil_div(T, block_t)),
        in_specs=[
            x_block,
            pl.BlockSpec((dz.shape[0], block_t), lambda d, t: (0, t)),
            pl.BlockSpec((dz.shape[0], block_d), lambda d, t: (0, d)),
        ],
        out_specs=[x_block, pl.BlockSpec((rows, block_d), lambda d, t: (0, d))],
        scratch_shapes=[pltpu.VMEM((summed, block_d), jnp.float32)],
        **options(backend, ("parallel", "arbitrary")),
        name="route_gradients",
    )(x_TxD, dz, kernel)
    return dx_TxD, dkernel_ExD[:E].T
