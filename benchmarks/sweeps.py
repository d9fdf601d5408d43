"""One site's mixture, forward and backward, by strategy: over experts and over tokens.

Axes: B batch, T tokens, D input width, O output width, E experts, K picks, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import dense_gather
from benchmarks.timing import interleaved
from benchmarks.variants import DECODER
from medmoe_jax.kernels.router_equations import choose_experts
from medmoe_jax.planning import hlo
from medmoe_jax.routing.dispatch import STRATEGIES, strategy
from medmoe_jax.routing.terms import LoraTerm

TOP_K, RANK = 2, 16
SKIPPED = ("reference",)  # a loop over experts, for tests
ON_MESH = ("all_to_all",)  # on one device it is `grouped`
MOST_DENSE = 2**26  # elements of [tokens, experts, O] that the dense rendition is given


class Row(NamedTuple):
    """One line of a sweep: seconds and counted costs by strategy."""

    experts: int
    tokens: int
    seconds: dict[str, float]
    flops: dict[str, float]
    bytes: dict[str, float]
    temporaries: dict[str, float]


def _inputs(experts: int, tokens: int):
    key = jax.random.split(jax.random.key(0), 4)
    D, O = DECODER.d_model, DECODER.d_ff
    return {
        "x": jax.random.normal(key[0], (1, tokens, D)),
        "a": jax.random.normal(key[1], (D, experts, RANK)) * D**-0.5,
        "b": jax.random.normal(key[2], (experts, RANK, O)) * RANK**-0.5,
        "logits": jax.random.normal(key[3], (1, tokens, experts)),
    }


def site_step(name: str, inputs):
    """Gradient of the site's summed squares to x, A, B and the router's logits."""
    run = strategy(name)

    def loss(p):
        gates = choose_experts(p["logits"], TOP_K, renormalise=True).gates
        out = run.lora({"mlp.up": [LoraTerm(p["x"], p["a"], p["b"], gates, None, 2.0)]})
        return jnp.sum(out["mlp.up"] ** 2)

    return jax.grad(loss)(inputs)


def measure(experts: int, tokens: int, rounds: int) -> Row:
    """Time and count every strategy on one size."""
    inputs = jax.block_until_ready(_inputs(experts, tokens))
    names = [name for name in STRATEGIES if name not in SKIPPED + ON_MESH]
    if tokens * experts * DECODER.d_ff > MOST_DENSE:
        names = [name for name in names if name not in dense_gather.BASELINES]
    compiled = {
        name: jax.jit(site_step, static_argnums=0).lower(name, inputs).compile() for name in names
    }

    def call(name):
        return lambda: jax.block_until_ready(compiled[name](inputs))

    calls = {name: call(name) for name in names}
    seconds = interleaved(calls, rounds, rare=dense_gather.BASELINES)
    counts = {name: hlo.count(c.as_text()) for name, c in compiled.items()}
    return Row(
        experts,
        tokens,
        seconds,
        {name: c.flops for name, c in counts.items()},
        {name: c.bytes for name, c in counts.items()},
        {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()},
    )


def best(row: Row) -> float:
    """Seconds of the fastest strategy that one may set."""
    own = STRATEGIES.keys() - dense_gather.BASELINES.keys() - {"auto"}
    return min(s for name, s in row.seconds.items() if name in own)


def sizes(quick: bool) -> list[tuple[int, int]]:
    """`(E, T)` of every line: experts at 1,024 tokens, then tokens at 8 experts."""
    experts = (8, 32, 64, 512) if quick else (8, 16, 32, 64, 128, 256, 512)
    tokens = (8192,) if quick else (2048, 4096, 8192, 16384, 32768, 65536)
    return [(e, 1024) for e in experts] + [(8, t) for t in tokens]
