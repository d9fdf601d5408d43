"""A run of two hosts that are killed again and again ends like one that was left alone."""

import random

import pytest

from tests.soak.disturbances import kill, kill_launcher
from tests.soak.run import soak


@pytest.mark.processes
def test_killed_at_random_moments(tmp_path):
    """A host, then the launcher; `python -m tests.soak` knows more kinds, and twenty of them."""
    sequence = [kill, kill_launcher]
    record = soak(tmp_path, "local", sequence, random.Random(0))
    assert record.starts >= 2
    assert "was killed by signal 9; its last lines" in record.said
    assert "continues after step" in record.said and ": done after" in record.said
