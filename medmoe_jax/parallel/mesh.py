"""The device mesh: axes `data`, `fsdp`, `expert`, `tensor`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medmoe_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def resolve(sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Axis sizes with at most one -1 filled in.

    Raises:
      UserError: an unknown axis, a size below 1, two -1, or a product other than `n_devices`.
    """
    if set(sizes) != set(AXES):
        raise UserError(f"run.mesh: axes are {', '.join(AXES)}; got {', '.join(sizes)}")
    out = {axis: int(sizes[axis]) for axis in AXES}
    free = [axis for axis, size in out.items() if size == -1]
    if any(size < 1 and size != -1 for size in out.values()) or len(free) > 1:
        raise UserError(f"run.mesh: {out}: sizes are positive, and at most one is -1")
    fixed = math.prod(size for size in out.values() if size != -1)
    if free and n_devices % fixed == 0:
        out[free[0]] = n_devices // fixed
    if math.prod(out.values()) != n_devices:
        raise UserError(f"run.mesh: {out} does not cover the {n_devices} devices there are")
    return out


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given); see `resolve` for the sizes."""
    devices = list(devices if devices is not None else jax.devices())
    shape = tuple(resolve(sizes, len(devices)).values())
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu":
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """The sharding of `[B, ...]` arrays: rows over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(None,) * (rank - 1)))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch's rows are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
