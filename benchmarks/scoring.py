"""What it costs to score choices, over one forward pass of their distinct tokens.

  python benchmarks/scoring.py [--quick]

1,000 items of four options, prompts of 30 to 400 tokens and options of 1 to 15, or of 1 as letters
are, float32. Prints a table and writes benchmarks/results/scoring.json; benchmarks/README.md says
how to read it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.heap import keep_pages
from benchmarks.routing import PACKAGES, ROOT, console, show
from benchmarks.timing import interleaved, machine
from benchmarks.variants import DECODER, medcare_stage_1, random_banks
from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.execution import Execution
from medmoe_jax.inference import engine as engine_lib
from medmoe_jax.inference.engine import Engine
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.storage.places import local

ROWS, TOKENS = 16, 256  # of the forward pass beside it; an item has 250 tokens on average
PROMPT, OPTIONS = (30, 400), {"letters": (1, 1), "texts": (1, 15)}


class Items(NamedTuple):
    """Prompts, the options of each, and the number of tokens in both."""

    prompts: list[list[int]]
    options: list[list[list[int]]]
    tokens: int


def draw(items: int, lengths: tuple[int, int], vocabulary: int) -> Items:
    """Items of random ids."""
    rng = np.random.default_rng(0)

    def ids(limits: tuple[int, int]) -> list[int]:
        return rng.integers(1, vocabulary, rng.integers(*limits, endpoint=True)).tolist()

    prompts = [ids(PROMPT) for _ in range(items)]
    options = [[ids(lengths) for _ in range(4)] for _ in prompts]
    said = sum(len(one) for some in options for one in some)
    return Items(prompts, options, sum(map(len, prompts)) + said)


def make_engine(layers: int) -> Engine:
    """The benchmark's base with the banks of configs/medcare.py's first stage, layers cut apart."""
    config = DECODER.replace(n_layers=layers)
    specs = medcare_stage_1(config)
    base, banks = decoder.init(config, jax.random.key(0)), random_banks(specs, config)
    mesh = make_mesh({}, jax.devices()[:1])
    return Engine(AdaptedConfig(config, specs, Execution(unroll=layers)), base, banks, {}, mesh, 16)


def plain_pass(engine: Engine, tokens: int):
    """Hidden states of so many tokens in full rows, without logits or padding."""
    run = jax.jit(functools.partial(adapted.hidden, engine.config))
    ids = jax.random.randint(jax.random.key(1), (ROWS, TOKENS), 0, DECODER.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(TOKENS)[None], ids.shape)

    def call() -> None:
        whole, rest = divmod(tokens, ROWS * TOKENS)
        for rows in (*[ROWS] * whole, -(-rest // TOKENS)):
            arrays = (a[:rows] for a in (ids, jnp.ones_like(ids), positions))
            jax.block_until_ready(run(engine.base, engine.banks, *arrays)[0])

    return call


def scored(engine: Engine, items: Items, sizes: list[int]) -> None:
    """Score the items; `sizes` gets the slots of every batch, filled or not."""
    program = engine_lib.score_batch

    def counted(config, weights, packed):
        sizes.append(packed.tokens.size)
        return program(config, weights, packed)

    engine_lib.score_batch = counted
    engine.score(items.prompts, items.options)
    engine_lib.score_batch = program


def measure(engine: Engine, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """`{kind of option: {"tokens", "slots", "score", "forward"}}`: tokens and seconds."""
    kinds = {kind: draw(count, limits, DECODER.vocab_size) for kind, limits in OPTIONS.items()}
    sizes: dict[str, list[int]] = {kind: [] for kind in kinds}
    calls = {}
    for kind, items in kinds.items():
        calls[kind, "score"] = functools.partial(scored, engine, items, sizes[kind])
        calls[kind, "forward"] = plain_pass(engine, items.tokens)
    seconds = interleaved(calls, rounds)
    return {
        kind: {
            "tokens": items.tokens,
            "slots": sum(sizes[kind]) // (1 + rounds),  # each was called once before, too
            **{what: seconds[kind, what] for what in ("score", "forward")},
        }
        for kind, items in kinds.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="64 items, one layer, one round")
    parser.add_argument("--output", type=local, default=ROOT / "benchmarks/results/scoring.json")
    args = parser.parse_args()
    count, layers, rounds = (64, 1, 1) if args.quick else (1000, 2, 3)
    keep_pages()
    found = measure(make_engine(layers), count, rounds)
    rows = [
        [kind, f"{one['tokens']}", f"{one['slots'] / one['tokens']:.3f}", f"{one['score']:.2f}",
         f"{one['forward']:.2f}", f"{one['score'] / one['forward']:.3f}"]
        for kind, one in found.items()
    ]  # fmt: skip
    columns = ["options", "tokens", "slots over tokens", "scoring, s", "forward, s", "ratio"]
    show(f"{count} items of four options", columns, rows)
    results = {"machine": machine(PACKAGES), "quick": args.quick, "items": count, "found": found}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
