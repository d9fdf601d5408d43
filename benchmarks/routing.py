"""What adapters cost over the frozen base: time, memory, and counted FLOPs and bytes.

  python benchmarks/routing.py [--quick] [--only torch,memory,step,sweep,compiled]

Prints tables and writes benchmarks/results/routing.json; benchmarks/README.md says how to read
them. `--quick` takes at most ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from benchmarks import children, dense_gather, steps, sweeps
from benchmarks.heap import keep_pages
from benchmarks.timing import interleaved, machine
from benchmarks.variants import BATCH, TOKENS, plain_lora, shipped_stage_1
from medmoe_jax.base.presets import preset
from medmoe_jax.parallel import large_pages
from medmoe_jax.storage.places import local

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "torch", "peft", "transformers", "google-tunix", "libtpu")
BATCH_TOKENS = BATCH * TOKENS
console = Console(width=120)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def step_times(quick: bool) -> dict:
    """Seconds of every variant in this process, interleaved."""
    names = [n for n in steps.VARIANTS if not (quick and n in steps.NOT_QUICK)]
    calls = {name: steps.make(name) for name in names}
    seconds = interleaved(calls, 5 if quick else 15, rare=steps.SLOW)
    frozen = seconds["frozen"]
    rows = [
        [name, f"{s:.3f}", f"{BATCH_TOKENS / s:.0f}", f"{s / frozen:.2f}"]
        for name, s in seconds.items()
    ]
    show("Training step, JAX", ["variant", "s", "tokens/s", "over frozen"], rows)
    if "tunix_frozen" not in seconds:
        console.print("tunix: not installed (pip install -e '.[parity]')")
    return seconds


def torch_times(quick: bool) -> dict | None:
    """Seconds of PyTorch's steps in processes of their own, as installed and tuned."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("peft")):
        console.print("torch, peft: not installed (pip install -e '.[parity]')")
        return None
    rounds = 4 if quick else 15
    out = {name: children.torch_steps(rounds, name) for name in ("installed", "tuned")}
    for name, result in out.items():
        seconds = result["seconds"]
        rows = [
            [variant, f"{s:.3f}", f"{BATCH_TOKENS / s:.0f}", f"{s / seconds['frozen']:.2f}"]
            for variant, s in seconds.items()
        ]
        title = f"Training step, PyTorch {result['torch']}, {name} ({result['tuning']})"
        show(title, ["variant", "s", "tokens/s", "over frozen"], rows)
    return out


def memory(quick: bool) -> dict:
    """Peak resident memory of a variant's process."""
    names = ("medcare_trained",)
    if not quick:
        names += ("medcare", "frozen", "plain_lora", "dense_gather_batched_remat")
    peaks = {name: children.peak_gib(name) for name in names}
    rows = [[name, *(f"{gib:.2f}" for gib in peak.values())] for name, peak in peaks.items()]
    show("Peak resident memory, GiB", ["variant", "compiling", "cached"], rows)
    return peaks


def sweep(quick: bool) -> list[dict]:
    """One site's mixture over experts and tokens, by strategy."""
    dense_gather.register()
    lines = [sweeps.measure(e, t, 7 if quick else 15) for e, t in sweeps.sizes(quick)]
    names = sorted({name for line in lines for name in line.seconds})
    for what, unit in (("seconds", 1e-3), ("bytes", 1e9), ("temporaries", 2**20)):
        rows = [
            [f"{line.experts} x {line.tokens}"]
            + [f"{line._asdict()[what].get(n, float('nan')) / unit:.2f}" for n in names]
            for line in lines
        ]
        columns = ["experts x tokens", *names]
        if what == "seconds":
            columns.append("auto over best")
            for row, line in zip(rows, lines, strict=True):
                row.append(f"{line.seconds['auto'] / sweeps.best(line):.2f}")
        label = {"seconds": "ms", "bytes": "counted GB", "temporaries": "temporaries, MiB"}[what]
        show(f"One site, forward and backward: {label}", columns, rows)
    return [line._asdict() for line in lines]


def compiled(quick: bool) -> dict | None:
    """Counted costs of the steps compiled for TPU slices, over the frozen step's."""
    if importlib.util.find_spec("libtpu") is None:
        console.print("libtpu: not installed (pip install -e '.[aot]')")
        return None
    from benchmarks import compiled as aot

    config = preset("qwen1.5-7b")
    banks = {"frozen": (), "medcare_shipped": shipped_stage_1(config)}
    if not quick:
        banks["plain_lora"] = plain_lora(config)
    out = {}
    for topology in ("v5e:2x4",) if quick else ("v5e:2x4", "v5p:2x2x2"):
        figures = {
            name: aot.figures(aot.compile_step(topology, config, specs))
            for name, specs in banks.items()
        }
        frozen = figures["frozen"]

        def cells(row, frozen=frozen):
            return [f"{value / 1e9:.1f} ({value / frozen[key]:.3f})" for key, value in row.items()]

        rows = [[name, *cells(row)] for name, row in figures.items()]
        columns = ["variant", *(f"{key}, 1e9" for key in frozen)]
        show(f"qwen1.5-7b on {topology}, a chip's step (over frozen)", columns, rows)
        out[topology] = figures
    return out


SECTIONS = {
    "torch": torch_times,  # children first, while this process holds nothing
    "memory": memory,
    "step": step_times,
    "sweep": sweep,
    "compiled": compiled,
}


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--output", type=local, default=ROOT / "benchmarks/results/routing.json")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: no section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    keep_pages()
    results = {"machine": machine(PACKAGES), "quick": args.quick}
    for name in args.only.split(","):
        results[name] = SECTIONS[name](args.quick)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    large_pages.begin_again()
    main()
