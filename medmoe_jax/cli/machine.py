"""What can be wrong with a machine: versions, devices, who holds them, memory and disk."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from medmoe_jax.parallel import releases
from medmoe_jax.parallel.releases import Misfit
from medmoe_jax.parallel.room import machine_free
from medmoe_jax.storage.places import nearest

_PATIENCE = 180  # seconds that a process may take to find its devices
_LOOK = "import jax; print(*(f'{d.platform}:{d.device_kind}' for d in jax.devices()), sep='\\n')"
_LOW_DISK = 10 << 30  # bytes: a few checkpoints and what is fetched


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
      state: `ok`, `look` (a person should know it) or `bad` (a run will fail).
      what: what was looked at.
      text: what was found.
      remedy: what to do.
    """

    state: str
    what: str
    text: str
    remedy: str = ""


def versions(installed: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Whether the installed packages are of the releases that fit each other.

    Args:
      installed: version by normal name; None = those of this environment.
    """
    found = releases.installed() if installed is None else installed
    wrong = list(_wrong(found))
    yield from wrong
    if not wrong:
        main = ", ".join(f"{name} {found[name]}" for name in ("jax", "jaxlib", "flax"))
        yield Finding("ok", "versions", f"Python {sys.version.split()[0]}, {main}")


def _wrong(installed: Mapping[str, str]) -> Iterator[Finding]:
    """What this package needs and has not, and what does not fit: the plugins of jax, too."""
    unfit = []
    for one in releases.requirements("medmoe_jax", ("",)):
        have = installed.get(releases.normal(one.name))
        if have is None:
            yield Finding("bad", "versions", f"{one.name} is missing", f"pip install '{one}'")
        elif not releases.fits(one, have):
            unfit.append(Misfit(one, have, "medmoe_jax"))
    for found in (*unfit, *releases.misfits(installed)):
        yield Finding("bad", "versions", found.text, found.remedy)


def devices() -> Iterator[Finding]:
    """What JAX finds, in a process of its own: a driver that does not fit may end it, or hang."""
    command = [sys.executable, "-c", _LOOK]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        text = f"JAX found no device within {_PATIENCE} s"
        yield Finding("bad", "devices", text, "end what holds the device, or restart the machine")
        return
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        text = f"JAX cannot start (status {ended.returncode}): {last}"
        yield Finding("bad", "devices", text, "see versions; a driver may not fit this jaxlib")
        return
    kinds = ended.stdout.split("\n")[:-1]
    platforms = {kind.partition(":")[0] for kind in kinds}
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    unused = [name for name in releases.FILES if releases.files_of(name) and name not in platforms]
    asked = os.environ.get("JAX_PLATFORMS", "")
    if unused and not asked:
        extra = unused[0]
        yield Finding(
            "bad", "devices", f"{counts}; this machine's {extra.upper()} is not used",
            f"pip install 'medmoe_jax[{extra}]'",
        )  # fmt: skip
    else:
        note = f" (JAX_PLATFORMS={asked})" if asked else ""
        yield Finding("ok", "devices", counts + note)


def holders(
    files: tuple[str, ...] = releases.FILES["tpu"], processes: str = "/proc"
) -> Iterator[Finding]:
    """Processes that have a TPU open: it serves one at a time."""
    wanted = {path for pattern in files for path in glob.glob(pattern)}
    for link in glob.glob(f"{processes}/[0-9]*/fd/*") if wanted else []:
        try:
            device = os.readlink(link)
            if device not in wanted:
                continue
            number = Path(link).parts[-3]
            line = Path(processes, number, "cmdline").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        command = line.replace(b"\0", b" ").decode(errors="replace").strip()
        yield Finding("bad", "TPU", f"held by process {number}: {command}", f"kill {number}")
        wanted.discard(device)


def memory(needed: int = 0) -> Iterator[Finding]:
    """Free memory of the machine, beside the bytes that a base takes on it."""
    free = machine_free()
    text = f"{_size(free)} free"
    if not needed:
        yield Finding("ok", "memory", text)
        return
    state = "bad" if needed > free else "look" if 2 * needed > free else "ok"
    remedy = "a smaller base, base.dtype=bfloat16 or base.quantise=int8" if state != "ok" else ""
    yield Finding(state, "memory", f"{text}; the base alone takes {_size(needed)}", remedy)


def disk(places: Mapping[str, Path]) -> Iterator[Finding]:
    """Free space where a run writes, by what it writes there."""
    for what, path in places.items():
        free = shutil.disk_usage(nearest(path)).free
        state = "look" if free < _LOW_DISK else "ok"
        remedy = "a checkpoint holds what is trained, three times" if state == "look" else ""
        yield Finding(state, "disk", f"{_size(free)} free for {what} ({path})", remedy)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
