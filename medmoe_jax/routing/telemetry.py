"""From router sums to the figures people read.

Axes: N layers, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.routing.routers import RouterStats


def collect(aux) -> dict[str, RouterStats]:
    """`{"bank/site": RouterStats}` with leaves `[N, ...]`, from one dict a segment, in order."""
    keys = dict.fromkeys(key for segment in aux for key in segment)
    return {
        key: jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *(seg[key] for seg in aux if key in seg)
        )
        for key in keys
    }


def summarise(stats: RouterStats) -> dict[str, np.ndarray]:
    """Per-layer figures of one router from its sums (leaves `[N, ...]`).

    Returns:
      `use [N, E]` share of all picks, `prob [N, E]` mean probability, `entropy [N]` in nats over
      log E (1 = uniform), `imbalance [N]` = E · largest share (1 = even load), `forced [N]` share
      of tokens whose last pick was overridden.
    """
    use = np.asarray(stats.use_E, np.float64)
    prob = np.asarray(stats.prob_E, np.float64)
    tokens = np.maximum(np.asarray(stats.tokens, np.float64), 1.0)
    experts = use.shape[-1]
    share = use / np.maximum(use.sum(-1, keepdims=True), 1.0)
    scale = np.log(experts) if experts > 1 else 1.0
    return {
        "use": share,
        "prob": prob / tokens[..., None],
        "entropy": np.asarray(stats.entropy, np.float64) / tokens / scale,
        "imbalance": experts * share.max(-1),
        "forced": np.asarray(stats.forced, np.float64) / tokens,
    }
