"""The `medmoe` command in several processes of this machine that share eight simulated devices."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import quick, tiny

ROOT = Path(__file__).parents[1]
CONFIG = """from tests import tiny

def get_config():
    return tiny.medcare_config()
"""
MAIN = ("-m", "medmoe_jax.cli.main")


# Below those that the system gives to whoever opens a connection, which would take one that is not
# listened on yet; each process of the tests begins elsewhere.
_PORTS = itertools.islice(itertools.cycle(range(10000, 32000)), os.getpid() * 97 % 22000, None)


def free_port() -> int:
    """A port that nobody listens on."""
    return next(filter(_is_free, _PORTS))


def _is_free(port: int) -> bool:
    with socket.socket() as here, contextlib.suppress(OSError):
        here.bind(("", port))
        return True
    return False


class Several:
    """Processes that run one command each, and what they print."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], program=MAIN):
        """Start them; what they compile is shared with this process (`tests.quick`)."""
        tiny.medcare_config()  # its files: the processes would write them at the same time
        self.texts = [folder / f"{index}.{uuid.uuid4().hex}" for index in range(len(commands))]
        env = {
            **os.environ,
            "XLA_FLAGS": quick.flags(8 // len(commands)),
            "MEDMOE_COORDINATOR": f"127.0.0.1:{free_port()}",
            "MEDMOE_PROCESSES": str(len(commands)),
        }
        self.running = []
        for index, (command, text) in enumerate(zip(commands, self.texts, strict=True)):
            with text.open("w") as out:
                started = subprocess.Popen(
                    [sys.executable, *program, *command],
                    env={**env, "MEDMOE_PROCESS": str(index)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self.running.append(started)

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *error) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def printed(self, index: int) -> str:
        """What a process has printed so far, on both of its outputs."""
        return self.texts[index].read_text()

    def statuses(self, timeout: float = 600) -> list[int]:
        """The exit statuses, once all have ended."""
        return [process.wait(timeout) for process in self.running]

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Until `what()`; fails where a process ends before."""
        deadline = time.monotonic() + 600
        while not what():
            for index, process in enumerate(self.running):
                assert process.poll() is None, self.printed(index)[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)


def lines(path: Path) -> int:
    """How many lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
