"""The adapted site: what runs the linear layers of the decoder when banks are present.

Axes: B batch, T tokens, D input width, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from medmoe_jax.adapters.bank import BankSpec, site_params
from medmoe_jax.base.seam import Context
from medmoe_jax.kernels.dropout import Dropout, counter
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.routing.dispatch import Strategy
from medmoe_jax.routing.gating import Decision, Router
from medmoe_jax.routing.terms import LoraTerm


class Input(NamedTuple):
    """What a bank reads: x after a draw of dropout, or x itself where that is None."""

    x_BxTxD: Any
    dropout: Dropout | None


def dropped_inputs(
    banks: Sequence[BankSpec], group: str, x_BxTxD: jax.Array, context: Context
) -> dict[float, Input]:
    """`{rate: x after dropout}`: one draw a group, so that equal rates share one array."""
    key = context.dropout_key
    if key is None:
        return {bank.dropout: Input(x_BxTxD, None) for bank in banks}
    inputs = {0.0: Input(x_BxTxD, None)}
    rates = {bank.dropout for bank in banks} - {0.0}
    if rates:
        key = jax.random.fold_in(key, context.layer)
        key = jax.random.fold_in(key, zlib.crc32(group.encode()))
        count = counter(key, x_BxTxD.shape)
        for draw in (Dropout(count, rate) for rate in rates):
            inputs[draw.rate] = Input(draw(x_BxTxD), draw)
    return inputs


def decide(
    strategy: Strategy,
    routed: Sequence[tuple[BankSpec, str, Mapping[str, Any]]],
    x_BxTxD: jax.Array,
    context: Context,
) -> list[Decision]:
    """Gates and statistics of every router that reads x; padding picks no expert.

    Args:
      strategy: runs the routers.
      routed: `(bank, name, router's parameters)` of each; the name sets its noise apart.
      x_BxTxD: their input.
      context: what is known of the tokens.
    """
    routers = [_router(*one, x_BxTxD.shape[:2], context) for one in routed]
    out = []
    decisions = strategy.decide(x_BxTxD, context.segment_ids_BxT > 0, routers)
    for (bank, *_), (gates, stats) in zip(routed, decisions, strict=True):
        if not (bank.balance_loss or bank.z_loss):
            stats = jax.lax.stop_gradient(stats)
        out.append((gates, stats))
    return out


def _router(
    bank: BankSpec, name: str, params: Mapping[str, Any], shape: tuple[int, ...], context: Context
) -> Router:
    key, noise_BxTxE = context.dropout_key, None
    if bank.router_noise and key is not None:
        key = jax.random.fold_in(key, context.layer)
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        noise_BxTxE = bank.router_noise * jax.random.normal(key, (*shape, bank.experts))
    forcing = bank.gate == "language" and (
        bank.forcing == "always" or (bank.forcing == "train" and context.training)
    )
    return Router(
        params["kernel"],
        params.get("bias"),
        bank.top_k,
        bank.renormalise,
        context.language_ids_BxT if forcing else None,
        noise_BxTxE,
    )


def site_terms(
    banks: tuple[BankSpec, ...],
    strategy: Strategy,
    group: str,
    x_BxTxD: jax.Array,
    sites: Iterable[str],
    params: Mapping[str, Any],
    context: Context,
) -> tuple[dict[str, list[LoraTerm]], dict[str, RouterStats]]:
    """What the banks add to the sites of a projection group, for a strategy to compute.

    Args:
      banks: those active on this range of layers.
      strategy: runs their routers.
      group: the name of the sites that share the input; sets draws apart.
      x_BxTxD: the input.
      sites: the group's.
      params: `{bank: {site: parameters}}` of this layer.
      context: what is known of the tokens.

    Returns:
      `({site: terms}, {"bank/site": RouterStats})`; a site without banks has no terms.
    """
    present = [(b, site) for site in sites for b in banks if site in params[b.name]]
    routed = {f"{b.name}/{site}": (b, site) for b, site in present if b.routed}
    decisions = decide(
        strategy,
        [(b, f"{group}/{key}", params[b.name][s]["router"]) for key, (b, s) in routed.items()],
        x_BxTxD,
        context,
    )
    gates, stats = {}, {}
    for key, decision in zip(routed, decisions, strict=True):
        gates[key], stats[key] = decision
    inputs = dropped_inputs([b for b, _ in present], group, x_BxTxD, context)
    terms: dict[str, list[LoraTerm]] = {}
    for bank, site in present:
        p = site_params(bank, params[bank.name], site)
        term = LoraTerm(
            inputs[bank.dropout].x_BxTxD,
            p["lora_a"],
            p["lora_b"],
            gates.get(f"{bank.name}/{site}"),
            p.get("scale"),
            bank.s,
            inputs[bank.dropout].dropout,
        )
        terms.setdefault(site, []).append(term)
    return terms, stats


def adapted_linear(
    banks: tuple[BankSpec, ...],
    strategy: Strategy,
    group: str,
    x_BxTxD: jax.Array,
    weights: Mapping[str, Any],
    params: Mapping[str, Any],
    context: Context,
) -> tuple[dict[str, Any], dict[str, RouterStats]]:
    """The sites of a projection group with their banks: `y = x W + Σ_banks s B(gate ∘ Λ ∘ A x)`.

    Args:
      banks: those active on this range of layers.
      strategy: runs their experts and routers.
      group, x_BxTxD, weights, context: see `base.seam.Seam`.
      params: `{bank: {site: parameters}}` of this layer.

    Returns:
      `({site: y}, {"bank/site": RouterStats})`.
    """
    terms, stats = site_terms(banks, strategy, group, x_BxTxD, weights, params, context)
    return strategy.linear(x_BxTxD, weights, terms), stats
