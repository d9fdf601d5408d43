"""The disturbed run, the one left alone, and their comparison."""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from tests import several, tiny
from tests.soak.disturbances import Disturbance, Scene
from tests.soak.hosts import ROOT, Faults, Launcher, storage, wait_for

_STAGE = "aggregate"
_MOST = 5  # steps from one disturbance to the next, and a few until it strikes
_MEGABYTES = 200  # of the work directory's file system
_CHECKPOINTS = f"stages/{_STAGE}/steps/"
_CURVE = ("step", "loss", "gradient_norm", "rows_hash", "target_tokens", "learning_rate")
_RECIPE = """import sys

sys.path.insert(0, {root!r})
from tests import tiny


def get_config():
    config = tiny.medcare_config()
    config.stages.order = ({stage!r},)
    config.stages[{stage!r}].steps = {steps}
    config.run.save_every = 3
    config.run.log_every = 7
    return config
"""


class Record(NamedTuple):
    """What a soak was.

    Attributes:
      starts: of the disturbed run, by the launcher.
      steps: of its stage.
      seconds: that it took.
      said: by the launcher, of both runs.
    """

    starts: int
    steps: int
    seconds: float
    said: str


def soak(
    folder: Path,
    backend: str,
    sequence: Sequence[Disturbance],
    draw: random.Random,
    machines: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """Disturb a run by all of the sequence, and compare its end with an undisturbed run's.

    Args:
      folder: empty, for everything.
      backend: of the launcher, `local` or `ssh`.
      sequence: what happens, in this order.
      draw: moments and victims.
      machines: whether file systems and clocks take part, not signals alone.
      say: is told what happened.

    Raises:
      AssertionError: the ends differ, or the launcher gave up.
    """
    steps = 6 * (len(sequence) + 1)
    recipe = folder / "recipe.py"
    recipe.write_text(_RECIPE.format(root=str(ROOT), stage=_STAGE, steps=steps))
    tiny.medcare_config()  # its files: both hosts would write them at the same time
    with ExitStack() as stack:
        disk = folder / "disk"
        disk = stack.enter_context(storage(disk, _MEGABYTES)) if machines else folder
        faults = Faults(folder, _CHECKPOINTS) if machines else None
        launcher = Launcher(folder, backend, faults.variables if faults else {})
        stack.callback(launcher.close)
        ended, disturbed = (StageFolder.of(disk / name, _STAGE) for name in ("alone", "disturbed"))

        def command(name: str) -> list[str]:
            return ["train", f"--config={recipe}", f"--workdir={disk / name}"]

        began = time.monotonic()
        launcher.begin(*command("alone"))
        wait_for(lambda: several.lines(ended.metrics))
        start = time.monotonic() - began
        assert launcher.running.wait(1200) == 0, launcher.said[-3000:]
        began = time.monotonic()
        launcher.begin(*command("disturbed"))
        scene = Scene(launcher, command("disturbed"), faults, disk, draw)
        for number, disturbance in enumerate(sequence, 1):
            wait_for(_due(disturbed, draw, start, launcher), 1800)
            assert not disturbed.manifest.exists(), "the run has ended before all has happened"
            step = several.lines(disturbed.metrics)
            told = disturbance(scene)
            say(f"{number:3d}  after {step:4d} lines, {time.monotonic() - began:5.0f} s: {told}")
        assert launcher.running.wait(1200) == 0, launcher.said[-3000:]
        seconds = time.monotonic() - began
        _same(disturbed, ended, steps)
        return Record(launcher.said.count(": start ") - 1, steps, seconds, launcher.said)


def _due(stage: StageFolder, draw: random.Random, start: float, launcher: Launcher):
    """After some steps, or a quarter of the times while the processes start, at the latest."""
    least = several.lines(stage.metrics) + draw.randint(1, _MOST)
    latest = draw.uniform(0, start) if draw.random() < 0.25 else math.inf
    began = time.monotonic()

    def due() -> bool:
        assert launcher.running.poll() is None, launcher.said[-3000:]
        return several.lines(stage.metrics) >= least or time.monotonic() >= began + latest

    return due


def _same(stage: StageFolder, other: StageFolder, steps: int) -> None:
    ends = stage, other
    curves = [[[row[k] for k in _CURVE] for row in read_metrics(end.metrics)] for end in ends]
    assert curves[0] == curves[1] and len(curves[0]) == steps
    jax.tree.map(np.testing.assert_array_equal, *(store.load_final(end)[0] for end in ends))
