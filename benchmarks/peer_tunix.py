"""google-tunix's trainer of LoRA, by qwix, on a base from disk, on the weights that we read.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from benchmarks.peer_ours import device_memory
from benchmarks.peer_task import DTYPES, ROWS, TOKENS, Contender, batch
from benchmarks.tunix_peer import make_model
from medmoe_jax.adapters.bank import count
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.parallel.mesh import make_mesh, replicated

SITES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def make(who: str, recipe: str, gguf: Path, device: str) -> Contender:
    """tunix's `PeftTrainer` before its first step, with clipping and AdamW as here."""
    found, dtype = open_base(str(gguf), "", {}, 0), jnp.dtype(DTYPES[device])
    one = replicated(make_mesh({}, jax.devices()[:1]))
    shardings = jax.tree.map(lambda _: one, found.abstract(dtype))
    model = make_model(found.config, found.load(dtype, shardings), dtype)
    provider = qwix.LoraProvider(module_path=SITES, rank=16, alpha=32.0)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0.0))
    trainer = PeftTrainer(model, optimiser, TrainingConfig(eval_every_n_steps=1))
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    inputs = jax.device_put(inputs_of(found.config.vocab_size))

    def step() -> float:
        out = jax.block_until_ready(train_step(inputs))
        jax.block_until_ready(nnx.state(trainer.optimizer))
        return float(out[0])

    trained = count(nnx.state(model, nnx.LoRAParam))
    return Contender(step, trained, *device_memory(device))


def inputs_of(vocabulary: int) -> dict:
    """What the trainer's own loss takes."""
    ids_BxT, target_BxT = batch(vocabulary)
    causal_TxT = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    return {
        "input_tokens": ids_BxT,
        "input_mask": target_BxT,
        "positions": jnp.broadcast_to(jnp.arange(TOKENS), ids_BxT.shape),
        "attention_mask": jnp.broadcast_to(causal_TxT, (ROWS, TOKENS, TOKENS)),
    }
