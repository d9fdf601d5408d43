"""Strategies that compute mixtures of low-rank experts on the sites of a projection group.

Axes: B batch, T tokens, D input width, O output width, E experts, r rank,
R = Σ E·r over the terms concatenated.

Every strategy computes, for each site, `Σ_terms s · B ((x A) ∘ Λ ∘ gates)`; `reference` says what
that means, the others are tested against it in value and gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from medmoe_jax.errors import UserError
from medmoe_jax.routing.routers import Gates


class Term(NamedTuple):
    """One bank on one site.

    Attributes:
      x_BxTxD: the bank's input (after its dropout); terms with the same array share one product.
      lora_a_DxExr, lora_b_ExrxO: the experts, float32.
      gates: a router's decision, or None for ones.
      scale_Exr: Λ, or None for ones.
      s: alpha / r.
    """

    x_BxTxD: Any
    lora_a_DxExr: Any
    lora_b_ExrxO: Any
    gates: Gates | None
    scale_Exr: Any
    s: float


def reference(terms: Mapping[str, Sequence[Term]]) -> dict[str, Any]:
    """A plain loop over experts: `{site: delta_BxTxO}`."""
    out = {}
    for site, site_terms in terms.items():
        total = 0
        for term in site_terms:
            dtype = term.x_BxTxD.dtype
            for e in range(term.lora_a_DxExr.shape[1]):
                h_BxTxr = term.x_BxTxD @ term.lora_a_DxExr[:, e].astype(dtype)
                if term.scale_Exr is not None:
                    h_BxTxr *= term.scale_Exr[e].astype(dtype)[None, None]
                if term.gates is not None:
                    h_BxTxr *= term.gates.dense_BxTxE[..., e, None].astype(dtype)
                total += term.s * (h_BxTxr @ term.lora_b_ExrxO[e].astype(dtype))
        out[site] = total
    return out


def _rank_factor(term: Term):
    """`s · gates · Λ` in rank space, float32 `[B or 1, T or 1, E·r]`."""
    E, r = term.lora_a_DxExr.shape[1:]
    factor = jnp.full((1, 1, E, r), term.s, jnp.float32)
    if term.scale_Exr is not None:
        factor *= term.scale_Exr[None, None]
    if term.gates is not None:
        factor = factor * term.gates.dense_BxTxE[..., None]
    return factor.reshape(*factor.shape[:2], E * r)


def stacked(terms: Mapping[str, Sequence[Term]]) -> dict[str, Any]:
    """One product with the concatenated A, gates in rank space, one product with B a site.

    Memory is that of the outputs plus `[B, T, R]`; every expert's rank columns are computed, which
    at a few hundred columns is cheaper than moving tokens.
    """
    inputs: dict[int, list[Term]] = {}
    for site_terms in terms.values():
        for term in site_terms:
            inputs.setdefault(id(term.x_BxTxD), []).append(term)
    h_of: dict[int, Any] = {}
    for shared in inputs.values():
        x_BxTxD = shared[0].x_BxTxD
        D = x_BxTxD.shape[-1]
        columns = [t.lora_a_DxExr.reshape(D, -1).astype(x_BxTxD.dtype) for t in shared]
        h_BxTxR = x_BxTxD @ jnp.concatenate(columns, axis=1)
        start = 0
        for term, column in zip(shared, columns, strict=True):
            h_of[id(term)] = h_BxTxR[..., start : start + column.shape[1]]
            start += column.shape[1]
    out = {}
    for site, site_terms in terms.items():
        # In float32, so that Λ's gradient, a sum over every token, adds up in float32.
        h = [
            (h_of[id(t)].astype(jnp.float32) * _rank_factor(t)).astype(t.x_BxTxD.dtype)
            for t in site_terms
        ]
        b = [
            t.lora_b_ExrxO.reshape(-1, t.lora_b_ExrxO.shape[-1]).astype(t.x_BxTxD.dtype)
            for t in site_terms
        ]
        out[site] = jnp.concatenate(h, axis=-1) @ jnp.concatenate(b, axis=0)
    return out


STRATEGIES = {"reference": reference, "stacked": stacked}


def strategy(name: str):
    """The strategy of that name; UserError names the known ones."""
    if name not in STRATEGIES:
        raise UserError(f"run.dispatch: '{name}' is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
