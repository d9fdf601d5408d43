"""Strategies in which every device runs every expert on its tokens.

Axes: B batch, T tokens, D input width, O output width, F feed-forward, E experts, r rank,
R = Σ E·r over the terms concatenated, N = B·T tokens, K picks a token.

`reference` says what a mixture means, the other strategies are tested against it in value and
gradient: low-rank experts add `Σ_terms s · B ((x A) ∘ Λ ∘ gates)` to each site, feed-forward ones
make `Σ_e gate_e W_down,e (act(W_gate,e x) ∘ W_up,e x)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.base.seam import project
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.routing.narrow import narrow, on_explicit_axes, widen
from medmoe_jax.routing.terms import LoraTerm, Terms


def base_products(x_BxTxD: jax.Array, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The base alone, `{site: x W (+ b)}`."""
    return {site: project(x_BxTxD, weight) for site, weight in weights.items()}


def add(y: Mapping[str, Any], deltas: Mapping[str, Any]) -> dict[str, Any]:
    """`{site: y + delta}`; not every site has a delta."""
    out = dict(y)
    for site, delta in deltas.items():
        out[site] += delta
    return out


def reference_lora(terms: Terms) -> dict[str, Any]:
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


def _rank_factor(term: LoraTerm):
    """`s · gates · Λ` in rank space, float32 `[B or 1, T or 1, E·r]`."""
    E, r = term.lora_a_DxExr.shape[1:]
    factor = jnp.full((1, 1, E, r), term.s, jnp.float32)
    if term.scale_Exr is not None:
        factor *= term.scale_Exr[None, None]
    if term.gates is not None:
        factor = factor * term.gates.dense_BxTxE[..., None]
    return factor.reshape(*factor.shape[:2], E * r)


def stacked_lora(terms: Terms) -> dict[str, Any]:
    """One product with the concatenated A, gates in rank space, one product with B a site.

    Memory is that of the outputs plus `[B, T, R]`; every expert's rank columns are computed, which
    at a few hundred columns is cheaper than moving tokens.
    """
    inputs: dict[int, list[LoraTerm]] = {}
    for site_terms in terms.values():
        for term in site_terms:
            inputs.setdefault(id(term.x_BxTxD), []).append(term)
    h_of: dict[int, Any] = {}
    for shared in inputs.values():
        x_BxTxD = shared[0].x_BxTxD
        D = x_BxTxD.shape[-1]
        columns = [t.lora_a_DxExr.reshape(D, -1) for t in shared]
        h_BxTxR = narrow(x_BxTxD, jnp.concatenate(columns, axis=1))
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
        b = [t.lora_b_ExrxO.reshape(-1, t.lora_b_ExrxO.shape[-1]) for t in site_terms]
        out[site] = widen(jnp.concatenate(h, axis=-1), jnp.concatenate(b, axis=0))
    return out


def picked_lora(terms: Terms) -> dict[str, Any]:
    """`stacked_lora`, which of few tokens reads no experts but those that they picked.

    A product of few tokens takes as long as its weights take from memory. So a term whose tokens
    pick half of the experts at most gets one expert for each pick, gathered; the other terms have
    products of their own, since side by side with these they would be copied at every call.
    """
    few = {site: [t for t in some if _few(t)] for site, some in terms.items()}
    others = {site: [t for t in some if not _few(t)] for site, some in terms.items()}
    out = stacked_lora({site: some for site, some in others.items() if some})
    gathered = {site: [_gathered(t) for t in some] for site, some in few.items() if some}
    for site, delta in stacked_lora(gathered).items():
        out[site] = out[site] + delta if site in out else delta
    return out


def _few(term: LoraTerm) -> bool:
    if term.gates is None or on_explicit_axes(term.x_BxTxD):  # there a gather has to be laid out
        return False
    return 2 * term.gates.picks_BxTxK.size <= term.lora_a_DxExr.shape[1]


def _gathered(term: LoraTerm) -> LoraTerm:
    """The same with an expert for each pick of each token, to which no other token has a gate."""
    gates = term.gates
    assert gates is not None
    B, T, K = gates.picks_BxTxK.shape
    N = B * T
    own_NxN = jnp.eye(N, dtype=gates.weights_BxTxK.dtype)
    dense_NxNxK = own_NxN[:, :, None] * gates.weights_BxTxK.reshape(1, N, K)
    # One that stands for none has weight 0, whichever expert it is given.
    picks = jnp.minimum(gates.picks_BxTxK.reshape(-1), term.lora_a_DxExr.shape[1] - 1)
    return term._replace(
        lora_a_DxExr=term.lora_a_DxExr[:, picks],
        lora_b_ExrxO=term.lora_b_ExrxO[picks],
        scale_Exr=None if term.scale_Exr is None else term.scale_Exr[picks],
        gates=gates._replace(dense_BxTxE=dense_NxNxK.reshape(B, T, N * K)),
    )


def _expert(x_BxTxD, gate_BxT, params, activation: Callable):
    """One expert's share of the output, float32 `[B, T, D]`, the gate applied before `down`."""
    gate_DxF, up_DxF, down_FxD = (params[n].astype(x_BxTxD.dtype) for n in ("gate", "up", "down"))
    h_BxTxF = activation(x_BxTxD @ gate_DxF) * (x_BxTxD @ up_DxF)
    h_BxTxF = (h_BxTxF.astype(jnp.float32) * gate_BxT[..., None]).astype(x_BxTxD.dtype)
    return (h_BxTxF @ down_FxD).astype(jnp.float32)


def reference_ffn(
    x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, jax.Array], activation: Callable
) -> jax.Array:
    """A plain loop over experts; see `routing.dispatch.Strategy`."""
    total = jnp.zeros(x_BxTxD.shape, jnp.float32)
    for e in range(gates.dense_BxTxE.shape[-1]):
        one = {name: w[e] for name, w in params.items()}
        total += _expert(x_BxTxD, gates.dense_BxTxE[..., e], one, activation)
    return total.astype(x_BxTxD.dtype)


def batched_ffn(
    x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, jax.Array], activation: Callable
) -> jax.Array:
    """All experts in one product; it holds the hidden states of all of them, of few tokens."""
    gate_ExDxF, up_ExDxF, down_ExFxD = (
        params[name].astype(x_BxTxD.dtype) for name in ("gate", "up", "down")
    )
    into = functools.partial(jnp.einsum, "BTD,EDF->EBTF", x_BxTxD)
    h_ExBxTxF = activation(into(gate_ExDxF)) * into(up_ExDxF)
    weight_ExBxT = jnp.moveaxis(gates.dense_BxTxE, -1, 0)
    h_ExBxTxF = (h_ExBxTxF.astype(jnp.float32) * weight_ExBxT[..., None]).astype(x_BxTxD.dtype)
    total_BxTxD = jnp.einsum(
        "EBTF,EFD->BTD", h_ExBxTxF, down_ExFxD, preferred_element_type=jnp.float32
    )
    return total_BxTxD.astype(x_BxTxD.dtype)


def stacked_ffn(
    x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, jax.Array], activation: Callable
) -> jax.Array:
    """A loop over experts that holds one expert's hidden states at a time, backwards as well."""
    # Recomputed backwards; the sum is left outside, or every turn of it would be kept.
    share = jax.checkpoint(_expert, static_argnums=3)

    def body(total, expert):
        gate_BxT, one = expert
        return total + share(x_BxTxD, gate_BxT, one, activation), None

    xs = (jnp.moveaxis(gates.dense_BxTxE, -1, 0), dict(params))
    total, _ = jax.lax.scan(body, jnp.zeros(x_BxTxD.shape, jnp.float32), xs)
    return total.astype(x_BxTxD.dtype)
