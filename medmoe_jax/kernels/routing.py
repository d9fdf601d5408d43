"""A token router in one pass over x: logits, top-k weights and the statistics of both.

Axes: T tokens, D model, E experts, K picks a token.

    z = x R + b,  then the equations of `router_equations`
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import routing_tpu
from medmoe_jax.kernels.router_equations import RouterStats, choose_experts, known, router_stats
from medmoe_jax.kernels.tiles import check_backend, check_floats

MAX_EXPERTS = routing_tpu.MAX_EXPERTS  # of the kernel; `"xla"` takes any number


class Routed(NamedTuple):
    """A router's picks, and sums over the valid tokens, which add up over devices.

    Gradients flow through `weights_TxK`, `stats.prob_E` and `stats.z2`.

    Attributes:
      weights_TxK: float32.
      picks_TxK: int32, best first.
      stats: the sums.
    """

    weights_TxK: jax.Array
    picks_TxK: jax.Array
    stats: RouterStats


def _reference(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, top_k: int, renormalise: bool):
    full = jax.lax.Precision.HIGHEST
    z_TxE = jnp.dot(x_TxD.astype(jnp.float32), kernel_DxE, precision=full) + bias_E[None]
    choice = choose_experts(z_TxE[None], top_k, renormalise=renormalise, forced_BxT=forced_T[None])
    stats = router_stats(z_TxE[None], choice, valid_T[None])
    return Routed(choice.gates.weights_BxTxK[0], choice.gates.picks_BxTxK[0], stats)


def _forward(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, *static):
    """The kernel's results as `Routed`, and the logits `[E, T]`, which the gradient needs."""
    E = kernel_DxE.shape[1]
    out = routing_tpu.route(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, *static)
    entropy, z2, forced, non_finite = jnp.sum(out.sums_NxSx1, axis=(0, 2))
    weights_TxK, picks_TxK = out.weights_KxT.T, out.picks_KxT.T
    stats = RouterStats(
        tokens=jnp.sum(valid_T, dtype=jnp.float32),
        use_E=jnp.sum(out.use_NxEx1, axis=(0, 2))[:E],
        prob_E=jnp.sum(out.prob_NxEx1, axis=(0, 2))[:E],
        entropy=entropy,
        z2=z2,
        forced=forced,
        non_finite=non_finite,
    )
    return Routed(weights_TxK, picks_TxK, stats), out.z_ExT[:E]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _route(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, top_k, renormalise, backend):
    return _forward(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, top_k, renormalise, backend)[0]


def _route_fwd(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, *static):
    routed, z_ExT = _forward(x_TxD, kernel_DxE, bias_E, valid_T, forced_T, *static)
    return routed, (x_TxD, kernel_DxE, valid_T, z_ExT, routed.weights_TxK, routed.picks_TxK)


def _route_bwd(top_k, renormalise, backend, saved, cotangent: Routed):
    """The gradient of the logits, which XLA fuses into one pass, then both of its products."""
    x_TxD, kernel_DxE, valid_T, z_ExT, w_TxK, picks_TxK = saved
    expert_E = jnp.arange(z_ExT.shape[0])

    def spread(values_TxK):
        picked_ExTxK = picks_TxK[None] == expert_E[:, None, None]
        return jnp.sum(jnp.where(picked_ExTxK, values_TxK[None], 0.0), axis=2)

    prob_ExT = jax.nn.softmax(z_ExT, axis=0)
    live_1xT = valid_T[None].astype(jnp.float32)
    dprob_ExT = cotangent.stats.prob_E[:, None] * live_1xT
    dw_TxK = cotangent.weights_TxK
    if renormalise:
        mean_Tx1 = jnp.sum(w_TxK * dw_TxK, axis=1, keepdims=True)
        dz_ExT = spread(w_TxK * (dw_TxK - mean_Tx1))
    else:
        dz_ExT = jnp.zeros_like(z_ExT)
        dprob_ExT += spread(dw_TxK)
    lse_1xT = jax.nn.logsumexp(z_ExT, axis=0, keepdims=True)
    mean_1xT = jnp.sum(prob_ExT * dprob_ExT, axis=0, keepdims=True)
    dz_ExT += prob_ExT * (dprob_ExT - mean_1xT + 2 * cotangent.stats.z2 * lse_1xT * live_1xT)
    dx_TxD, dkernel_DxE = routing_tpu.gradients(x_TxD, kernel_DxE, dz_ExT, backend)
    return dx_TxD, dkernel_DxE, jnp.sum(dz_ExT, axis=1), None, None


_route.defvjp(_route_fwd, _route_bwd)


def route(
    x_TxD: jax.Array,
    kernel_DxE: jax.Array,
    bias_E: jax.Array | None,
    valid_T: jax.Array,
    *,
    top_k: int,
    renormalise: bool,
    forced_T: jax.Array | None = None,
    backend: str,
) -> Routed:
    """Route every token; all of it in float32, the product at full precision.

    Args:
      x_TxD: float32 or bfloat16.
      kernel_DxE: float32.
      bias_E: float32, or None.
      valid_T: bool; the other tokens are routed too, but not counted.
      top_k: experts a token picks.
      renormalise: whether a token's weights sum to one (a softmax over the kept logits).
      forced_T: int32, an expert that must be among a token's picks, or -1; where it is not, it
        takes the place of the weakest pick (hybrid routing, arXiv 2410.10626).
      backend: see `medmoe_jax.kernels`.

    Raises:
      UserError: shapes or dtypes that do not fit together, or too many experts for the kernel.

    Example, two tokens that pick one of three experts:
      >>> x_TxD, kernel_DxE = jnp.eye(2), jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, 1.0]])
      >>> valid_T = jnp.array([True, True])
      >>> routed = route(
      ...     x_TxD, kernel_DxE, None, valid_T, top_k=1, renormalise=True, backend="xla"
      ... )
      >>> routed.picks_TxK.tolist(), routed.weights_TxK.tolist()
      ([[2], [0]], [[1.0], [1.0]])
      >>> routed.stats.use_E.tolist()
      [1.0, 0.0, 1.0]
    """
    check_backend(backend)
    check_floats(x_TxD=x_TxD, kernel_DxE=kernel_DxE)
    T, D = x_TxD.shape
    E = kernel_DxE.shape[1]
    if kernel_DxE.shape[0] != D:
        raise UserError(f"x_TxD has width {D}, the router's kernel expects {kernel_DxE.shape[0]}")
    if valid_T.shape != (T,) or valid_T.dtype != jnp.bool_:
        raise UserError(f"valid_T is {valid_T.dtype} {valid_T.shape}; give bool ({T},)")
    if not 1 <= top_k <= E:
        raise UserError(f"top_k: {top_k} of {E} experts; give 1 to {E}")
    bias_E = jnp.zeros(E, jnp.float32) if bias_E is None else bias_E.astype(jnp.float32)
    forced_T = jnp.full(T, -1, jnp.int32) if forced_T is None else forced_T.astype(jnp.int32)
    forced_T = known(forced_T, E)
    arrays = (x_TxD, kernel_DxE.astype(jnp.float32), bias_E, valid_T, forced_T)
    if backend == "xla":
        return _reference(*arrays, top_k, renormalise)
    return _route(*arrays, top_k, renormalise, backend)
