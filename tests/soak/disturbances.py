"""What may happen to a run of two hosts. Each function does one of them and says what it did."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.soak.hosts import WORKERS, Faults, Launcher, wait_for

_BACK = 3600  # seconds that a clock is set back


@dataclass
class Scene:
    """A run that is going on.

    Attributes:
      launcher: follows it.
      command: of medmoe.
      faults: what its workers' machines do; None where only signals disturb.
      storage: the file system that the work directory is on, or its folder.
      draw: random numbers.
    """

    launcher: Launcher
    command: list[str]
    faults: Faults | None
    storage: Path
    draw: random.Random

    def victim(self) -> tuple[int, int]:
        """One of the workers and its process, once it has one."""
        worker = self.draw.choice(WORKERS)
        wait_for(lambda: self.launcher.process(worker))
        return worker, self.launcher.process(worker) or 0

    def signal(self, number: int) -> tuple[int, int]:
        """Send a signal to one of the processes; that may just have ended for another's sake."""
        while True:
            worker, process = self.victim()
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
            return worker, process

    def until_said(self, word: str, before: str) -> None:
        """Until the launcher has said this since `before`, which is all that it had said."""
        wait_for(lambda: word in self.launcher.said[len(before) :])


def kill(scene: Scene) -> str:
    """SIGKILL to one process or to both."""
    if scene.draw.random() < 1 / 3:
        gone = [scene.launcher.process(worker) for worker in WORKERS]
        for process in filter(None, gone):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if any(gone):
            return "SIGKILL to both"
    return f"SIGKILL to worker {scene.signal(signal.SIGKILL)[0]}"


def preempt(scene: Scene) -> str:
    """SIGTERM, as before a machine is taken away."""
    return f"SIGTERM to worker {scene.signal(signal.SIGTERM)[0]}"


def pause(scene: Scene) -> str:
    """A host that stands still for some seconds."""
    worker, process = scene.signal(signal.SIGSTOP)
    time.sleep(seconds := scene.draw.uniform(1, 8))
    os.kill(process, signal.SIGCONT)
    return f"worker {worker} stood still for {seconds:.0f} s"


def freeze(scene: Scene) -> str:
    """A host that stands still for good; the others find out, and the launcher ends it."""
    before = scene.launcher.said
    worker, _ = scene.signal(signal.SIGSTOP)
    scene.until_said(": start ", before)
    return f"worker {worker} stood still for good"


def kill_launcher(scene: Scene) -> str:
    """The launcher is killed, the job goes on, and another launcher follows it."""
    launcher = scene.launcher
    assert launcher.running is not None
    launcher.running.kill()
    launcher.running.wait()
    launcher.begin(*scene.command)
    return "SIGKILL to the launcher; another one"


def kill_in_commit(scene: Scene) -> str:
    """SIGKILL at an operation on a file of a checkpoint, any of them."""
    worker, process = scene.victim()
    after = scene.draw.randint(0, 60)
    scene.faults.arm(worker, after, -1)
    wait_for(lambda: scene.faults.struck(worker) or scene.launcher.process(worker) != process)
    scene.faults.arm(worker, 0, 0)
    return f"SIGKILL to worker {worker} at operation {after} on a checkpoint"


def fail_in_commit(scene: Scene) -> str:
    """An input/output error at an operation on a file of a checkpoint, and at those after it."""
    worker, process = scene.victim()
    after = scene.draw.randint(0, 60)
    scene.faults.arm(worker, after, errno.EIO)
    wait_for(lambda: scene.launcher.process(worker) != process)
    scene.faults.arm(worker, 0, 0)
    return f"EIO on worker {worker} from operation {after} on a checkpoint on"


def fill_disk(scene: Scene) -> str:
    """No space is left, until a start has ended for it."""
    before = scene.launcher.said
    filler = scene.storage / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    scene.until_said("(status 74)", before)
    filler.unlink()
    return "no space left"


def unmount(scene: Scene) -> str:
    """The mount of the work directory is gone, until a start has ended for it."""
    before, elsewhere = scene.launcher.said, scene.storage.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", scene.storage, elsewhere], check=True)
    subprocess.run(["umount", "--lazy", scene.storage], check=True)
    scene.until_said(": start ", before)
    subprocess.run(["mount", "--bind", elsewhere, scene.storage], check=True)
    subprocess.run(["umount", "--lazy", elsewhere], check=True)
    return "the work directory's mount was gone"


def set_clock_back(scene: Scene) -> str:
    """A clock that goes an hour back, and stays there."""
    worker = scene.draw.choice(WORKERS)
    scene.faults.set_clock(worker, -_BACK)
    return f"worker {worker}'s clock set back by an hour"


Disturbance = Callable[[Scene], str]
# How often each comes in twenty.
MIXED: dict[Disturbance, int] = {
    kill: 3,
    preempt: 3,
    pause: 2,
    freeze: 1,
    kill_launcher: 2,
    kill_in_commit: 4,
    fail_in_commit: 1,
    fill_disk: 2,
    unmount: 1,
    set_clock_back: 1,
}
