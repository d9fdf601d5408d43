"""The steps that are compared: one decoder, one batch, several trainable trees.

Axes: B rows, T tokens, V vocabulary, D model.
A variant is `run(carry, frozen, batch) -> (carry, loss)`: jitted, its carry donated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs import medcare
from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.planning.frozen import frozen_loss
from medmoe_jax.training import config as config_lib
from medmoe_jax.training.recipe import bank_spec
from medmoe_jax.training.step import Objective, TrainState, train_step

DECODER = DecoderConfig(
    vocab_size=8192,
    d_model=896,
    n_layers=8,
    n_heads=14,
    n_kv_heads=2,
    head_dim=64,
    d_ff=4864,
    qkv_bias=True,
    tied=True,
    rope_theta=1e6,
)
BATCH, TOKENS = 4, 256
DECODE_ROWS, PROMPT, NEW = (1, 8), 64, 64  # of decode.py


class Variant(NamedTuple):
    """A step and what it starts from.

    Attributes:
      run: `(carry, frozen, batch) -> (carry, loss)`, jitted, the carry donated.
      carry: what a step changes.
      frozen: what it only reads.
    """

    run: Callable
    carry: Any
    frozen: Any


def plain_lora(config: DecoderConfig) -> tuple[BankSpec, ...]:
    """LoRA of rank 16 on every linear layer."""
    return (bank_spec("lora", config_lib.bank(sites=("attn.*", "mlp.*")), config),)


def shipped_stage_1(config: DecoderConfig) -> tuple[BankSpec, ...]:
    """The banks of configs/medcare.py's first stage, dropout included."""
    return tuple(bank_spec(n, b, config) for n, b in medcare.aggregate().banks.items())


def medcare_stage_1(config: DecoderConfig) -> tuple[BankSpec, ...]:
    """The same without dropout."""
    return tuple(spec.replace(dropout=0.0) for spec in shipped_stage_1(config))


def make_batch(config: DecoderConfig, rows: int = BATCH, tokens: int = TOKENS):
    """Random ids, every row one segment, every token a target."""
    shape = (rows, tokens)
    ids = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(tokens)[None], shape)
    ones = jnp.ones(shape, jnp.int32)
    return {"tokens": ids, "loss_mask": ones, "segment_ids": ones, "positions": positions}


def frozen_step(config: DecoderConfig, execution: Execution, grad_BxTxD, base, batch):
    """Forward, loss and gradient to the input embeddings: `(gradient, loss)`."""
    x_BxTxD = base["embed"][batch["tokens"]].astype(grad_BxTxD.dtype)
    loss = functools.partial(frozen_loss, config, execution)
    value, grad_BxTxD = jax.value_and_grad(loss)(x_BxTxD, base, batch)
    return grad_BxTxD, value


def frozen_variant(config: DecoderConfig, execution: Execution, base, shape) -> Variant:
    """The bare base's step on batches of a shape `(B, T)`; the carry is the gradient's buffer."""
    run = jax.jit(functools.partial(frozen_step, config, execution), donate_argnums=0)
    return Variant(run, jnp.zeros((*shape, config.d_model), execution.dtype), base)


def adapted_variant(
    config: DecoderConfig, execution: Execution, base, specs, dispatch: str = "stacked"
) -> Variant:
    """The whole training step on banks of random values."""
    objective = Objective(AdaptedConfig(config, specs, execution, dispatch), specs=specs)
    run = jax.jit(functools.partial(adapted_step, objective), donate_argnums=0)
    state = start_state({"banks": random_banks(specs, config), "base": {}})
    return Variant(run, state, {"base": base, "banks": {}})


def start_state(trainable) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), trainable, _optimiser().init(trainable))


def adapted_step(objective: Objective, state: TrainState, frozen, batch):
    """The library's training step with clipping and AdamW: `(state, loss)`."""
    state, metrics = train_step(objective, _optimiser(), state, frozen, batch)
    return state, metrics["loss"]


def _optimiser() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0.0))


def random_banks(specs, config: DecoderConfig, seed: int = 2):
    """Banks as initialised, but with B away from zero."""
    key = jax.random.key(seed)

    def off_zero(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return 0.02 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)

    banks = {spec.name: bank_lib.init(spec, config, key) for spec in specs}
    return jax.tree_util.tree_map_with_path(off_zero, banks)
