"""TPU slices that are not there: their chips, and compiling for them with the `libtpu` wheel alone.

`describe("v5e:4x4")` gives sixteen devices that hold no data and run nothing, but that shardings
may name, so that a whole training step compiles on a machine without a TPU and tells its memory,
FLOPs and collectives.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import slices
from medmoe_jax.parallel.releases import check_libtpu


class Chip(NamedTuple):
    """Public figures of what a JAX device is: one chip, and half of one on v7x.

    Attributes:
      kind: what `jax.Device.device_kind` says.
      libtpu: what the compiler calls it.
      devices: JAX devices of one chip.
      cores: TensorCores of one device.
      vmem_mib: on-chip vector memory that one kernel can address, MiB (v5p: of one of two cores).
      columns: a product with fewer columns fills no matrix unit.
      hbm_gib: GiB that it has.
      limit_gib: GiB that the compiler gives a program.
      bf16_tflops: peak, 1e12 bf16 operations a second.
      hbm_gb_s: 1e9 bytes a second.
      ici_gb_s: over all links of the chip, both directions added, 1e9 bytes a second.
      dcn_gb_s: over the network between slices, a chip's share of its host's, 1e9 bytes a second.
    """

    kind: str
    libtpu: str
    devices: int
    cores: int
    vmem_mib: int
    columns: int
    hbm_gib: int
    limit_gib: float
    bf16_tflops: float
    hbm_gb_s: int
    ici_gb_s: int
    dcn_gb_s: float


# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; the limits are what libtpu names when it refuses.
# A chip of v7x (Ironwood) is two chiplets, which JAX presents as two devices. It has 192 GiB,
# 2,307 TFLOP/s in bf16 (4,614 in fp8, which nothing here uses), 7,380 GB/s and 1,200 GB/s of links,
# half of it each; vector memory from docs.jax.dev/en/latest/pallas/tpu/hardware.html.
# v4, whose cores have 16 MiB of that, less than the kernels take, is not counted.
CHIPS = {
    "v5e": Chip("TPU v5 lite", "v5e", 1, 1, 128, 128, 16, 15.75, 197, 819, 400, 3.125),
    "v5p": Chip("TPU v5", "v5p", 1, 2, 64, 128, 95, 95.74, 459, 2765, 1200, 6.25),
    "v6e": Chip("TPU v6 lite", "v6e", 1, 1, 128, 256, 32, 31.25, 918, 1638, 800, 12.5),
    "v7x": Chip("TPU7x", "tpu7x", 2, 1, 64, 256, 96, 94.75, 1153.5, 3690, 600, 6.25),
}

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

    @property
    def chips(self) -> int:
        """How many chips there are."""
        return len(self.devices) // self.chip.devices


def describe(name: str) -> Topology:
    """The slice of a name (see `slices`), such as `v5e:4x4`, `v5p-16` or `2xv5e:4x4`.

    Raises:
      UserError: an unknown name (the message has the closest), a chip without figures, or no
        `libtpu` wheel that knows it and fits jax.
    """
    one = slices.parse(name)
    if one.chip not in CHIPS:
        raise UserError(f"no figures of {one.chip} are known, only of {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name} needs the libtpu wheel: pip install 'medmoe_jax[aot]'"
        )
    check_libtpu()
    for variable, value in _NO_HOST.items():
        os.environ.setdefault(variable, value)
    # A host has 2x2 chips, unless it is told to have one.
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if one.chips == 1 else {}
    if one.count > 1:
        options["num_slices"] = one.count
    chip = CHIPS[one.chip]
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.libtpu}:{one.layout}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        version = importlib.metadata.version("libtpu")
        raise UserError(
            f"{one.name} cannot be compiled for: libtpu {version} does not know it ({error}); a "
            "newer one may: pip install --upgrade libtpu"
        ) from None
    return Topology(one.name, chip, tuple(described.devices))


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
