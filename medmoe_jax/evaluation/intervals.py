"""95% intervals of scores, over the draw of items."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from medmoe_jax.evaluation.metrics import Metric

Z95 = 1.959963984540054


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, without continuity correction."""
    share = successes / n
    centre = share + Z95**2 / (2 * n)
    reach = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    # At no and at all successes one end is the share itself, but for rounding.
    low, high = (centre - reach) / scale, (centre + reach) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def bootstrap(
    rows: np.ndarray, reduce: Callable[[np.ndarray], float], seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap over the first axis of `rows`."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(rows), (resamples, len(rows)))
    low, high = np.percentile([reduce(rows[draw]) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def interval(
    metric: Metric, rows: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The interval that suits the metric: Wilson for shares, bootstrap otherwise."""
    if metric.binary:
        return wilson(float(rows.sum()), len(rows))
    return bootstrap(rows, metric.reduce, seed, resamples)
