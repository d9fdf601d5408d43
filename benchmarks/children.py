"""Parts of the benchmark that need a process of their own: PyTorch, and peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from medmoe_jax.parallel import large_pages

ROOT = Path(__file__).parents[1]
# PyTorch's oneMKL picks its AVX-512 code by the processor's maker; this answers for every maker.
_MAKER = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def _run(module: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The last line that a module of this folder prints; its errors go to the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def peak_gib(variant: str) -> dict[str, float]:
    """Peak resident memory of two steps of a variant, weights included.

    Returns:
      GiB of a process that compiles its programs, and of one that finds them in the cache.
    """
    with tempfile.TemporaryDirectory() as cache:
        env = {"JAX_COMPILATION_CACHE_DIR": cache}
        return {name: float(_run("peak", variant, env=env)) for name in ("compiling", "cached")}


def torch_steps(rounds: int, how: str) -> dict:
    """Seconds of PyTorch's steps, as installed or tuned (see README.md)."""
    return measured("torch_peers", [str(rounds)], how, torch=True)


def torch_decode(rounds: int, how: str, model: str) -> dict:
    """Seconds in which transformers writes NEW tokens, by rows: `torch_decode.py`."""
    return measured("torch_decode", [str(rounds), model], how, torch=True)


def measured(
    module: str,
    arguments: list[str],
    how: str,
    torch: bool,
    env: dict[str, str] | None = None,
) -> dict:
    """The JSON object that a module of this folder prints, and as `tuning` how it was run.

    Args:
      module, arguments: what is run.
      how: `installed`; `heap`, one that keeps its pages; `tuned`, as well large pages and what
        oneMKL is told.
      torch: whether PyTorch runs there, and with it oneMKL.
      env: more of its environment.
    """
    env = {
        **(env or {}),
        large_pages.VARIABLE: f"{large_pages.TUNABLE}=1" if how == "tuned" else "",
    }
    tuning = {"installed": "as installed", "heap": "heap", "tuned": "heap, large pages"}[how]
    keep = () if how == "installed" else ("keep",)
    with tempfile.TemporaryDirectory() as folder:
        compiler = shutil.which("cc")
        if how == "tuned" and torch and compiler:
            source, library = Path(folder, "maker.c"), Path(folder, "maker.so")
            source.write_text(_MAKER)
            command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            env["LD_PRELOAD"], tuning = str(library), f"{tuning}, oneMKL's processor check"
        out = json.loads(_run(module, *arguments, *keep, env=env))
    return {**out, "tuning": tuning}
