"""The memory that the keys and values of rows take, and whether it is there."""

from __future__ import annotations

import os

import jax
import numpy as np

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.room import limit_of


def cache_bytes(config: AdaptedConfig, rows: int, slots: int) -> int:
    """Bytes of the keys and values of `rows` rows of `slots` tokens, over all devices."""
    d = config.decoder
    itemsize = np.dtype(config.execution.dtype).itemsize
    return 2 * d.n_layers * rows * slots * d.kv_width * itemsize


def check_room(config: AdaptedConfig, rows: int, slots: int) -> None:
    """Raise UserError where so many rows and slots are more than the devices have memory.

    A device that does not tell its memory has that of the machine, shared with its neighbours.
    """
    execution = config.execution
    # A process can ask its own devices alone.
    own = jax.local_devices() if execution.mesh is None else execution.mesh.local_devices
    there, whose = limit_of(own[0]), "a device"
    needed = cache_bytes(config, rows, slots)
    if there is not None:
        heads = execution.size(execution.tensor_axis(config.decoder.n_kv_heads))
        needed //= execution.row_shards * heads
    else:
        there, whose = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine"
    if needed > there:
        raise UserError(
            f"keys and values of {rows} rows of {slots} tokens take {needed / 2**30:.1f} GiB, and "
            f"{whose} has {there / 2**30:.1f}; lower run.score_batch, or ask for fewer tokens"
        )
