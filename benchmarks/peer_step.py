"""One contender of peers.py, run as a process of its own: prints one JSON object.

  python -m benchmarks.peer_step WHO RECIPE GGUF DEVICE STEPS [keep]

With `keep`, in a heap that keeps its pages; this project as `medmoe` runs. What is not installed,
or finds no GPU, says so as `missing`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.heap import keep_pages, peak_gib
from benchmarks.peer_task import OURS, Contender
from medmoe_jax.parallel import large_pages


class Side(NamedTuple):
    """Where a contender is made, and what it needs: by their module, distributions."""

    module: str
    needs: dict[str, str]

    @property
    def torch(self) -> bool:
        """Whether PyTorch runs it."""
        return "torch" in self.needs


_TORCH = {"torch": "torch", "transformers": "transformers"}
SIDES = {
    OURS: Side("peer_ours", {}),
    "peft": Side("peer_torch", {**_TORCH, "peft": "peft"}),
    "naive": Side("peer_torch", _TORCH),
    "tunix": Side("peer_tunix", {"tunix": "google-tunix", "qwix": "qwix"}),
}


def missing(who: str, device: str) -> str:
    """Why a contender cannot run here, as a part of a sentence, or ""."""
    side = SIDES[who]
    absent = [name for module, name in side.needs.items() if not importlib.util.find_spec(module)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if device == "gpu":
        if side.torch:
            import torch

            return "" if torch.cuda.is_available() else "its PyTorch sees no GPU"
        import jax

        return "" if jax.default_backend() == "gpu" else "JAX sees no GPU"
    return ""


def measure(contender: Contender, steps: int) -> dict:
    """Seconds and losses of the first step, which compiles, and of those after it."""
    losses, seconds = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        losses.append(contender.step())
        seconds.append(time.perf_counter() - start)
    peak = contender.peak_bytes
    return {
        "device": contender.device,
        "parameters": contender.parameters,
        "losses": losses,
        "first": seconds[0],
        "seconds": seconds[1:],
        "peak_gib": round(peak() / 2**30, 2) if peak else peak_gib(),
    }


def main(who: str, recipe: str, gguf: str, device: str, steps: str) -> None:
    """Measure, and print the figures or why there are none."""
    if reason := missing(who, device):
        print(json.dumps({"missing": reason}))
        return
    make = importlib.import_module(f"benchmarks.{SIDES[who].module}").make
    print(json.dumps(measure(make(who, recipe, Path(gguf), device), int(steps))))


if __name__ == "__main__":
    if sys.argv[1] == OURS:
        large_pages.begin_again()
    elif "keep" in sys.argv[6:]:
        keep_pages()
    main(*sys.argv[1:6])
