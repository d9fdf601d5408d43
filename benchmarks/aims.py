"""What was aimed at, and what the committed results have of it: a table in benchmarks/README.md.

python benchmarks/aims.py            # after any of the benchmarks that it reads
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages, peer_tables, scaling
from benchmarks.decode import a_token
from benchmarks.peer_task import OURS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "README.md"


def load(name: str) -> dict[str, Any]:
    """The committed results of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def steps() -> list[list[str]]:
    """Training steps on a processor: routing.py, peers.py."""
    routing, lora = load("routing"), load("peers")["cpu"]["recipes"]["lora"]
    step, tuned = routing["step"], routing["torch"]["tuned"]["seconds"]
    frozen, shipped, trained = (
        step[name] for name in ("frozen", "medcare_shipped", "medcare_trained")
    )
    peft = [
        f"{peer_tables.seconds(lora['peft'], how) / peer_tables.seconds(lora[OURS], how):.2f}"
        for how in ("heap", "tuned")
    ]
    peak = routing["memory"]["medcare_trained"]["compiling"]
    return [
        [
            "MedCare stage 1 as shipped, over frozen: unrolled, as trained",
            "≤ 1.22",
            f"{shipped / frozen:.2f}, {trained / frozen:.2f}",
        ],
        ["plain LoRA over frozen", "≤ 1.06", f"{step['plain_lora'] / frozen:.2f}"],
        ["frozen, speed over tuned PyTorch's", "≥ 1.0", f"{tuned['frozen'] / frozen:.2f}"],
        ["MedCare, speed over PyTorch's", "≥ 2.0", f"{tuned['naive_molora'] / shipped:.2f}"],
        ["LoRA on SmolLM2, speed over PEFT's: heap kept, tuned", "≥ 2.2", ", ".join(peft)],
        ["MedCare stage 1 as trained, memory with compiling, GiB", "≤ 3.0", f"{peak}"],
    ]


def compiled() -> list[list[str]]:
    """Steps compiled for TPU slices: scaling.py, and routing.py for one that recomputes layers."""
    plans, again = scaling.load(), load("routing")["compiled"]["v5e:2x4"]
    rows = [case.key for case in scaling.CASES if case.section == "medcare"]
    medcare = [plans[row]["mfu_bound"] for row in rows]
    seven, int8 = "medcare.py:qwen1.5-7b v5e:2x4", "medcare.py:qwen1.5-7b v5e:1x1"
    bounds = [plans[n]["step_seconds_bound"] for n in (seven, f"{int8} base.quantise=int8")]
    shipped, frozen = plans[seven], plans[seven]["others"]["frozen"]
    ratio = shipped["temporaries_gib"] / frozen["temporaries_gib"]
    full = again["medcare_shipped"]["temporaries"] / again["frozen"]["temporaries"]
    return [
        ["7B as shipped on v5e:2x4, bound, ms", "≤ 335", f"{1e3 * bounds[0]:.0f}"],
        ["7B in int8 on one v5e chip, bound, ms", "≤ 620", f"{1e3 * bounds[1]:.0f}"],
        ["MFU bound of MedCare's rows", "≥ 88%", f"{min(medcare):.0%} to {max(medcare):.0%}"],
        [
            "7B, temporaries over frozen: as shipped, recomputing layers",
            "≤ 1.15",
            f"{ratio:.2f}, {full:.2f}",
        ],
    ]


def gpu() -> list[list[str]]:
    """Steps on one H100: gpu.py."""
    rows = []
    for name, aim in (("llama3-8b", 12500), ("qwen2.5-7b", 14100)):
        shape = load("gpu")["shapes"][name]
        lora, medcare = (shape[f"{row}_packed"]["tokens_per_second"] for row in ("lora", "medcare"))
        rows += [
            [f"H100, LoRA, {name} shapes, tokens/s", f"≥ {aim:,}", f"{lora:,.0f}"],
            [f"H100, MedCare, {name} shapes, of that", "≥ 0.8", f"{medcare / aim:.2f}"],
        ]
    return rows


def decoding() -> list[list[str]]:
    """Tokens one by one on a processor: decode.py."""
    ours, theirs = load("decode")["ours"], load("decode")["transformers"]
    over = [f"{a_token(ours['molora'], n) / a_token(ours['base'], n):.2f}" for n in (8, 1)]

    def speed(model: str, how: str) -> str:
        return f"{theirs[f'{model}, {how}']['seconds']['8'] / ours[model]['8']:.2f}"

    return [
        ["decoding over the base, 8 rows, 1 row", "≤ 1.05", ", ".join(over)],
        ["8 rows, speed over transformers'", "≥ 3", speed("molora", "installed")],
        ["the same, tuned", "≥ 2", speed("molora", "tuned")],
        ["SmolLM2, speed over transformers'", "> 1", speed("smollm2", "installed")],
    ]


def table() -> str:
    """Markdown of all aims."""
    rows = [*steps(), *compiled(), *gpu(), *decoding()]
    return pages.markdown(["figure", "aim", "reached"], rows)


if __name__ == "__main__":
    pages.put(PAGE, "aims", table())
