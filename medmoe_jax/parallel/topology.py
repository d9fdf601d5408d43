"""TPU slices that are not there: their chips, and compiling for them with the `libtpu` wheel alone.

`describe("v5e:4x4")` gives sixteen devices that hold no data and run nothing, but that shardings
may name, so that a whole training step compiles on a machine without a TPU and tells its memory,
FLOPs and collectives.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from medmoe_jax.errors import UserError


class Chip(NamedTuple):
    """Public figures of one chip (cloud.google.com/tpu/docs), the unit that a JAX device is.

    Attributes:
      kind: what `jax.Device.device_kind` says.
      vmem_mib: on-chip vector memory that one kernel can address, MiB (v5p: of one of two cores).
      hbm_gib: GiB.
      bf16_tflops: peak, 1e12 bf16 operations a second.
      hbm_gb_s: 1e9 bytes a second.
      ici_gb_s: over all links of the chip, both directions added, 1e9 bytes a second.
      dcn_gb_s: over the network between slices, a chip's share of its host's, 1e9 bytes a second.
    """

    kind: str
    vmem_mib: int
    hbm_gib: int
    bf16_tflops: int
    hbm_gb_s: int
    ici_gb_s: int
    dcn_gb_s: float


CHIPS = {
    "v5e": Chip("TPU v5 lite", 128, 16, 197, 819, 400, 3.125),
    "v5p": Chip("TPU v5", 64, 95, 459, 2765, 1200, 6.25),
    "v6e": Chip("TPU v6 lite", 128, 32, 918, 1638, 800, 12.5),
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LAYOUTS = {"v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}

# What libtpu asks a TPU host about itself, answered for a machine that is none; read at its load.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """One or more slices: the name, the kind of chip and the devices, for `mesh.make_mesh`."""

    name: str
    chip: Chip
    devices: tuple


def describe(name: str) -> Topology:
    """The slice called `CHIP:LAYOUT`, such as `v5e:4x4` or `v5p:2x2x1`; two of them: `2xv5e:4x4`.

    Raises:
      UserError: an unknown name (the message lists the known ones), or no `libtpu` wheel.
    """
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?([^:]*):?(.*)", name)
    several, chip, layout = parts.groups() if parts else (None, "", "")
    if layout not in LAYOUTS.get(chip, ()):
        known = "; ".join(f"{chip}:{{{','.join(names)}}}" for chip, names in LAYOUTS.items())
        raise UserError(
            f"topology '{name}' is not known; give one of {known}, with Nx before it for N slices"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name} needs the libtpu wheel: pip install 'medmoe_jax[aot]'"
        )
    for variable, value in _NO_HOST.items():
        os.environ.setdefault(variable, value)
    # A host has 2x2 chips, unless it is told to have one.
    one_chip = not set(layout) - {"1", "x"}
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if one_chip else {}
    if several:
        options["num_slices"] = int(several)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{layout}", **options
    )
    return Topology(name, CHIPS[chip], tuple(described.devices))


def compile_for(
    topology: Topology, function: Callable, *args: Any, **kwargs: Any
) -> jax.stages.Compiled:
    """Compile `function` for the slice, without running anything.

    Args:
      topology: from `describe`.
      function: a function, or a jitted one (its donated and static arguments are kept).
      *args, **kwargs: trees of `ShapeDtypeStruct`; those without a sharding lie on the first
        chip, and if any has one, all need one.

    Returns:
      The compiled program: `memory_analysis()`, `cost_analysis()`, `as_text()`.
    """

    def placed(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
            return leaf
        return leaf.update(sharding=SingleDeviceSharding(topology.devices[0]))

    args, kwargs = jax.tree.map(placed, (args, kwargs))
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=("tpu",)).compile()
