"""This project's training step on a base from disk: the recipes as shipped, through the library.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.peer_task import DTYPES, LORA, MEDCARE, MING, ROWS, TOKENS, Contender, batch
from configs import medcare, ming_moe
from medmoe_jax.adapters.bank import count
from medmoe_jax.training import config as config_lib
from medmoe_jax.training.placement import Placement
from medmoe_jax.training.preparing import prepare
from medmoe_jax.training.recomputation import compile_step
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup

STEPS = 1000  # of the learning rate's schedule


def plain_lora() -> ConfigDict:
    """A recipe of LoRA of rank 16 on every linear layer, without dropout."""
    config = config_lib.recipe()
    config.data.sources.rows = config_lib.source("")  # never read
    banks = {"lora": config_lib.bank(sites=("attn.*", "mlp.*"))}
    config.stages.order = ("tune",)
    config.stages.tune = config_lib.stage(banks=banks, mixture={"rows": 1.0})
    return config


RECIPES = {LORA: plain_lora, MING: ming_moe.get_config, MEDCARE: medcare.get_config}


def recipe_on(recipe: str, gguf: Path, device: str) -> ConfigDict:
    """The recipe on a base and a batch of the comparison; the rest is as shipped."""
    config = RECIPES[recipe]()
    config.base.path, config.base.dtype = str(gguf), DTYPES[device]
    config.data.length, config.data.global_batch, config.data.shards = TOKENS, ROWS, ROWS
    config.run.accumulation = 1
    return config


def host_batch(vocabulary: int) -> dict:
    """The batch of the comparison as a stream of the library gives it, int32 `[B, T]` each."""
    ids_BxT, target_BxT = batch(vocabulary)
    position_BxT = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ids_BxT.shape)
    ones_BxT = np.ones_like(ids_BxT)
    return {
        "tokens": ids_BxT,
        "loss_mask": target_BxT,
        "segment_ids": ones_BxT,
        "positions": position_BxT,
    }


def make(who: str, recipe: str, gguf: Path, device: str) -> Contender:
    """The first stage of a recipe before its first step."""
    setup = open_setup(recipe_on(recipe, gguf, device))
    with tempfile.TemporaryDirectory() as workdir:
        stage = Run(setup, workdir).stages[0]
        prepared, state = prepare(stage, STEPS)
    placed = Placement(setup.mesh, ROWS, ROWS)(host_batch(setup.base.config.vocab_size))
    compiled = functools.cache(lambda: compile_step(prepared, states[0], "").function)
    states, trained = [state], count(state.trainable)

    def step() -> float:
        states[0], metrics = compiled()(states[0], prepared.frozen, placed)
        return float(jax.block_until_ready((states[0], metrics))[1]["loss"])

    return Contender(step, trained, *device_memory(device))


def device_memory(device: str) -> tuple:
    """The last two fields of a Contender, for JAX's device."""
    if device == "cpu":
        return "", None
    one = jax.devices()[0]
    return one.device_kind, lambda: one.memory_stats()["peak_bytes_in_use"]
