"""Shares, entropy and divergence, worked out by hand."""

import numpy as np

from medmoe_jax.routing import telemetry


def test_shares_and_entropy():
    use = np.array([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    share = telemetry.shares(use)
    assert share.tolist() == [[0.25, 0.75, 0, 0], [0.25] * 4, [0] * 4]
    half = 0.25 * np.log(4) + 0.75 * np.log(4 / 3)
    assert np.allclose(telemetry.entropy(share), [half, np.log(4), 0])


def test_divergence():
    """Layer by layer: alike, apart, and half of the picks shared."""
    one = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    two = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    got = telemetry.divergence(np.array([one, two]))
    # The mixture of the last is (1/2, 1/4, 1/4): 1.5 log 2 nats, of which log 2 in each group.
    assert np.allclose(got, [0, 1, 0.5])
    assert np.allclose(telemetry.divergence(np.array([one])), 0)
