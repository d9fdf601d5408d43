"""Functions that see one device's share of the arrays.

Axes: B batch, T tokens.
The compiler cannot cut up a kernel, and would sort across devices what each can sort by itself. So
both run on the tokens that a device has, and on the mesh axis `tensor` on its part of what is wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from medmoe_jax.base.decoder import Execution


def rows(execution: Execution) -> tuple[str, ...]:
    """The mesh axes that a batch's rows are cut over."""
    axes = None if execution.activations is None else execution.activations.spec[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def tokens(execution: Execution, length: int, width: str | None = None) -> PartitionSpec:
    """The mesh axes of a `[B, T, ...]` array whose last dimension `width` cuts, if anything."""
    return PartitionSpec(rows(execution), execution.sequence(length), width)


def tensor(execution: Execution, size: int) -> str | None:
    """The mesh axis that a dimension of that size is cut over, as the sharding rules have it."""
    devices = execution.mesh.shape.get("tensor", 1) if execution.mesh else 1
    return "tensor" if devices > 1 and size % devices == 0 else None


def local(execution: Execution, function: Callable, inputs: Any, outputs: Any) -> Callable:
    """`function` of every device's share of its arguments; as it is where there is no mesh.

    Args:
      execution: the mesh.
      function: of arrays; what it sums over devices, it sums itself.
      inputs, outputs: a `PartitionSpec` for each argument and result.
    """
    if execution.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=execution.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def spec(*axes) -> PartitionSpec:
    """The mesh axes of an array's dimensions; those left off are whole."""
    return PartitionSpec(*axes)
