"""Token routers beside their equations (`kernels.router_equations`): logits, padding, and losses.

Axes: B batch, T tokens, D model, E experts, K picks a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import Gates, RouterStats
from medmoe_jax.ranges import COUNT
from medmoe_jax.routing.narrow import narrow


def check_top_k(where: str, top_k: int, experts: int) -> None:
    """Raise UserError unless 1 <= top_k <= experts."""
    COUNT.check_whole(f"{where}.top_k", top_k)
    if top_k > experts:
        raise UserError(f"{where}.top_k: {top_k} of {experts} experts; give 1 to {experts}")


def router_logits(x_BxTxD: jax.Array, kernel_DxE: jax.Array) -> jax.Array:
    """`x R`, float32 `[B, T, E]`, multiplied at full precision."""
    full = jax.lax.Precision.HIGHEST
    return narrow(x_BxTxD.astype(jnp.float32), kernel_DxE.astype(jnp.float32), full)


def without_padding(gates: Gates, valid_BxT: jax.Array) -> Gates:
    """The same gates with no expert picked where not `valid_BxT`, so that none works there."""
    valid_BxTx1 = valid_BxT[..., None]
    return Gates(
        jnp.where(valid_BxTx1, gates.dense_BxTxE, 0.0),
        jnp.where(valid_BxTx1, gates.picks_BxTxK, gates.dense_BxTxE.shape[-1]),
        jnp.where(valid_BxTx1, gates.weights_BxTxK, 0.0),
    )


def balance_loss(stats: RouterStats) -> jax.Array:
    """Load-balance loss `E Σ_e f_e P_e` (Switch Transformer, arXiv 2101.03961, eq. 4), [...].

    f_e is the expert's share of all picks, P_e its mean probability: 1 where both are even. Leading
    axes of the statistics, such as layers, stay.
    """
    use_E = jax.lax.stop_gradient(stats.use_E)
    share_E = use_E / jnp.maximum(use_E.sum(-1, keepdims=True), 1.0)
    mean_E = stats.prob_E / jnp.maximum(stats.tokens, 1.0)[..., None]
    return use_E.shape[-1] * jnp.sum(share_E * mean_E, axis=-1)


def z_loss(stats: RouterStats) -> jax.Array:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, eq. 5), [...]."""
    return stats.z2 / jnp.maximum(stats.tokens, 1.0)
