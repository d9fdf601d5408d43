"""Figures that people read, from the sums of routers.

Axes: N layers, E experts, G groups of texts, such as languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.kernels.router_equations import RouterStats


def collect(statistics: Sequence[Mapping[str, RouterStats]]) -> dict[str, RouterStats]:
    """`{"bank/site": RouterStats}` with leaves `[N, ...]`, from a dict a layer range, in order."""
    keys = dict.fromkeys(key for one in statistics for key in one)
    return {
        key: jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *(one[key] for one in statistics if key in one)
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
    share = shares(use)
    scale = np.log(experts) if experts > 1 else 1.0
    return {
        "use": share,
        "prob": prob / tokens[..., None],
        "entropy": np.asarray(stats.entropy, np.float64) / tokens / scale,
        "imbalance": experts * share.max(-1),
        "forced": np.asarray(stats.forced, np.float64) / tokens,
    }


def shares(use: np.ndarray) -> np.ndarray:
    """`use [..., E]` divided by its sum over experts; zeros where nothing was used."""
    total = use.sum(-1, keepdims=True)
    return np.divide(use, total, out=np.zeros_like(use), where=total > 0)


def entropy(share: np.ndarray) -> np.ndarray:
    """`-Σ_e p_e log p_e` of `[..., E]` in nats."""
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return -np.sum(share * logs, axis=-1)


def divergence(share_GxNxE: np.ndarray) -> np.ndarray:
    """How differently the groups use the experts of each layer, `[N]` from 0 to 1.

    The Jensen-Shannon divergence of the groups' shares, each group weighing the same, over its
    bound log min(G, E): 0 where all groups use the experts alike, 1 where no two of them (or, of
    more groups than experts, as few as can be) share one.
    """
    groups, _, experts = share_GxNxE.shape
    bound = np.log(min(groups, experts)) if min(groups, experts) > 1 else 1.0
    mixed = entropy(share_GxNxE.mean(axis=0)) - entropy(share_GxNxE).mean(axis=0)
    return np.maximum(mixed, 0.0) / bound
