"""The package as a wheel has it, built once for all processes of a run and unpacked in a folder."""

import functools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests import quick
from tests.tiny import once

ROOT = Path(__file__).parents[1]


@functools.cache
def files() -> tuple[str, ...]:
    """What a clone has of the package."""
    kinds = ("medmoe_jax", "configs", "*.toml", "setup.py", "README.md", "LICENSE")
    listed = subprocess.run(
        ["git", "ls-files", *kinds], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return tuple(name for name in listed.stdout.split() if (ROOT / name).exists())


@functools.cache
def folder() -> Path:
    """Holds the wheel, and what is in it under `site`."""
    return once(quick.folder() / "wheel", _build)


def site() -> Path:
    """Where `import medmoe_jax` finds what the wheel holds, and nothing of the clone."""
    return folder() / "site"


def _build(path: Path) -> None:
    copy = path / "clone"
    for name in files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", path, copy], check=True)
    shutil.rmtree(copy)
    with zipfile.ZipFile(next(path.glob("*.whl"))) as wheel:
        wheel.extractall(path / "site")
