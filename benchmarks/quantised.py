"""What a quantised frozen base saves, and what it costs in loss, against bfloat16.

  python benchmarks/quantised.py            # both tables; the second needs the extra `aot`
  python benchmarks/quantised.py --loss     # the first only

Loss: a small decoder is stored in float32, bfloat16, int8 and nf4 (the latter three with bfloat16
activations). "own text" is the loss on text drawn from the float32 decoder itself, so that what a
format adds is its divergence from it; "adapted" is the loss on held-out made-up text after 100
steps of LoRA of rank 8 on every site. With $MEDMOE_DATA the decoder is the pretrained one of
260,032 parameters there, otherwise a random one on bytes.

Memory: a training step of LoRA on Qwen2-1.5B's shapes, 4 rows of 512 tokens in bfloat16, is
compiled (not run) for one v5e chip: the base's bytes, those of all arguments, and what the compiler
allocates beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medmoe_jax.adapters import bank
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, quantised
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.presets import preset
from medmoe_jax.checkpoints import llama2c
from medmoe_jax.data import tokenizers
from medmoe_jax.data.demo import general
from medmoe_jax.inference.engine import Engine
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.parallel.mesh import make_mesh
from medmoe_jax.parallel.topology import compile_for, describe
from medmoe_jax.storage.places import local
from medmoe_jax.training.step import Objective, TrainState, nll, train_step

RESULTS = Path(__file__).parent / "results"
FORMATS = {"float32": "", "bfloat16": "", "int8": "int8", "nf4": "nf4"}
RANDOM = DecoderConfig(
    vocab_size=256, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384
)
STEPS, ROWS, LENGTH = 100, 16, 128


def model_and_tokens():
    """`(name, config, float32 base, [rows, LENGTH] ids of made-up text)`."""
    text = "\n".join(f"{prompt} {answer}" for prompt, answer, _ in general.pairs(3000, 0))
    folder = Path(os.environ.get("MEDMOE_DATA", "")) / "tiny_lm_stories260K"
    if folder.is_dir():
        name, (config, base) = "stories260K", llama2c.load(folder / "stories260K.bin")
        ids = tokenizers.load(folder / "tok512.model").encode(text)
    else:
        name, config = "random, on bytes", RANDOM
        base, ids = decoder.init(config, jax.random.key(0)), list(text.encode())
    rows = len(ids) // LENGTH
    return name, config, base, np.array(ids[: rows * LENGTH], np.int32).reshape(rows, LENGTH)


def own_text(config: DecoderConfig, base) -> np.ndarray:
    """Rows `[8 ROWS, LENGTH]` drawn from a float32 decoder, each from the start mark on."""
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    engine = Engine(AdaptedConfig(config), base, {}, {}, mesh, batch=8 * ROWS)
    drawn = engine.generate([[1]] * 8 * ROWS, LENGTH - 1, (-1,), Sampling(temperature=1.0))
    return np.array([[1, *ids] for ids in drawn], np.int32)


def batch_of(tokens) -> dict:
    """Unpadded rows of one segment."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    ones = jnp.ones_like(positions)
    return {
        "tokens": tokens, "loss_mask": ones, "segment_ids": ones, "positions": positions
    }  # fmt: skip


def lora(config: DecoderConfig) -> BankSpec:
    """LoRA of rank 8 on every site of every layer."""
    return BankSpec("lora", tuple(site_shapes(config)), 0, config.n_layers, rank=8, alpha=16.0)


def losses(config: DecoderConfig, base, own, tokens, dtype) -> tuple[float, float]:
    """Nats a token: of `own` text, and of every fifth row of `tokens` after LoRA on the others."""
    spec = lora(config)
    model = AdaptedConfig(config, (spec,), Execution(dtype=dtype, remat="full"))
    objective, optimiser = Objective(model), optax.adamw(3e-3)
    held = np.arange(len(tokens)) % 5 == 0
    train, test = tokens[~held], tokens[held][: 8 * ROWS]
    trainable = {"banks": {"lora": bank.init(spec, config, jax.random.key(1))}, "base": {}}
    frozen = {"base": base, "banks": {}}
    step = jax.jit(functools.partial(train_step, objective, optimiser), donate_argnums=0)
    score = jax.jit(functools.partial(nll, model))

    def loss(trainable, rows) -> float:
        total, (weight, _) = score(trainable, frozen, batch_of(rows))[:2]
        return float(total / weight)

    before = loss(trainable, own)
    state = TrainState(jnp.int32(0), trainable, optimiser.init(trainable))
    order = np.random.default_rng(0)
    for _ in range(STEPS):
        state, _ = step(state, frozen, batch_of(order.choice(train, ROWS)))
    return before, loss(state.trainable, test)


def stored(base, name: str):
    """The base in one of FORMATS."""
    base = jax.tree.map(
        lambda x: x.astype(jnp.float32 if name == "float32" else jnp.bfloat16), base
    )
    return jax.jit(functools.partial(quantised.quantise, kind=FORMATS[name]))(base)


def loss_rows() -> tuple[str, list[dict]]:
    """The table of losses, as the decoder's name and one row a format."""
    model, config, base, tokens = model_and_tokens()
    own = own_text(config, base)
    rows = []
    for name in FORMATS:
        small = stored(base, name)
        dtype = jnp.float32 if name == "float32" else jnp.bfloat16
        before, after = losses(config, small, own, tokens, dtype)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(small["layers"]))
        weights = bank.count(small["layers"])
        row = {"base": name, "bits_a_weight": 8 * size / weights, "own": before, "adapted": after}
        rows.append(row)
        print(f"{name:9s}  {row['bits_a_weight']:13.2f}  {before:12.4f}  {after:16.4f}", flush=True)
    return model, rows


def memory_rows() -> list[dict]:
    """The table of memory, one row a format."""
    config, spec = preset("qwen2-1.5b"), lora(preset("qwen2-1.5b"))
    model = AdaptedConfig(
        config, (spec,), Execution(dtype=jnp.bfloat16, remat="full", attention="xla")
    )
    optimiser = optax.adamw(1e-3)
    step = functools.partial(train_step, Objective(model), optimiser)
    trainable = {"banks": {"lora": bank.abstract(spec, config)}, "base": {}}
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimiser.init, trainable)
    )
    ids = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    batch = dict.fromkeys(("tokens", "loss_mask", "segment_ids", "positions"), ids)
    rows, chip = [], describe("v5e:1x1")
    for name in list(FORMATS)[1:]:
        encode = functools.partial(quantised.quantise, kind=FORMATS[name])
        base = jax.eval_shape(encode, decoder.abstract(config, jnp.bfloat16))
        start = time.perf_counter()
        frozen = {"base": base, "banks": {}}
        compiled = compile_for(chip, jax.jit(step, donate_argnums=0), state, frozen, batch)
        memory = compiled.memory_analysis()
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
        row = {
            "base": name,
            "base_gb": size / 1e9,
            "arguments_gb": memory.argument_size_in_bytes / 1e9,
            "temporaries_gb": memory.temp_size_in_bytes / 1e9,
            "compile_seconds": time.perf_counter() - start,
        }
        rows.append(row)
        print(
            f"{name:9s}  {row['base_gb']:7.3f}  {row['arguments_gb']:12.3f}  "
            f"{row['temporaries_gb']:14.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Print both tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", action="store_true", help="the table of losses only")
    parser.add_argument("--output", type=local, default=RESULTS / "quantised.json")
    args = parser.parse_args()
    print("base       bits a weight  own text  adapted", flush=True)
    model, loss = loss_rows()
    results = {"decoder": model, "loss": loss}
    print(f"({model})")
    if not args.loss:
        print("\nbase       base GB  arguments GB  temporaries GB", flush=True)
        results["memory"] = memory_rows()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
