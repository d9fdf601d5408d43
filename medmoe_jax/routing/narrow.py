"""Products with narrow float32 matrices, whose gradients are cheap to form.

Axes: B batch, T tokens, D wide, R narrow.
A parameter's gradient is a sum over tokens, `hᵀ x` with h narrow and x wide. Left to itself, the
compiler puts the wide array on the left and, off TPU, transposes it in memory first, which takes
longer than the product with the base's weights. Here the narrow one is on the left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_explicit_axes(array: jax.Array) -> bool:
    """Whether an array lies on a mesh with Explicit axes, where its type says how it is cut."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def _laid(array_BxTxW: jax.Array, spec: Iterable) -> NamedSharding | None:
    """Where a gradient lies that has those mesh axes, on the mesh of the activations.

    It has to be said where axes are Explicit and the product sums over what they cut.
    """
    if not on_explicit_axes(array_BxTxW):
        return None
    return NamedSharding(jax.typeof(array_BxTxW).sharding.mesh, PartitionSpec(*spec))


def _axes(array: jax.Array) -> PartitionSpec:
    return jax.typeof(array).sharding.spec


def _sum_over_tokens(h_BxTxR, x_BxTxD, precision, laid_RxD):
    """`Σ_BT h ⊗ x`, float32 `[R, D]`."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(
        h_BxTxR,
        x_BxTxD,
        tokens,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=laid_RxD,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow(
    x_BxTxD: jax.Array, a_DxR: jax.Array, precision: Precision = Precision.DEFAULT
) -> jax.Array:
    """`x A` in x's dtype, for an A of few columns; its gradient is summed in float32.

    Args:
      x_BxTxD: activations.
      a_DxR: float32, cast to x's dtype here.
      precision: how the product and its gradients are multiplied.
    """
    return jnp.matmul(x_BxTxD, a_DxR.astype(x_BxTxD.dtype), precision=precision)


def _narrow_backward(precision, residuals, h_BxTxR):
    x_BxTxD, a_DxR = residuals
    laid_BxTxD, laid_RxD = _laid(x_BxTxD, _axes(x_BxTxD)), _laid(x_BxTxD, reversed(_axes(a_DxR)))
    a_RxD = a_DxR.astype(h_BxTxR.dtype).T
    dx_BxTxD = jnp.matmul(h_BxTxR, a_RxD, precision=precision, out_sharding=laid_BxTxD)
    da_RxD = _sum_over_tokens(h_BxTxR, x_BxTxD, precision, laid_RxD)
    # Without the barrier the compiler folds the transpose into the product: wide on the left.
    return dx_BxTxD, jax.lax.optimization_barrier(da_RxD).T


narrow.defvjp(lambda x, a, precision: (narrow(x, a, precision), (x, a)), _narrow_backward)


@jax.custom_vjp
def widen(h_BxTxR: jax.Array, b_RxD: jax.Array) -> jax.Array:
    """`h B` in h's dtype, for a B of few rows; its gradient is summed in float32.

    Args:
      h_BxTxR: activations.
      b_RxD: float32, cast to h's dtype here.
    """
    return h_BxTxR @ b_RxD.astype(h_BxTxR.dtype)


def _widen_backward(residuals, y_BxTxD):
    h_BxTxR, b_RxD = residuals
    laid_BxTxR, laid_RxD = _laid(h_BxTxR, _axes(h_BxTxR)), _laid(h_BxTxR, _axes(b_RxD))
    b_DxR = b_RxD.astype(y_BxTxD.dtype).T
    dh_BxTxR = jnp.matmul(y_BxTxD, b_DxR, out_sharding=laid_BxTxR)
    return dh_BxTxR, _sum_over_tokens(h_BxTxR, y_BxTxD, Precision.DEFAULT, laid_RxD)


widen.defvjp(lambda h, b: (widen(h, b), (h, b)), _widen_backward)
