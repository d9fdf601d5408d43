"""Training steps on one NVIDIA GPU: LoRA and MedCare's first stage on published 7B and 8B shapes.

  python benchmarks/gpu.py [--shapes llama3-8b,qwen2.5-7b] [--out benchmarks/results/gpu.json]

Random bfloat16 weights, 2 rows of 4,096 tokens, every token a target, the library's whole training
step with clipping and AdamW. MedCare's banks are those of configs/medcare.py as shipped, dropout
included; `_packed` rows hold eight texts each instead of one. Prints a table and writes the figures
with the card's name and jax's version; shapes measured before on the same card stay.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.timing import interleaved
from benchmarks.variants import (
    adapted_variant,
    frozen_variant,
    make_batch,
    plain_lora,
    shipped_stage_1,
)
from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.presets import preset
from medmoe_jax.storage.places import local

ROWS, TOKENS = 2, 4096
TEXTS = 8  # of a packed row
# Tokens a second of LoRA on one H100, as NVIDIA gives them for its own framework.
PUBLISHED = {"llama3-8b": 12_500, "qwen2.5-7b": 14_100}


def make(config: DecoderConfig, base, name: str, remat: str):
    """A variant of the step by name."""
    execution = Execution(jnp.bfloat16, remat=remat)
    if name == "frozen":
        return frozen_variant(config, execution, base, (ROWS, TOKENS))
    specs = {"lora": plain_lora, "medcare": shipped_stage_1}[name](config)
    return adapted_variant(config, execution, base, specs, "auto")


def measure(config: DecoderConfig, base, name: str, remat: str, rounds: int) -> dict:
    """Median seconds of a step, the bytes that its program takes, and the loss of every step."""
    kind, _, packed = name.partition("_")
    variant, batch = make(config, base, kind, remat), make_batch(config, ROWS, TOKENS)
    if packed:
        token_BxT = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (ROWS, TOKENS))
        text = TOKENS // TEXTS
        batch |= {"segment_ids": 1 + token_BxT // text, "positions": token_BxT % text}
    run = variant.run.lower(variant.carry, variant.frozen, batch).compile()
    bytes_ = run.memory_analysis().temp_size_in_bytes
    carry, losses = variant.carry, []

    def step() -> None:
        nonlocal carry
        carry, loss = run(carry, variant.frozen, batch)
        losses.append(float(loss))

    seconds = interleaved({name: step}, rounds)[name]
    return {"seconds": seconds, "temporaries": bytes_, "losses": losses}


def first_that_fits(config: DecoderConfig, base, name: str, rounds: int) -> dict:
    """The measurement with the least recomputation for which the card has room."""
    for remat in ("none", "dots", "full"):
        try:
            return measure(config, base, name, remat, rounds) | {"remat": remat}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name}: recomputing {remat} takes more memory than there is", flush=True)
    raise SystemExit(f"{name} does not fit on this card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(PUBLISHED))
    parser.add_argument("--rounds", type=int, default=8)
    kept = Path(__file__).parent / "results" / "gpu.json"
    parser.add_argument("--out", type=local, default=kept)
    arguments = parser.parse_args()
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "shapes": {}}
    if (out := arguments.out).exists():
        earlier = json.loads(out.read_text())
        if {**earlier, "shapes": {}} == results:
            results = earlier
    table = Table(title=f"{results['device']}, {ROWS} x {TOKENS} tokens, bfloat16")
    for column in ("shapes", "step", "remat", "s", "tokens/s", "over published", "GiB"):
        table.add_column(column, justify="left" if column in ("shapes", "step") else "right")
    for shapes in arguments.shapes.split(","):
        config = preset(shapes)
        base = jax.jit(functools.partial(decoder.init, config, dtype=jnp.bfloat16))(
            jax.random.key(0)
        )
        rows = results["shapes"][shapes] = {}
        for name in ("frozen", "lora", "lora_packed", "medcare", "medcare_packed"):
            row = rows[name] = first_that_fits(config, base, name, arguments.rounds)
            row["tokens_per_second"] = ROWS * TOKENS / row["seconds"]
            over = row["tokens_per_second"] / PUBLISHED[shapes] if shapes in PUBLISHED else 0
            table.add_row(
                shapes,
                name,
                row["remat"],
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                f"{over:.2f}" if over else "",
                f"{row['temporaries'] / 2**30:.1f}",
            )
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(row), flush=True)
        del base
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
