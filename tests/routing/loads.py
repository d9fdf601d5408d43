"""Mixtures under different loads, and their float64 twin: one token and one expert at a time.

Axes: B rows, T tokens, D model, O output, E experts, r rank, F feed-forward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.kernels.router_equations import choose_experts
from medmoe_jax.routing.dispatch import strategy
from medmoe_jax.routing.routers import without_padding
from medmoe_jax.routing.terms import LoraTerm
from tests import naive

B, T, D, O, E, r, F = 8, 5, 8, 12, 8, 2, 12
S = 1.5
# What is added to the router's logits: which experts the tokens would rather have.
LOADS = {
    "uneven": np.linspace(0.0, 3.0, E),
    "empty": np.where(np.arange(E) % 3 == 1, -50.0, 0.0),  # three experts are never picked
    "one_takes_all": np.where(np.arange(E) == 5, 50.0, 0.0),
    "padding": np.zeros(E),
}


def _logits(rng, load):
    """Logits `[B, T, E]` of which no two of a token are closer than 0.2."""
    order = rng.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)
    z = 0.4 * order + 0.1 * rng.random((B, T, E))
    # A load may bring two logits together: ranks are taken again after it.
    rank = np.argsort(np.argsort(z + LOADS[load], axis=-1), axis=-1)
    return 0.4 * rank + 0.1 * rng.random((B, T, E))


def arrays(load):
    """`(tree, valid_BxT)`; every leaf of the tree is differentiated."""
    rng = np.random.default_rng(list(LOADS).index(load))

    def draw(*shape, fan_in=1):
        return rng.standard_normal(shape) * fan_in**-0.5

    tree = {
        "x": draw(B, T, D),
        "h": draw(B, T, O),
        "logits": _logits(rng, load),
        "up_a": draw(D, E, r, fan_in=D),
        "up_b": draw(E, r, O, fan_in=r),
        "up_scale": draw(E, r),
        "always_a": draw(D, 1, r, fan_in=D),
        "always_b": draw(1, r, O, fan_in=r),
        "down_a": draw(O, E, r, fan_in=O),
        "down_b": draw(E, r, D, fan_in=r),
        "gate": draw(E, D, F, fan_in=D),
        "up": draw(E, D, F, fan_in=D),
        "down": draw(E, F, D, fan_in=F),
    }
    valid = np.ones((B, T), bool)
    if load == "padding":
        valid[:, 3:] = False
        valid[2] = False
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree), jnp.asarray(valid)


def _mix(y):
    """Weights of an output in the loss: fixed, all different."""
    return np.cos(np.arange(np.prod(y.shape))).reshape(y.shape)


def outputs(run, tree, valid, top_k):
    """A column-parallel and a row-parallel site and a mixture of feed-forward experts."""
    t = tree
    gates = without_padding(choose_experts(t["logits"], top_k, renormalise=True).gates, valid)
    up = [
        LoraTerm(t["x"], t["up_a"], t["up_b"], gates, t["up_scale"], S),
        LoraTerm(t["x"], t["always_a"], t["always_b"], None, None, S),
    ]
    down = [LoraTerm(t["h"], t["down_a"], t["down_b"], gates, None, S)]
    experts = {name: t[name] for name in ("gate", "up", "down")}
    return {
        **run.lora({"mlp.up": up}),
        **run.lora({"mlp.down": down}),
        "ffn": run.ffn(t["x"], gates, experts, jax.nn.silu),
    }


def loss_of(run, top_k):
    """`(tree, valid) -> (gradients, outputs)`."""

    def loss(tree, valid):
        out = outputs(run, tree, valid, top_k)
        total = sum(jnp.sum(y.astype(jnp.float32) * _mix(y)) for y in out.values())
        return total, out

    return jax.grad(loss, has_aux=True)


@functools.cache
def compiled(name, top_k):
    """The gradient on one device."""
    return jax.jit(loss_of(strategy(name), top_k))


def _gates(z, top_k):
    """`[..., E]`: softmax over the top_k largest logits, zero elsewhere."""
    cut = np.sort(z, axis=-1)[..., -top_k, None]
    p = np.where(z >= cut, np.exp(z - z.max(-1, keepdims=True)), 0.0)
    return p / p.sum(-1, keepdims=True)


def naive_outputs(tree, valid, top_k):
    """The same in float64; padding gets nothing from a mixture."""
    t = naive.f64(tree)
    gates = _gates(t["logits"], top_k) * np.asarray(valid)[..., None]
    up = S * t["x"] @ t["always_a"][:, 0] @ t["always_b"][0]
    down, ffn = np.zeros((B, T, D)), np.zeros((B, T, D))
    for e in range(E):
        g = gates[..., e, None]
        up = up + S * g * ((t["x"] @ t["up_a"][:, e]) * t["up_scale"][e] @ t["up_b"][e])
        down += S * g * (t["h"] @ t["down_a"][:, e] @ t["down_b"][e])
        v = t["x"] @ t["gate"][e]
        ffn += g * (v / (1 + np.exp(-v)) * (t["x"] @ t["up"][e]) @ t["down"][e])
    return {"mlp.up": up, "mlp.down": down, "ffn": ffn}


def naive_loss(tree, valid, top_k):
    """What `loss_of` differentiates."""
    return sum((y * _mix(y)).sum() for y in naive_outputs(tree, valid, top_k).values())


def plain_bfloat16_ffn(tree, valid, top_k):
    """Every operation rounds, experts are added one after another."""
    gates = jnp.asarray(_gates(naive.f64(tree["logits"]), top_k), jnp.bfloat16)
    gates = gates * valid[..., None].astype(jnp.bfloat16)
    total = jnp.zeros((B, T, D), jnp.bfloat16)
    for e in range(E):
        h = jax.nn.silu(tree["x"] @ tree["gate"][e]) * (tree["x"] @ tree["up"][e])
        total = total + gates[..., e, None] * (h @ tree["down"][e])
    return total


def check_load(load, tree, valid, top_k):
    """The inputs are what the load's name says, and no choice is a near-tie."""
    z = np.sort(naive.f64(tree["logits"]), axis=-1)
    assert np.diff(z, axis=-1).min() > 0.2
    use = (_gates(naive.f64(tree["logits"]), top_k) > 0)[np.asarray(valid)].sum(0)
    if load == "uneven" and top_k < E:
        assert use.max() > 3 * use.min()
    if load == "empty" and top_k < E - 3:
        assert (use[1::3] == 0).all()
    if load == "one_takes_all":
        assert use[5] == valid.sum()
    if load == "padding":
        assert valid.sum() < valid.size
