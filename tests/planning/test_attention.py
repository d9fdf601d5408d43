"""What attention's kernels are said to cost, against counts over every pair of tokens."""

import numpy as np
import pytest

from medmoe_jax.base.splash import block_sizes
from medmoe_jax.planning.attention import AttentionShape, splash_costs

FORWARD, EVALUATED = "splash_mha_fwd_segmented_residuals", "splash_mha_fwd_segmented_no_residuals"
KEYS, QUERIES = "splash_mha_dkv_segmented_no_residuals", "splash_mha_dq_segmented_no_residuals"


def visited(T, window, parts, q, k):
    """Pairs of blocks, of the last part's queries, with a visible pair of tokens."""
    t, s = np.indices((T, T))
    seen = (s <= t) & ((window == 0) | (t - s < window))
    seen = seen[T - T // parts :]
    return int(seen.reshape(len(seen) // q, q, T // k, k).any((1, 3)).sum())


@pytest.mark.parametrize(
    ("T", "window", "parts"),
    [(256, 0, 1), (2048, 0, 1), (4096, 0, 4), (4096, 700, 1), (4096, 1, 2), (8192, 700, 2)],
)
def test_costs(T, window, parts):
    B, H, K, h, itemsize = 3, 6, 2, 64, 2
    kept, passing, keys = block_sizes(T, parts, window, h, itemsize)
    costs = splash_costs(AttentionShape(B, T, H, K, h, itemsize, parts), [window])
    own, group = H * (T // parts), K * T
    pairs = visited(T, window, parts, kept, passing)
    product, numbers = 2 * kept * passing * h, h * itemsize
    # Of a pair: keys and values, and the keys' segments on 8 sublanes.
    moved = H * pairs * passing * (2 * numbers + 8 * 4)
    # Of a query: itself and the output; segments, order and the log-sum on 128 lanes.
    assert costs[FORWARD] == (
        B * H * pairs * 2 * product,
        B * (moved + own * (2 * numbers + 3 * 128 * 4)),
    )
    assert costs[FORWARD].bytes - costs[EVALUATED].bytes == B * own * 128 * 4
    assert costs[QUERIES] == (
        B * H * pairs * 3 * product,
        B * (moved + own * (3 * numbers + 2 * 128 * 4)),
    )
    assert (keys > 0) == (T < 8192)
    pairs = visited(T, window, parts, passing, keys or kept)
    # Of a pair: queries and the output's gradient; segments, order, log-sum, Σ o·do.
    moved = H * pairs * passing * (2 * numbers + 4 * 8 * 4)
    # The queries' gradient too, for each block of keys a whole one.
    parts_of = T // keys * own * numbers if keys else 0
    assert costs[KEYS] == (
        B * H * pairs * (5 * 2 * keys * passing * h if keys else 4 * product),
        B * (moved + group * 4 * numbers + T * 128 * 4 + parts_of),
    )


def test_layers_of_several_windows_count_by_their_mean():
    shape = AttentionShape(1, 8192, 4, 1, 256, 2)
    near, far, mixed = (splash_costs(shape, w) for w in ([512], [0], [512] * 5 + [0]))
    for name in mixed:
        assert mixed[name].flops == pytest.approx((5 * near[name].flops + far[name].flops) / 6)
        assert mixed[name].bytes == pytest.approx((5 * near[name].bytes + far[name].bytes) / 6)
        assert near[name].flops < 0.25 * far[name].flops
    assert splash_costs(shape) == far


def test_long_rows_read_less_than_a_third_of_what_blocks_of_128_read():
    """Llama-3-8B's heads; with blocks of 128 every query head fetched its own keys."""
    T, H, K, h, itemsize = 32768, 32, 8, 128, 2
    costs = splash_costs(AttentionShape(1, T, H, K, h, itemsize))
    pairs = 256 * 257 // 2
    before = pairs * 2 * 128 * h * itemsize * H
    for name in (FORWARD, KEYS, QUERIES):
        assert costs[name].bytes < before / 3
