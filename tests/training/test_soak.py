"""A run of two processes that is killed again and again ends like one that was left alone."""

import math
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from tests import several
from tests.several import Several

# Twenty take minutes: MEDMOE_SOAK_KILLS=20.
KILLS = int(os.environ.get("MEDMOE_SOAK_KILLS", "2"))
MOST = 10  # steps from one kill to the next, and a few until it strikes
STEPS = 15 * (KILLS + 1)
CONFIG = f"""from tests import tiny

def get_config():
    config = tiny.medcare_config()
    config.stages.order = ("aggregate",)
    config.stages.aggregate.steps = {STEPS}
    config.run.save_every = 3
    config.run.log_every = 7
    return config
"""
CURVE = ("step", "loss", "gradient_norm", "rows_hash", "target_tokens", "learning_rate")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """One process or both, by SIGKILL: while they start, between steps or while they save."""
    (tmp_path / "recipe.py").write_text(CONFIG)

    def run(name):
        command = ["train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / name}"]
        return Several(tmp_path, [command] * 2)

    ended, killed = (StageFolder.of(tmp_path / n, "aggregate") for n in ("undisturbed", "killed"))
    began = time.monotonic()
    with run("undisturbed") as both:
        both.wait_for(lambda: several.lines(ended.metrics))
        start = time.monotonic() - began
        statuses = both.statuses(timeout=600 + 30 * KILLS)
        assert statuses == [0, 0], both.printed(0)[-3000:] + both.printed(1)[-3000:]
    draw = random.Random(0)

    def due():  # after some steps, or a quarter of the times while they start at the latest
        least = several.lines(killed.metrics) + draw.randint(1, MOST)
        latest = draw.uniform(0, start) if draw.random() < 0.25 else math.inf
        began = time.monotonic()
        return lambda: several.lines(killed.metrics) >= least or time.monotonic() >= began + latest

    for _ in range(KILLS):
        with run("killed") as both:
            both.wait_for(due())
            time.sleep(draw.uniform(0, 0.1))
            victims = draw.choice(([0], [1], [0, 1]))
            for victim in victims:
                both.running[victim].kill()
            statuses = both.statuses()
            assert all(statuses) and all(statuses[v] == -signal.SIGKILL for v in victims)
            assert not killed.manifest.exists()
    with run("killed") as both:
        statuses = both.statuses(timeout=600 + 30 * KILLS)
        assert statuses == [0, 0], both.printed(0)[-3000:] + both.printed(1)[-3000:]
    ends = killed, ended
    curves = [[[row[k] for k in CURVE] for row in read_metrics(e.metrics)] for e in ends]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
    jax.tree.map(np.testing.assert_array_equal, *(store.load_final(end)[0] for end in ends))
