"""The same steps compiled for TPU slices that are not there, and what our counter says of them.

Axes: B rows, T tokens, D model.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from benchmarks import variants
from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from medmoe_jax.parallel.rules import RULES, placed, shardings, state_shardings
from medmoe_jax.parallel.topology import compile_for, describe
from medmoe_jax.planning import hlo
from medmoe_jax.training.step import Objective

ROWS, TOKENS = 8, 2048


def compile_step(
    topology: str, config: DecoderConfig, specs, remat: str = "full", dispatch: str = "stacked"
) -> jax.stages.Compiled:
    """A step on a bfloat16 base over all chips of a slice (FSDP).

    Args:
      topology: such as `v5e:2x4`.
      config: the decoder.
      specs: banks; none gives the frozen step.
      remat, dispatch: see `configs`.
    """
    slice_ = describe(topology)
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}, slice_.devices)
    execution = Execution(dtype=jnp.bfloat16, remat=remat, activations=batch_sharding(mesh, 3))
    abstract = decoder.abstract(config, jnp.bfloat16)
    base = placed(abstract, shardings(abstract, mesh, RULES))
    ids = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "loss_mask", "segment_ids", "positions"), ids)
    if not specs:
        shape = (ROWS, TOKENS, config.d_model)
        grad = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh, 3))
        run = functools.partial(variants.frozen_step, config, execution)
        return compile_for(slice_, jax.jit(run, donate_argnums=0), grad, base, batch)
    trainable = {"banks": {s.name: bank_lib.abstract(s, config) for s in specs}, "base": {}}
    state = jax.eval_shape(variants.start_state, trainable)
    state = state._replace(
        step=placed(state.step, replicated(mesh)),
        trainable=placed(trainable, shardings(trainable, mesh, RULES)),
        optimiser=placed(state.optimiser, state_shardings(state.optimiser, mesh, RULES)),
    )
    objective = Objective(AdaptedConfig(config, specs, execution, dispatch), specs=specs)
    run = jax.jit(functools.partial(variants.adapted_step, objective), donate_argnums=0)
    return compile_for(slice_, run, state, {"base": base, "banks": {}}, batch)


def figures(compiled: jax.stages.Compiled) -> dict[str, float]:
    """A chip's FLOPs, bytes, collective bytes and temporaries of one step."""
    counts = hlo.count(compiled.as_text())
    return {
        "flops": counts.flops,
        "bytes": counts.bytes,
        "collective_bytes": sum(c.bytes for c in counts.collectives.values()),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
