"""A run of two hosts that are killed again and again ends like one that was left alone."""

import random

import pytest

from tests.soak.disturbances import kill, kill_launcher, preempt
from tests.soak.run import soak


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, SIGTERM, a dead launcher; `python -m tests.soak` knows more kinds, and twenty."""
    sequence = [kill, kill_launcher, preempt]
    record = soak(tmp_path, "local", sequence, random.Random(0))
    assert record.starts >= 3
    assert "was killed by signal 9; its last lines" in record.said
    assert "saved and ended after a preemption notice (status 75)" in record.said
    assert "continues after step" in record.said and ": done after" in record.said
