"""The cell that installs: what it asks pip for, on machines that are told to it."""

import glob
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

PACKAGES = {"numpy": ["numpy"], "pytest": ["pytest"], "json": []}
CELL = Path(__file__).parents[2] / "notebooks" / "install.py"


@pytest.fixture
def machine(monkeypatch):
    """Runs the cell on a machine with these device files and plugins; gives pip's arguments."""

    def run_cell(*files, there=(), smi="", wheel=True, status=0, jax=False):
        asked, constraints = [], []

        def run(command, **_):
            if command[0] == "nvidia-smi":
                return SimpleNamespace(returncode=int(not smi), stdout=smi)
            asked.append(command[3:])
            if "--constraint" in command:
                kept = Path(command[command.index("--constraint") + 1])
                constraints.extend(kept.read_text().split())
                return SimpleNamespace(returncode=status, stdout="ERROR: it conflicts\n")
            return SimpleNamespace(returncode=0, stdout="")

        def found(pattern):
            if pattern.endswith(".whl"):
                return ["medmoe_jax-1.whl"] if wheel else []
            return [file for file in files if file.startswith(pattern.rstrip("*").split("[")[0])]

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(glob, "glob", found)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: PACKAGES)
        distributions = [SimpleNamespace(name=name) for name in there]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: distributions)
        for name in ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(sys.modules, "jax", ModuleType("jax"))
        if not jax:
            monkeypatch.delitem(sys.modules, "jax")
        exec(compile(CELL.read_text(), str(CELL), "exec"), {})
        return asked, constraints

    return run_cell


@pytest.mark.parametrize(
    "files, smi, wanted",
    [
        ((), "", "medmoe_jax @"),
        (("/dev/accel0",), "", "medmoe_jax[tpu] @"),
        (("/dev/vfio/0",), "", "medmoe_jax[tpu] @"),
        (("/dev/nvidia0",), "580.65.06, 8.0\n580.65.06, 8.0\n", "medmoe_jax[gpu] @"),
        (("/dev/nvidia0",), "550.54.15, 7.5\n", "medmoe_jax[cuda12] @"),
        (("/dev/nvidia0",), "580.65.06, 6.0\n", "medmoe_jax[cuda12] @"),
        (("/dev/nvidia0",), "", "medmoe_jax[cuda12] @"),
    ],
    ids=["cpu", "tpu", "vfio", "new driver", "old driver", "old GPU", "no nvidia-smi"],
)
def test_the_extra_is_that_of_the_machine(machine, files, smi, wanted):
    ((first, *_, last),), _ = machine(*files, smi=smi)
    assert first == "install" and last.startswith(wanted) and last.endswith("/medmoe_jax-1.whl")


def test_plugins_of_other_machines_go_and_what_is_loaded_stays(machine):
    colab = ("jax", "jax-cuda12-plugin", "jax_cuda12_pjrt", "libtpu")
    (gone, _), constraints = machine("/dev/accel0", there=colab)
    assert gone == ["uninstall", "--quiet", "--yes", "jax-cuda12-pjrt", "jax-cuda12-plugin"]
    assert f"numpy=={np.__version__}" in constraints
    assert not [line for line in constraints if line.startswith("jax==")]
    assert machine("/dev/nvidia0", smi="550.1, 8.0\n", there=colab)[0][0][-1] == "libtpu"


def test_what_it_says_where_it_cannot(machine):
    with pytest.raises(RuntimeError, match=r"has imported jax.*: choose Restart session"):
        machine(jax=True)
    with pytest.raises(FileNotFoundError, match=r"upload the package's wheel"):
        machine(wheel=False)
    with pytest.raises(RuntimeError, match=r"(?s)ERROR: it conflicts.*loaded already: choose Res"):
        machine(status=1)
