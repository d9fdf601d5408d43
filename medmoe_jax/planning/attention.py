"""What a run of the splash attention kernels costs, of which XLA knows nothing.

Axes: B rows, T tokens, H query heads, K key/value heads, h head dimension, all of one device.
A kernel keeps a block and lets others pass by (`base.splash`); a pair of blocks is visited when a
query of one sees a key of the other. A pair makes two products forward, four for the gradients of
keys and values, three for that of the queries, or five for all of them in one kernel, which writes
the queries' once for every block of keys. What passes is fetched once a pair, what is kept once.
Segments, order in the row and the softmax's logarithm travel too, as int32 and float32 spread over
128 lanes where they belong to kept tokens and over 8 sublanes where they pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medmoe_jax.base.attention import LANES
from medmoe_jax.base.splash import block_sizes
from medmoe_jax.planning.hlo import Cost

_KEPT_ID = 4 * LANES  # bytes a token
_PASSING_ID = 4 * 8


class AttentionShape(NamedTuple):
    """What one device runs in a layer.

    Attributes:
      B, T, H, K, h: see the module.
      itemsize: bytes of a number.
      parts: devices that share a row's queries; counted is the one with its end, the busiest.
    """

    B: int
    T: int
    H: int
    K: int
    h: int
    itemsize: int
    parts: int = 1


class _Kernel(NamedTuple):
    """What one of the kernels does.

    Attributes:
      keeps_keys: whether keys stay and queries pass by.
      products: of a pair of blocks.
      kept: numbers of h a kept token of a query head that move, such as queries and outputs.
      shared: the same of a key/value head.
      kept_ids, passing_ids: arrays of one number a token, of kept and of passing tokens.
    """

    keeps_keys: bool
    products: int
    kept: int
    shared: int
    kept_ids: int
    passing_ids: int


_KERNELS = {
    # q, o; segments, order, log-sum; segments of keys
    "splash_mha_fwd_segmented_residuals": _Kernel(False, 2, 2, 0, 3, 1),
    "splash_mha_fwd_segmented_no_residuals": _Kernel(False, 2, 2, 0, 2, 1),
    # k, v, dk, dv; segments of keys; segments, order, log-sum and Σ o·do of queries
    "splash_mha_dkv_segmented_no_residuals": _Kernel(True, 4, 0, 4, 1, 4),
    # q, do, dq; segments, order; segments of keys (log-sum and Σ o·do are 4 bytes a token)
    "splash_mha_dq_segmented_no_residuals": _Kernel(False, 3, 3, 0, 2, 1),
}


def splash_costs(shape: AttentionShape, windows: Sequence[int] = ()) -> dict[str, Cost]:
    """The cost of one run of each kernel, by its name.

    Args:
      shape: what runs.
      windows: of the layers, 0 = all keys before a query; () = no layer has one. Kernels of all
        windows have one name, so each counts as the mean over the layers.
    """
    windows = windows or (0,)
    costs = {}
    for name, kernel in _KERNELS.items():
        layers = [_cost(kernel, shape, window) for window in windows]
        costs[name] = Cost(*(sum(values) / len(windows) for values in zip(*layers, strict=True)))
    return costs


def _cost(kernel: _Kernel, shape: AttentionShape, window: int) -> Cost:
    B, T, H, K, h, itemsize, parts = shape
    block, passing, keys = block_sizes(T, parts, window, h, itemsize)
    products, queries = kernel.products, 0
    if kernel.keeps_keys and keys:
        block, products = keys, products + 1
        queries = T // keys * (T // parts) * H * h * itemsize
    q, k = (passing, block) if kernel.keeps_keys else (block, passing)
    pairs = _pairs(q, k, T, window, parts)
    kept = T if kernel.keeps_keys else T // parts
    fetched = pairs * passing * (2 * h * itemsize + kernel.passing_ids * _PASSING_ID)
    heads = kept * (H * kernel.kept + K * kernel.shared) * h * itemsize
    # Those of keys are the same for all heads, which come one after another while a block stays.
    ids = kept * (1 if kernel.keeps_keys else H) * kernel.kept_ids * _KEPT_ID
    flops = H * pairs * products * 2 * q * k * h
    return Cost(B * flops, B * (H * fetched + heads + ids + queries))


def _pairs(q: int, k: int, T: int, window: int, parts: int) -> int:
    """Pairs of a block of q queries, of those at a row's end, and one of k keys that they see."""
    first_query = np.arange(T - T // parts, T, q)[:, None]
    first_key = np.arange(0, T, k)
    seen = first_key <= first_query + q - 1
    if window:
        seen &= first_query - (first_key + k - 1) < window
    return int(seen.sum())
