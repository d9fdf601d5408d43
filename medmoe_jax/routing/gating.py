"""Gates of tokens: all routers that read one input.

Axes: B batch, T tokens, D model, E experts, K picks a token.
Plain JAX takes one product for all routers of an input. On TPU each router is one kernel, in which
no probability leaves the chip.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from medmoe_jax.base.execution import Execution
from medmoe_jax.kernels import routing as kernel
from medmoe_jax.kernels.router_equations import Gates, RouterStats, choose_experts, router_stats
from medmoe_jax.routing.routers import router_logits, without_padding


class Router(NamedTuple):
    """One router.

    Attributes:
      kernel_DxE, bias_E: float32; the bias may be None.
      top_k, renormalise, forced_BxT: see `kernels.router_equations.choose_experts`.
      noise_BxTxE: what is added to the logits, or None.
    """

    kernel_DxE: Any
    bias_E: Any
    top_k: int
    renormalise: bool
    forced_BxT: Any = None
    noise_BxTxE: Any = None


Decision = tuple[Gates, RouterStats]


def decide(x_BxTxD: jax.Array, valid_BxT: jax.Array, routers: Sequence[Router]) -> list[Decision]:
    """Each router's gates and statistics; where not `valid_BxT`, no expert is picked."""
    if not routers:
        return []
    kernel_DxE = jnp.concatenate([one.kernel_DxE for one in routers], axis=1)
    z = router_logits(x_BxTxD, kernel_DxE)
    out, start = [], 0
    for one in routers:
        z_BxTxE = z[..., start : start + one.kernel_DxE.shape[1]]
        start += z_BxTxE.shape[-1]
        if one.bias_E is not None:
            z_BxTxE = z_BxTxE + one.bias_E.astype(jnp.float32)[None, None]
        if one.noise_BxTxE is not None:
            z_BxTxE = z_BxTxE + one.noise_BxTxE
        choice = choose_experts(
            z_BxTxE, one.top_k, renormalise=one.renormalise, forced_BxT=one.forced_BxT
        )
        stats = router_stats(z_BxTxE, choice, valid_BxT)
        out.append((without_padding(choice.gates, valid_BxT), stats))
    return out


def decide_by_kernel(
    execution: Execution, x_BxTxD: jax.Array, valid_BxT: jax.Array, routers: Sequence[Router]
) -> list[Decision]:
    """The same with one kernel a router, run as `execution` says.

    The kernel adds no noise and has room for `MAX_EXPERTS`; other routers go to `decide`.
    """
    beyond = [
        r.noise_BxTxE is not None or r.kernel_DxE.shape[1] > kernel.MAX_EXPERTS for r in routers
    ]
    plain = iter(decide(x_BxTxD, valid_BxT, list(itertools.compress(routers, beyond))))
    return [
        next(plain) if out else _by_kernel(execution, x_BxTxD, valid_BxT, one)
        for one, out in zip(routers, beyond, strict=True)
    ]


def _by_kernel(execution: Execution, x_BxTxD, valid_BxT, router: Router) -> Decision:
    """Each device routes its rows and, where they divide, its share of their tokens."""
    (B, T, _), E = x_BxTxD.shape, router.kernel_DxE.shape[1]
    bias_E = jnp.zeros(E, jnp.float32) if router.bias_E is None else router.bias_E
    forced_BxT = jnp.full((B, T), -1) if router.forced_BxT is None else router.forced_BxT
    parts = _token_axes(execution, T)
    tokens, whole = PartitionSpec(execution.row_axes, parts), PartitionSpec()
    run = execution.per_device(
        functools.partial(_local, execution.backend, router, (*execution.row_axes, *parts)),
        (tokens, whole, whole, tokens, tokens),
        (tokens, tokens, whole),
    )
    weights_BxTxK, picks_BxTxK, stats = run(
        x_BxTxD, router.kernel_DxE, bias_E, valid_BxT, forced_BxT
    )
    mine_BxTxKxE = picks_BxTxK[..., None] == jnp.arange(E)[None, None, None]
    dense_BxTxE = jnp.sum(jnp.where(mine_BxTxKxE, weights_BxTxK[..., None], 0.0), axis=-2)
    return without_padding(Gates(dense_BxTxE, picks_BxTxK, weights_BxTxK), valid_BxT), stats


def _token_axes(execution: Execution, tokens: int) -> tuple[str, ...]:
    """The axes that a row's tokens are cut over here: their own, and `tensor` where it divides."""
    own = execution.sequence_axis(tokens)
    part = execution.tensor_axis(tokens // execution.size(own))
    return tuple(axis for axis in (own, part) if axis)


def _local(backend, router: Router, summed, x_BxTxD, kernel_DxE, bias_E, valid_BxT, forced_BxT):
    """One device's picks, and the sums over all; `summed` are the axes that tokens are cut over."""
    routed = kernel.route(
        x_BxTxD.reshape(-1, x_BxTxD.shape[-1]),
        kernel_DxE,
        bias_E,
        valid_BxT.reshape(-1),
        top_k=router.top_k,
        renormalise=router.renormalise,
        forced_T=forced_BxT.reshape(-1),
        backend=backend,
    )
    shape = (*x_BxTxD.shape[:2], router.top_k)
    picked = (routed.weights_TxK.reshape(shape), routed.picks_TxK.reshape(shape))
    return *picked, jax.lax.psum(routed.stats, summed) if summed else routed.stats
