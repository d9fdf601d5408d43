"""Two hosts on this machine, under the launcher: `local` processes, or `ssh` to a server here."""

import contextlib
import getpass
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

from tests import quick
from tests.several import free_port

ROOT = Path(__file__).parents[2]
WORKERS = (0, 1)
_LAUNCHER = ROOT / "launch" / "tpu_run.sh"
_BLOCK = struct.Struct("=qqqq")  # faults.c's: after, action, struck, clock
_SSHD = """Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/mine.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
{environment}"""
_SSH = """Host soak-0 soak-1
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/mine
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Faults:
    """What the file system and the clock of each worker do; nothing, at first.

    `tests/soak/faults.c` reads it in the workers.
    """

    def __init__(self, folder: Path, below: str) -> None:
        """Build what the workers load; `below` is a piece of the paths whose files may fail."""
        library = folder / "faults.so"
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
        self._blocks = []
        for worker in WORKERS:
            path = folder / f"faults.{worker}"
            path.write_bytes(bytes(_BLOCK.size))
            with path.open("r+b") as file:
                self._blocks.append(mmap.mmap(file.fileno(), _BLOCK.size))
        self.variables = {
            "FAULTS": str(folder / "faults"),
            "FAULTS_BELOW": below,
            "LD_PRELOAD": str(library),
        }

    def arm(self, worker: int, after: int, action: int) -> None:
        """Let the file system of a worker fail: see faults.c; 0 = it works again."""
        clock = _BLOCK.unpack(self._blocks[worker][:])[3]
        self._blocks[worker][:] = _BLOCK.pack(after, action, 0, clock)

    def struck(self, worker: int) -> int:
        """How many operations have failed since."""
        return _BLOCK.unpack(self._blocks[worker][:])[2]

    def set_clock(self, worker: int, seconds: int) -> None:
        """Set a worker's clock so many seconds off this machine's."""
        before = _BLOCK.unpack(self._blocks[worker][:])[:3]
        self._blocks[worker][:] = _BLOCK.pack(*before, seconds)


class Launcher:
    """launch/tpu_run.sh for one command of medmoe on the two hosts."""

    def __init__(self, folder: Path, backend: str, variables: dict[str, str]) -> None:
        """Prepare the hosts.

        Args:
          folder: for keys, logs and what the launcher says.
          backend: `local` or `ssh`.
          variables: of the environment of medmoe; a shell reads them, so `$` has its meaning.
        """
        self.folder, self.said_in = folder, folder / "said"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.flags = ["--grace=5", "--max-restarts=1000", f"--logs={folder / 'launch'}"]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_RUN_", "XLA_F"))}
        self.env["PATH"] = f"{self.bin}:{self.env['PATH']}"
        self.running: subprocess.Popen | None = None
        self._server: subprocess.Popen | None = None
        lines = "".join(f'{name}="{value}"\n' for name, value in variables.items())
        {"local": self._local, "ssh": self._ssh}[backend](lines)

    def _script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def _local(self, lines: str) -> None:
        added = "" if quick.SHIPPED else quick.FLAGS
        self._script(
            "medmoe",
            f'set -a\n{lines}XLA_FLAGS="$XLA_FLAGS {added}"\nset +a\n'
            f'exec {sys.executable} -m medmoe_jax.cli.main "$@"',
        )
        self.flags += ["--backend=local", "--hosts=2", "--devices=4"]
        self.jobs = self.folder / "launch"

    def _ssh(self, lines: str) -> None:
        # Where packages come from here, a login over ssh does not know by itself.
        here = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "UV_"))}
        told = " ".join(f'"{name}={value}"' for name, value in here.items())
        names = {
            "folder": self.folder,
            "port": free_port(),
            "user": getpass.getuser(),
            "environment": f"SetEnv {told}\n" if here else "",
        }
        for key in ("host", "mine"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key]
            subprocess.run(words, check=True)
        (self.folder / "sshd_config").write_text(_SSHD.format(**names))
        (self.folder / "ssh_config").write_text(_SSH.format(**names))
        server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        if server is None:
            raise SystemExit("soak: no sshd here: install the package openssh-server")
        Path("/run/sshd").mkdir(exist_ok=True)
        words = [server, "-D", "-e", "-f", self.folder / "sshd_config"]
        with (self.folder / "sshd.log").open("w") as out:
            self._server = subprocess.Popen(words, stderr=out)
        for name in ("ssh", "scp"):
            real = shutil.which(name)
            self._script(name, f'exec {real} -F {self.folder / "ssh_config"} "$@"')
        settings = quick.environment() | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": quick.flags(4),
            "MEDMOE_TESTS": str(quick.folder()),
        }
        environment = self.folder / "environment"
        environment.write_text(
            "".join(f'{name}="{value}"\n' for name, value in settings.items()) + lines
        )
        self.directory = f"medmoe-soak-{os.getpid()}"
        self.flags += [
            "--backend=ssh", "--hosts=soak-0,soak-1", f"--coordinator=127.0.0.1:{free_port()}",
            f"--dir={self.directory}", f"--env-file={environment}", "--packages=-e .",
            f"--python={sys.version_info.major}.{sys.version_info.minor}",
        ]  # fmt: skip
        self.jobs = Path.home() / self.directory

    def __call__(self, verb: str, *arguments: str) -> int:
        """The exit status of a verb."""
        words = [_LAUNCHER, verb, *self.flags, *arguments]
        with self.said_in.open("a") as said:
            return subprocess.run(
                words, env=self.env, cwd=self.folder, stdout=said, stderr=said
            ).returncode

    def begin(self, *arguments: str) -> None:
        """`resume` with these arguments of medmoe, in a process group of its own."""
        words = [_LAUNCHER, "resume", *self.flags, "--", *arguments]
        with self.said_in.open("a") as said:
            self.running = subprocess.Popen(
                words, env=self.env, cwd=self.folder, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self.said_in.read_text() if self.said_in.exists() else ""

    def process(self, worker: int) -> int | None:
        """The number of medmoe's process on a worker; None while none runs."""
        with contextlib.suppress(OSError, ValueError):
            number = int((self.jobs / f"worker-{worker}" / "pid").read_text())
            if b"medmoe_jax" in (line := Path(f"/proc/{number}/cmdline").read_bytes()) or (
                b"bin/medmoe" in line
            ):
                return number
        return None

    def close(self) -> None:
        """End whatever still runs, and remove what was installed."""
        if self.running and self.running.poll() is None:
            self.running.kill()
            self.running.wait()
        for group in self.jobs.glob("worker-*/group"):
            with contextlib.suppress(OSError):
                os.killpg(int(group.read_text()), signal.SIGKILL)
        if self._server:
            self("delete")
            self._server.kill()
            self._server.wait()


@contextlib.contextmanager
def storage(folder: Path, megabytes: int) -> Generator[Path]:
    """A small file system of its own; where its place is empty, nothing can be written there."""
    folder.mkdir()
    mounts = [("ro,size=4k", folder), (f"size={megabytes}m", folder)]
    try:
        for options, at in mounts:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "soak", at], check=True)
        yield folder
    finally:
        for _ in mounts:
            subprocess.run(["umount", "--lazy", folder], check=False)


def wait_for(what, least: float = 600) -> None:
    """Until `what()` is true; fails after so many seconds."""
    until = time.monotonic() + least
    while not what():
        if time.monotonic() > until:
            raise TimeoutError(f"soak: waited {least} s for {what}")
        time.sleep(0.005)
