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
from medmoe_jax.base.decoder import base_linear
from medmoe_jax.routing.dispatch import Strategy, Term
from medmoe_jax.routing.routers import route, router_logits, router_stats, without_padding


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


def _routers(present, extra, group: str, x_BxTxD, context) -> tuple[dict, dict]:
    """Gates and statistics of every routed (bank, site), from one product."""
    routed = [(bank, site) for bank, site in present if bank.routed]
    if not routed:
        return {}, {}
    params = [extra[bank.name][site]["router"] for bank, site in routed]
    kernel = jnp.concatenate([p["kernel"] for p in params], axis=1)
    z = router_logits(x_BxTxD, kernel)
    gates, stats, start = {}, {}, 0
    for (bank, site), p in zip(routed, params, strict=True):
        z_BxTxE = z[..., start : start + bank.experts]
        start += bank.experts
        if "bias" in p:
            z_BxTxE = z_BxTxE + p["bias"].astype(jnp.float32)[None, None]
        key = f"{bank.name}/{site}"
        gates[bank.name, site], stats[key] = decide(bank, f"{group}/{key}", z_BxTxE, context)
    return gates, stats


def decide(bank: BankSpec, name: str, z_BxTxE, context: Mapping[str, Any]):
    """`(Gates, RouterStats)` of one router from its logits; `name` sets its noise apart.

    Padding picks no expert.
    """
    key = context.get("dropout_key")
    if bank.router_noise and key is not None:
        key = jax.random.fold_in(key, context["layer"])
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        z_BxTxE = z_BxTxE + bank.router_noise * jax.random.normal(key, z_BxTxE.shape)
    forcing = bank.gate == "language" and (
        bank.forcing == "always" or (bank.forcing == "train" and context.get("training"))
    )
    routed = route(
        z_BxTxE,
        bank.top_k,
        renormalise=bank.renormalise,
        forced_BxT=context.get("language_ids") if forcing else None,
    )
    valid_BxT = context["segment_ids"] > 0
    stats = router_stats(z_BxTxE, routed, valid_BxT)
    if not (bank.balance_loss or bank.z_loss):
        stats = jax.lax.stop_gradient(stats)
    return without_padding(routed.gates, valid_BxT), stats


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
    y, _ = base_linear(group, x_BxTxD, weights, None, context)
    present = [(b, site) for site in weights for b in banks if site in extra[b.name]]
    if not present:
        return y, {}
    gates, stats = _routers(present, extra, group, x_BxTxD, context)
    inputs = dropped_inputs([b for b, _ in present], group, x_BxTxD, context)
    terms: dict[str, list[Term]] = {}
    for bank, site in present:
        p = site_params(bank, extra[bank.name], site)
        term = Term(
            inputs[bank.dropout],
            p["lora_a"],
            p["lora_b"],
            gates.get((bank.name, site)),
            p.get("scale"),
            bank.s,
        )
        terms.setdefault(site, []).append(term)
    for site, delta in dispatch.lora(terms).items():
        y[site] += delta
    return y, stats
