"""The device mesh: axes `data`, `fsdp`, `expert`, `sequence`, `tensor`.

Several TPU slices make one mesh: `data` goes over them first, because what it exchanges, the
gradients of the trainable tree, is little enough for the network between slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medmoe_jax.errors import ParameterError
from medmoe_jax.mesh_axes import AXES, BATCH_AXES, SEQUENCE
from medmoe_jax.parallel.releases import check_plugins


def resolve(sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Axis sizes with at most one -1 filled in; axes that are not named have size 1.

    Raises:
      ParameterError: an unknown axis, a size below 1, two -1, or a product other than `n_devices`.
    """
    if set(sizes) - set(AXES):
        raise ParameterError(f"mesh: axes are {', '.join(AXES)}; got {', '.join(sizes)}")
    out = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, size in out.items() if size == -1]
    if any(size < 1 and size != -1 for size in out.values()) or len(free) > 1:
        raise ParameterError(f"mesh: {out}: sizes are positive, and at most one is -1")
    fixed = math.prod(size for size in out.values() if size != -1)
    if free and n_devices % fixed == 0:
        out[free[0]] = n_devices // fixed
    if math.prod(out.values()) != n_devices:
        raise ParameterError(f"mesh: {out} does not cover the {n_devices} devices there are")
    return out


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given).

    Raises:
      ParameterError: the sizes do not fit the devices (see `resolve`) or their slices.
      UserError: a plugin of jax does not fit it (`releases.check_plugins`).
    """
    if devices is None:
        check_plugins()
    devices = list(devices if devices is not None else jax.devices())
    shape = tuple(resolve(sizes, len(devices)).values())
    arrange = _along_links if devices[0].platform == "tpu" else _in_order
    return Mesh(arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: jax.Device) -> int:
    """The number of a device's slice; one that knows of no slices is in slice 0."""
    return getattr(device, "slice_index", 0)


def _in_order(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    return np.array(devices).reshape(shape)


def _along_links(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPUs in a shape whose axes follow the links between chips; only its first leaves a slice."""
    slices = len(set(map(slice_of, devices)))
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ParameterError(
            f"mesh.data: {shape[0]} is no multiple of the {slices} slices; every other axis "
            f"stays within a slice, so give data {slices} or a multiple of it"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, *(1,) * (len(shape) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


def check_divides(mesh: Mesh | None, axis: str, number: int, what: str) -> None:
    """Raise ParameterError unless a mesh axis divides a number of things that it cuts.

    Args:
      mesh: None, or one without the axis, cuts nothing.
      axis: its name.
      number, what: for the message, such as 40 and "attention heads".
    """
    size = mesh.shape.get(axis, 1) if mesh else 1
    if number % size:
        raise ParameterError(f"mesh.{axis}: {size} does not divide the {number} {what}")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def on_processors(mesh: Mesh) -> bool:
    """Whether its devices are processors, not TPUs or GPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """The sharding of `[B, T, ...]` or `[B]` arrays.

    Rows lie over data, fsdp and expert, their tokens over sequence.
    """
    return NamedSharding(mesh, PartitionSpec(*(BATCH_AXES, SEQUENCE, *(None,) * rank)[:rank]))


def row_sharding(mesh: Mesh, rank: int, axis: int = 0) -> NamedSharding:
    """The sharding of an array of that rank whose axis `axis` are rows, all else whole."""
    return NamedSharding(
        mesh, PartitionSpec(*(None,) * axis, BATCH_AXES, *(None,) * (rank - axis - 1))
    )


def batch_shards(mesh: Mesh) -> int:
    """The number of devices that a batch's rows are spread over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def round_up_rows(mesh: Mesh, rows: int) -> int:
    """The least number of rows, `rows` or more, that every device has a like share of."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def put(array: np.ndarray, sharding: NamedSharding, rows: np.ndarray | None = None) -> jax.Array:
    """An array of the host's memory on the mesh; with several processes all of them call this.

    Args:
      array: the whole array, or those of its rows that this process's devices hold.
      sharding: where it goes.
      rows: `[B]`, the place in `array` of each row of the result; None = the same place.
    """

    def values(part):
        return array[part] if rows is None else array[(rows[part[0]], *part[1:])]

    shape = array.shape if rows is None else (len(rows), *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, values)
