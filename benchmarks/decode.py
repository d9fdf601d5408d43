"""What adapters cost a token that is written, and how fast tokens come beside transformers.

  python benchmarks/decode.py [--quick] [--gguf=SmolLM2-135M-Instruct.Q4_1.gguf]

Greedy decoding of 1 and 8 rows, 64 tokens read and 64 written, float32. Prints tables and writes
benchmarks/results/decode.json; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import children
from benchmarks.routing import PACKAGES, ROOT, console, show
from benchmarks.timing import interleaved, machine
from benchmarks.variants import DECODE_ROWS, DECODER, NEW, PROMPT, medcare_stage_1, random_banks
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.inference.engine import Engine
from medmoe_jax.parallel import large_pages
from medmoe_jax.parallel.mesh import make_mesh, replicated
from medmoe_jax.storage.places import local

BASE, MOLORA, SMOL = "base", "molora", "smollm2"


def engines(config: DecoderConfig, specs: tuple[BankSpec, ...], base, banks) -> dict[int, Engine]:
    """An engine for each number of rows, as `medmoe` opens it."""
    adapted = AdaptedConfig(config, specs, Execution())
    mesh = make_mesh({}, jax.devices()[:1])
    return {rows: Engine(adapted, base, banks, {}, mesh, rows) for rows in DECODE_ROWS}


def models(gguf: Path | None) -> dict[str, dict[int, Engine]]:
    """The benchmark's base, the same with its banks, and a base on disk if one is given."""
    base, specs = decoder.init(DECODER, jax.random.key(0)), medcare_stage_1(DECODER)
    out = {
        BASE: engines(DECODER, (), base, {}),
        MOLORA: engines(DECODER, specs, base, random_banks(specs, DECODER)),
    }
    if gguf:
        found = open_base(str(gguf), "", {}, 0)
        one = replicated(make_mesh({}, jax.devices()[:1]))
        shardings = jax.tree.map(lambda _: one, found.abstract(jnp.float32))
        out[SMOL] = engines(found.config, (), found.load(jnp.float32, shardings), {})
    return out


def ours(rounds: int, gguf: Path | None) -> dict[str, dict[str, float]]:
    """`{model: {rows: seconds}}` for NEW tokens, and as `rows, first` for the first one alone."""
    prompts = np.random.default_rng(1).integers(1, 8000, (max(DECODE_ROWS), PROMPT)).tolist()
    calls = {}
    for name, by_rows in models(gguf).items():
        for rows, engine in by_rows.items():
            for what, new in ((f"{rows}", NEW), (f"{rows}, first", 1)):
                calls[name, what] = functools.partial(engine.generate, prompts[:rows], new, ())
    seconds = interleaved(calls, rounds)
    out: dict[str, dict[str, float]] = {}
    for (name, what), s in seconds.items():
        out.setdefault(name, {})[what] = s
    return out


def a_token(seconds: dict[str, float], rows: int) -> float:
    """Seconds of a step after the first."""
    return (seconds[f"{rows}"] - seconds[f"{rows}, first"]) / (NEW - 1)


def theirs(rounds: int, gguf: Path | None) -> dict[str, dict]:
    """What transformers takes, as installed and tuned."""
    if not importlib.util.find_spec("torch"):
        console.print("torch: not installed (pip install -e '.[parity]')")
        return {}
    names = {MOLORA: "molora"} | ({SMOL: str(gguf)} if gguf else {})
    return {
        f"{name}, {how}": children.torch_decode(rounds, how, model)
        for name, model in names.items()
        for how in ("installed", "tuned")
    }


def report(mine: dict[str, dict[str, float]], others: dict[str, dict]) -> None:
    """Print the tables."""
    rows = []
    for name, s in mine.items():
        for b in DECODE_ROWS:
            over = a_token(s, b) / a_token(mine[BASE], b)
            cells = [f"{1e3 * a_token(s, b):.1f}", f"{b * NEW / s[str(b)]:.1f}"]
            rows.append([f"{name}, {b} rows", *cells, f"{over:.3f}" if name == MOLORA else ""])
    show("Ours", ["model", "ms a step", "tokens/s", "over base"], rows)
    rows = []
    for name, result in others.items():
        for b in DECODE_ROWS:
            s = result["seconds"][str(b)]
            ratio = s / mine[name.split(",")[0]][str(b)]
            rows.append([f"{name}, {b} rows", f"{b * NEW / s:.1f}", f"{ratio:.2f}"])
    show("transformers' generate", ["model", "tokens/s", "ours over it"], rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--gguf", type=Path, help="a base to decode beside the benchmark's own")
    parser.add_argument("--output", type=local, default=ROOT / "benchmarks/results/decode.json")
    args = parser.parse_args()
    rounds = 2 if args.quick else 9
    others = theirs(rounds, args.gguf)  # children first, while this process holds nothing
    mine = ours(rounds, args.gguf)
    report(mine, others)
    results = {
        "machine": machine(PACKAGES),
        "quick": args.quick,
        "ours": mine,
        "transformers": others,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    large_pages.begin_again()
    main()
