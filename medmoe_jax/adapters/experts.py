"""Mixtures whose experts are feed-forward networks.

Axes: B batch, T tokens, D model, F feed-forward, E experts, K picks a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.bank import BankSpec, site_params
from medmoe_jax.adapters.site import decide, dropped_inputs
from medmoe_jax.base.config import GROUPS
from medmoe_jax.base.seam import Context, Params, Seam, gated_mlp
from medmoe_jax.kernels.router_equations import Gates, RouterStats
from medmoe_jax.routing.dispatch import Strategy
from medmoe_jax.routing.terms import LoraTerm

_IN, _OUT = "mlp.in", "mlp.out"


def expert_mlp(
    bank: BankSpec,
    strategy: Strategy,
    seam: Seam,
    activation: Callable,
    x_BxTxD: jax.Array,
    weights: Params,
    params: Mapping[str, Any],
    context: Context,
) -> tuple[jax.Array, dict[str, RouterStats]]:
    """`Σ_k w_k FFN_{e_k}(x)` with the bank's experts, and the base's network if it stands beside.

    Args:
      bank: whose experts are networks.
      strategy: runs experts and routers.
      seam: runs the sites of the base's own network.
      activation: the nonlinearity of a network's gate.
      x_BxTxD, weights, context: see `base.seam.Seam`.
      params: `{bank: {site: parameters}}` of this layer.

    Returns:
      `(y_BxTxD, {"bank/mlp": RouterStats, ...})`.
    """
    mine = params[bank.name]
    name = f"{bank.name}/mlp"
    router = mine["mlp"]["router"]
    ((gates, stats),) = decide(strategy, [(bank, name, router)], x_BxTxD, context)
    if not bank.whole:
        y_BxTxD, more = _shared_ffn(
            bank, strategy, seam, activation, gates, x_BxTxD, weights, params, context
        )
        return y_BxTxD, {name: stats} | more
    experts = {site.split(".")[1]: mine[site]["experts"] for site in bank.sites}
    y_BxTxD = strategy.ffn(x_BxTxD, gates, experts, activation)
    if bank.form == "ffn":
        return y_BxTxD, {name: stats}
    shared_BxTxD, more = gated_mlp(seam, activation, x_BxTxD, weights, params, context)
    return shared_BxTxD + y_BxTxD, {name: stats} | more


def _shared_ffn(bank, strategy, seam, activation, gates: Gates, x_BxTxD, weights, params, context):
    """Experts that differ from the base by low-rank factors.

    The down-projection is linear, so the base runs once for any K:
    Σ_k w_k (W_d + s B_k A_k) h_k = W_d Σ_k w_k h_k + s Σ_k w_k B_k A_k h_k.
    """
    inner = {site: weights[site] for site in GROUPS[_IN]}
    base, stats_in = seam.linear(_IN, x_BxTxD, inner, params, context)
    x = dropped_inputs([bank], _IN, x_BxTxD, context)[bank.dropout].x_BxTxD
    sites = {site: site_params(bank, params[bank.name], site) for site in bank.sites}

    def term(site, x, pick: Gates) -> LoraTerm:
        p = sites[site]
        return LoraTerm(x, p["lora_a"], p["lora_b"], pick, p.get("scale"), bank.s)

    total_BxTxF, down = 0.0, []
    for k in range(bank.top_k):
        one, weighted = _pick(gates, k, bank.experts)
        delta = strategy.lora({site: [term(site, x, one)] for site in GROUPS[_IN]})
        h_BxTxF = activation(base["mlp.gate"] + delta["mlp.gate"]) * (
            base["mlp.up"] + delta["mlp.up"]
        )
        total_BxTxF += weighted.weights_BxTxK.astype(h_BxTxF.dtype) * h_BxTxF
        h_dropped = dropped_inputs([bank], f"{_OUT}/{k}", h_BxTxF, context)[bank.dropout]
        down.append(term("mlp.down", h_dropped.x_BxTxD, weighted))
    outer = {"mlp.down": weights["mlp.down"]}
    y, stats_out = seam.linear(_OUT, total_BxTxF, outer, params, context)
    y_BxTxD = y["mlp.down"] + strategy.lora({"mlp.down": down})["mlp.down"]
    return y_BxTxD, stats_in | stats_out


def _pick(gates: Gates, k: int, experts: int) -> tuple[Gates, Gates]:
    """Every token's k-th pick alone, with weight one and with its own weight."""
    picks_BxTx1 = gates.picks_BxTxK[..., k : k + 1]
    weights_BxTx1 = gates.weights_BxTxK[..., k : k + 1]
    chosen_BxTxE = (picks_BxTx1 == jnp.arange(experts)[None, None]).astype(weights_BxTx1.dtype)
    one = Gates(chosen_BxTxE, picks_BxTx1, jnp.ones_like(weights_BxTx1))
    return one, Gates(chosen_BxTxE * weights_BxTx1, picks_BxTx1, weights_BxTx1)
