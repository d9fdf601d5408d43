"""The adapted site: what the decoder's seam calls when banks are present.

Axes: B batch, T tokens, D input width, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.bank import BankSpec, site_params
from medmoe_jax.routing.dispatch import Strategy, Term
from medmoe_jax.routing.gating import Decision, Router


def dropped_inputs(banks, group: str, x_BxTxD, context: Mapping[str, Any]) -> dict[float, Any]:
    """`{rate: x after dropout}`: one draw a group, so that equal rates share one array."""
    key = context.get("dropout_key")
    rates = {bank.dropout if key is not None else 0.0 for bank in banks}
    inputs = {0.0: x_BxTxD}
    if rates - {0.0}:
        key = jax.random.fold_in(key, context["layer"])
        key = jax.random.fold_in(key, zlib.crc32(group.encode()))
        # Sixteen bits a draw: the rate is exact to 1 in 65,536.
        bits = jax.random.bits(key, x_BxTxD.shape, jnp.uint16)
        for rate in rates - {0.0}:
            cut = round(rate * 65536)
            keep = (bits >= cut).astype(x_BxTxD.dtype)
            inputs[rate] = x_BxTxD * keep * (1.0 / (1.0 - cut / 65536))
    return inputs if key is not None else {bank.dropout: x_BxTxD for bank in banks}


def decide(dispatch: Strategy, routed, x_BxTxD, context: Mapping[str, Any]) -> list[Decision]:
    """Gates and statistics of every router that reads x; padding picks no expert.

    Args:
      dispatch: a strategy of `routing.dispatch`.
      routed: `(bank, name, router's parameters)` of each; the name sets its noise apart.
      x_BxTxD: their input.
      context: see `adapted_linear`.
    """
    routers = [_router(*one, x_BxTxD.shape[:2], context) for one in routed]
    out = []
    decisions = dispatch.decide(x_BxTxD, context["segment_ids"] > 0, routers)
    for (bank, *_), (gates, stats) in zip(routed, decisions, strict=True):
        if not (bank.balance_loss or bank.z_loss):
            stats = jax.lax.stop_gradient(stats)
        out.append((gates, stats))
    return out


def _router(bank: BankSpec, name: str, params, tokens: tuple[int, int], context) -> Router:
    key, noise_BxTxE = context.get("dropout_key"), None
    if bank.router_noise and key is not None:
        key = jax.random.fold_in(key, context["layer"])
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        noise_BxTxE = bank.router_noise * jax.random.normal(key, (*tokens, bank.experts))
    forcing = bank.gate == "language" and (
        bank.forcing == "always" or (bank.forcing == "train" and context.get("training"))
    )
    forced_BxT = context.get("language_ids") if forcing else None
    return Router(
        params["kernel"],
        params.get("bias"),
        bank.top_k,
        bank.renormalise,
        forced_BxT,
        noise_BxTxE,
    )


def adapted_linear(
    banks: tuple[BankSpec, ...],
    dispatch: Strategy,
    group: str,
    x_BxTxD,
    weights: Mapping[str, Any],
    extra: Mapping[str, Any],
    context: Mapping[str, Any],
):
    """The sites of a projection group with their banks: `y = x W + Σ_banks s B(gate ∘ Λ ∘ A x)`.

    Args:
      banks: those active on this range of layers.
      dispatch: a strategy of `routing.dispatch`.
      group, x_BxTxD, weights: see `base.decoder`.
      extra: `{bank: {site: parameters}}` of this layer.
      context: `segment_ids`, `layer`; `language_ids` where known (int32 [B, T], the expert of the
        token's language or -1); in training `training` and `dropout_key`.

    Returns:
      `({site: y}, {"bank/site": RouterStats})`.
    """
    present = [(b, site) for site in weights for b in banks if site in extra[b.name]]
    routed = {f"{b.name}/{site}": (b, site) for b, site in present if b.routed}
    decisions = decide(
        dispatch,
        [(b, f"{group}/{key}", extra[b.name][s]["router"]) for key, (b, s) in routed.items()],
        x_BxTxD,
        context,
    )
    gates, stats = {}, {}
    for key, decision in zip(routed, decisions, strict=True):
        gates[key], stats[key] = decision
    inputs = dropped_inputs([b for b, _ in present], group, x_BxTxD, context)
    terms: dict[str, list[Term]] = {}
    for bank, site in present:
        p = site_params(bank, extra[bank.name], site)
        term = Term(
            inputs[bank.dropout],
            p["lora_a"],
            p["lora_b"],
            gates.get(f"{bank.name}/{site}"),
            p.get("scale"),
            bank.s,
        )
        terms.setdefault(site, []).append(term)
    return dispatch.linear(x_BxTxD, weights, terms), stats
