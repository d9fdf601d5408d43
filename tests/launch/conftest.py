"""A launcher to call, and a `medmoe` that does what a test says.

The fake `medmoe` comes first in PATH. It notes its arguments and its environment, and then does
what the shell text in `behaviour` says; `$worker` is the number of the worker it runs on.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_run.sh"

MEDMOE = """#!/usr/bin/env bash
worker=${MEDMOE_PROCESS:-${HOME##*-}}
echo >>"$FAKE/starts-$worker"
printf '%s\\0' "$@" >"$FAKE/arguments-$worker"
env >"$FAKE/environment-$worker"
source "$FAKE/behaviour"
"""


class Launcher:
    """Runs launch/tpu_run.sh in a folder of its own, with stubs first in PATH."""

    def __init__(self, folder: Path, *flags: str):
        self.folder, self.flags = folder, flags
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.stub("medmoe", MEDMOE)
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("TPU_RUN_", "MEDMOE_"))
        }
        self.env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKE": str(folder)}
        self.env |= {"HOME": str(folder)}
        self.env.pop("XLA_FLAGS", None)

    def stub(self, name: str, text: str) -> None:
        """Put a program first in PATH."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def behaves(self, text: str) -> None:
        """Say what the fake medmoe does."""
        (self.folder / "behaviour").write_text(text)

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        """Run to the end, or fail after two minutes."""
        return subprocess.run(
            [SCRIPT, *self.flags, *words],
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def begin(self, *words: str) -> subprocess.Popen:
        """Start in a process group of its own, which answers to Ctrl-C and to a hang-up."""
        return subprocess.Popen(
            ["env", "--default-signal=INT,HUP", SCRIPT, *self.flags, *words],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def arguments(self, worker: int) -> list[str]:
        """What medmoe was given."""
        return (self.folder / f"arguments-{worker}").read_text().split("\0")[:-1]

    def environment(self, worker: int) -> dict[str, str]:
        """The variables medmoe saw; none of them may hold a line break."""
        lines = (self.folder / f"environment-{worker}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def starts(self, worker: int) -> int:
        """How often medmoe was started there."""
        return len((self.folder / f"starts-{worker}").read_text().splitlines())


@pytest.fixture
def launcher(tmp_path):
    """Makes launchers; whatever they left running is ended with the test."""
    yield lambda *flags: Launcher(tmp_path, *flags)
    for group in tmp_path.rglob("worker-*/group"):
        try:
            os.killpg(int(group.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue  # as it should be
