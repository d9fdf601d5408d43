"""The real medmoe under the launcher: two processes on this machine, one of which is killed."""

import json
import os
import signal
import sys
import time

import pytest

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from tests import quick, several, tiny

MEDMOE = f"""#!/usr/bin/env bash
export XLA_FLAGS="$XLA_FLAGS {"" if quick.SHIPPED else quick.FLAGS}"
exec {sys.executable} -m medmoe_jax.cli.main "$@"
"""


@pytest.mark.slow
def test_a_killed_process_and_the_end_of_the_run(launcher):
    """`resume` starts both again, they go on from the last save, and all stages are finished."""
    _, reference = tiny.trained()
    local = launcher("--backend=local", "--hosts=2", "--devices=4", "--grace=5")
    local.stub("medmoe", MEDMOE)
    (local.folder / "recipe.py").write_text(several.CONFIG)
    local.env["MEDMOE_TESTS"] = str(quick.folder())
    workdir = local.folder / "w"
    begun = local.begin("resume", "--", "train", "--config=recipe.py", f"--workdir={workdir}")
    metrics = StageFolder.of(workdir, "aggregate").metrics
    until = time.monotonic() + 600
    while several.lines(metrics) <= 4:
        assert begun.poll() is None and time.monotonic() < until, begun.communicate()
        time.sleep(0.01)
    os.kill(int((local.folder / "runs/launch/worker-1/pid").read_text()), signal.SIGKILL)
    printed, said = begun.communicate(timeout=600)
    assert begun.returncode == 0, printed[-3000:] + said
    assert "worker 1 (local-1) was killed by signal 9" in said and "done after 2 starts" in said
    assert "continues after step" in printed
    for stage in ("aggregate", "align"):
        ended, wanted = (StageFolder.of(w, stage) for w in (workdir, reference))
        manifests = [json.loads(d.manifest.read_text()) for d in (ended, wanted)]
        assert manifests[0]["metrics"]["rows"] == manifests[1]["metrics"]["rows"]
        hashes = [[row["rows_hash"] for row in read_metrics(d.metrics)] for d in (ended, wanted)]
        assert hashes[0] == hashes[1]
