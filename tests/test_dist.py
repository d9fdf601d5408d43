"""What is published: a source archive and a wheel, whole, and as the package index wants them."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import medmoe_jax

ROOT = Path(__file__).parents[1]
KINDS = ("medmoe_jax", "configs", "*.toml", "*.in", "setup.py", "README.md", "LICENSE")
BUILD = """
import sys
from setuptools import build_meta

for kind, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    getattr(build_meta, f"build_{kind}")(folder)
"""


def build(tree, *asked):
    """Have a folder of sources make a `wheel` or an `sdist` in a folder, as pip does."""
    words = [str(word) for word in asked]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *words], cwd=tree, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr


def content(folder):
    """The files of the wheel in a folder, but for its list of them."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if "/RECORD" not in name}


@pytest.mark.processes
def test_a_wheel_of_the_source_archive_is_that_of_the_clone(tmp_path):
    clone, dist, again = (tmp_path / name for name in ("clone", "dist", "again"))
    listed = subprocess.run(
        ["git", "ls-files", *KINDS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
    dist.mkdir(), again.mkdir()
    build(clone, "sdist", dist, "wheel", dist)
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert unpacked.name == f"medmoe_jax-{medmoe_jax.__version__}"
    wanted = ("README.md", "LICENSE", "pyproject.toml", "medmoe_jax/configs/medcare.py")
    assert all((unpacked / name).is_file() for name in wanted)
    build(unpacked, "wheel", again)
    assert content(again) == content(dist)
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()],
        capture_output=True,
        text=True,
    )
    assert not checked.returncode and checked.stdout.count("PASSED") == 2, checked.stdout
