"""A plain loop over experts and tokens' picks, for any linear layer; shares no code of the library.

Axes: D input width, E experts, r rank, K picks a token, O output width.
"""

import jax
import jax.numpy as jnp


def gates(spec, router, x, forced=None, valid=None):
    """Weights `[..., E]` from the formulas: sort, keep the first K, softmax over what is kept."""
    z = jnp.einsum("...d,de->...e", x, router["kernel"][0]) + router["bias"][0].reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )
    picks = jnp.argsort(-z, axis=-1)[..., : spec.top_k]
    if forced is not None:
        there = (picks == forced[..., None]).any(-1)
        last = jnp.where((forced >= 0) & ~there, forced, picks[..., -1])
        picks = jnp.concatenate([picks[..., :-1], last[..., None]], axis=-1)
    z = z - jax.lax.stop_gradient(z.max(-1, keepdims=True))  # or squares of exp(z) overflow
    total, chosen = 0.0, []
    for e in range(spec.experts):
        picked = (picks == e).any(-1)
        chosen.append(jnp.where(picked, jnp.exp(z[..., e]), 0.0))
        total += chosen[-1]
    weights = jnp.stack([one / total for one in chosen], axis=-1)
    return weights if valid is None else weights * valid[..., None]


def delta(spec, params, site, x, forced=None, valid=None):
    """`s Σ_e g_e Λ_e (x A_e) B_e` of one bank on one layer, `x [..., D]`."""
    leaves = params[site]
    g = None
    if "router" in leaves:
        g = gates(spec, leaves["router"], x, forced, valid)
    out = 0.0
    for e in range(spec.experts):
        one = (x @ leaves["lora_a"][0, :, e]) @ leaves["lora_b"][0, e]
        if g is not None:
            one = one * g[..., e : e + 1]
        if "mix" in params:
            one = one * jax.nn.softmax(params["mix"]["weight"][0])[e]
        out += spec.alpha / spec.rank * one
    return out


def of_layer(specs, banks, site, x, y, axes=1, **told):
    """The output of a layer with its banks: its own `y` plus every bank's share."""
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    for spec in specs:
        if site in banks[spec.name]:
            y = y + delta(spec, banks[spec.name], site, x, **told).reshape(y.shape)
    return y
