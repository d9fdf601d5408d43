"""How a decoder is run: number format, what is recomputed, kernels, and where arrays lie on a mesh.

Axes: B batch, T tokens, S keys, D model, K key/value heads, h head dimension, V vocabulary; P parts
of a batch, C tokens of a chunk, as in `base.chunks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medmoe_jax.errors import ParameterError
from medmoe_jax.mesh_axes import EXPERT, FSDP, SEQUENCE, TENSOR, WEIGHT_AXES

DTYPES = (jnp.float32, jnp.bfloat16, "float32", "bfloat16")
REMAT = ("none", "dots", "full")
ATTENTION = ("auto", "xla", "splash", "cudnn")
KERNELS = ("auto", "xla", "pallas", "interpret")


@dataclass(frozen=True)
class Execution:
    """How the same function is computed; none of it changes the result beyond rounding.

    Attributes:
      dtype: activations' and products' dtype (`float32` or `bfloat16`).
      remat: what the backward pass recomputes: `none`, everything but `dots`, or the `full` layer.
      unroll: layers a loop iteration holds.
      attention: `splash` (TPU only), `cudnn` (NVIDIA GPUs only), `xla`, or `auto`, the first that
        the devices and the decoder allow.
      kernels: what runs routing, experts and attention over a cache: `pallas` (TPU only), `xla`,
        `interpret` (the Pallas kernels on a processor, for tests), or `auto`.
      activations: sharding of `[B, T, D]` arrays, or None to leave it to the compiler.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"
    kernels: str = "auto"
    activations: NamedSharding | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ParameterError(f"dtype: {self.dtype} is none of float32, bfloat16")
        if self.remat not in REMAT:
            raise ParameterError(f"remat: '{self.remat}' is none of {', '.join(REMAT)}")
        if self.attention not in ATTENTION:
            raise ParameterError(f"attention: '{self.attention}' is none of {', '.join(ATTENTION)}")
        if self.kernels not in KERNELS:
            raise ParameterError(f"kernels: '{self.kernels}' is none of {', '.join(KERNELS)}")
        if self.kernels == "pallas" and self.platform != "tpu":
            raise ParameterError(
                f"kernels: 'pallas' needs TPUs, these devices are {self.platform}; use 'auto'"
            )

    @property
    def mesh(self) -> Mesh | None:
        """The devices, or None for the default one."""
        if self.activations is None:
            return None
        if not isinstance(self.activations.mesh, Mesh):
            raise TypeError("activations: their mesh names no devices")
        return self.activations.mesh

    @property
    def device(self) -> jax.Device:
        """One of the devices that programs are compiled for, which need not be there."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.mesh.size if self.mesh else 1

    @property
    def platform(self) -> str:
        """What programs are compiled for, such as `tpu` or `cpu`."""
        return self.device.platform

    @property
    def backend(self) -> str:
        """What the kernels run by: `xla`, `pallas` or `interpret`."""
        if self.kernels != "auto":
            return self.kernels
        return "pallas" if self.platform == "tpu" else "xla"

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rows of a batch are cut over."""
        axes = None if self.activations is None else self.activations.spec[0]
        return (axes,) if isinstance(axes, str) else tuple(axes or ())

    @property
    def row_shards(self) -> int:
        """The number of devices that the rows of a batch are spread over."""
        if self.activations is None:
            return 1
        rows = self.activations.shard_shape((self.activations.num_devices,) * 3)[0]
        return self.activations.num_devices // rows

    def size(self, axis: str | None) -> int:
        """The number of devices along a mesh axis; 1 where there is no such axis."""
        return self.mesh.shape.get(axis, 1) if self.mesh else 1

    def sequence_axis(self, tokens: int) -> str | None:
        """The mesh axis that the tokens of a row are cut over, where it divides them."""
        axis = None if self.activations is None else self.activations.spec[1]
        return axis if axis and tokens % self.size(axis) == 0 else None

    def tensor_axis(self, width: int) -> str | None:
        """The mesh axis that a dimension of that width is cut over, as the sharding rules do."""
        devices = self.size(TENSOR)
        return TENSOR if devices > 1 and width % devices == 0 else None

    def local_tokens(self, rows: int, tokens: int) -> int:
        """The number of tokens on one device, of a batch of `rows` rows of `tokens` tokens."""
        return rows * tokens // self.row_shards // self.size(self.sequence_axis(tokens))

    def spec(self, tokens: int, *rest: str | None) -> PartitionSpec:
        """The mesh axes of a `[B, T, ...]` array; `rest` are those of the dimensions after T."""
        return PartitionSpec(self.row_axes, self.sequence_axis(tokens), *rest)

    def per_device(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """A function that runs `function` on every device's share of its arguments.

        The compiler cannot cut up a kernel, and would sort across devices what each can sort by
        itself. Where there is no mesh it is `function` itself.

        Args:
          function: takes arrays; what it sums over devices, it sums itself.
          inputs, outputs: a `PartitionSpec` for each argument and result.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def constrain(self, x_BxTxD: jax.Array) -> jax.Array:
        """Pin an activation to its sharding; tokens that the mesh does not divide stay together."""
        if self.mesh is None:
            return x_BxTxD
        sharding = NamedSharding(self.mesh, self.spec(x_BxTxD.shape[1], None))
        return jax.lax.with_sharding_constraint(x_BxTxD, sharding)

    @property
    def gathers_weights(self) -> bool:
        """Whether a weight lies in parts on several devices, each of which needs all of it."""
        return any(self.size(axis) > 1 for axis in WEIGHT_AXES)

    def weights_at_rest(self) -> Execution:
        """The same for few tokens: each is on all devices that hold a part of a weight.

        The compiler cuts such products as the weights are cut, and adds up what the parts give.
        """
        if self.mesh is None:
            return self
        rows = tuple(axis for axis in self.row_axes if axis not in WEIGHT_AXES)
        spread = NamedSharding(self.mesh, PartitionSpec(rows, None, None))
        return replace(self, activations=spread, kernels="xla")

    def constrain_rows(self, x_BxTxD: jax.Array) -> jax.Array:
        """Pin where the rows of an activation lie, and leave the rest to the compiler."""
        if self.mesh is None:
            return x_BxTxD
        free = PartitionSpec.UNCONSTRAINED
        sharding = NamedSharding(self.mesh, PartitionSpec(self.row_axes, None, free))
        return jax.lax.with_sharding_constraint(x_BxTxD, sharding)

    def gather_tokens(self, x_BxSxKxh: jax.Array) -> jax.Array:
        """Keys or values of whole rows, on every device that has queries of the row."""
        if self.mesh is None or not self.sequence_axis(x_BxSxKxh.shape[1]):
            return x_BxSxKxh
        free = PartitionSpec.UNCONSTRAINED
        sharding = NamedSharding(self.mesh, PartitionSpec(self.row_axes, None, free, None))
        return jax.lax.with_sharding_constraint(x_BxSxKxh, sharding)

    def logits_sharding(self, vocabulary: int, parts: tuple[str, ...] = ()) -> NamedSharding | None:
        """The sharding of `[P, C, V]` logits: V over the mesh axes that the head lies on.

        An axis is left out where they do not divide V. Tokens then travel to the head's parts,
        which weigh many times more than a chunk's tokens.

        Args:
          vocabulary: V.
          parts: the axes that P lies on; those that cut V do not cut P.
        """
        if self.mesh is None:
            return None
        cut = [axis for axis in (TENSOR, FSDP, EXPERT, SEQUENCE) if axis in self.mesh.shape]
        while vocabulary % math.prod(self.size(axis) for axis in cut):
            cut.pop()
        left = tuple(axis for axis in parts if axis not in cut)
        return NamedSharding(self.mesh, PartitionSpec(left, None, tuple(cut)))
