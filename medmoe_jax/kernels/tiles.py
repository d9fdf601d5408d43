"""How the matrix kernels cut arrays into blocks, and what they tell the TPU compiler.

A kernel holds two copies of every block (one computes, one travels) and its accumulators, all at
once, in VMEM: 64 MiB on a core of v5p or v7x, 128 MiB on v5e and v6e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from medmoe_jax.errors import UserError

LANES = 128
FLOATS = (jnp.float32, jnp.bfloat16)  # what kernels take
BACKENDS = ("xla", "pallas", "interpret")

Size = TypeVar("Size", int, jax.Array)


class Tiles(NamedTuple):
    """Block sizes of rows, contracted width and output width."""

    m: int
    k: int
    n: int


class KernelMemory(NamedTuple):
    """What a kernel may take of a device.

    Attributes:
      cores: how many share its blocks of rows, each with a VMEM of its own.
      limit: bytes of VMEM that it has at most; beside it the compiler keeps arrays there.
      blocks: the part of them for blocks and accumulators; the rest holds the values that it
        computes with.
    """

    cores: int
    limit: int
    blocks: int


def kernel_memory(cores: int, vmem_mib: int) -> KernelMemory:
    """The memory on a device of so many cores with so many MiB of VMEM each.

    A kernel leaves the compiler a quarter, and half of 128 MiB: the arrays that it keeps there from
    one kernel to the next save more traffic than larger blocks do.
    """
    limit = min(vmem_mib * 3 // 4, 64) * 2**20
    return KernelMemory(cores, limit, limit * 7 // 12)


# Of two cores with 64 MiB each, as v5p has: it suits every chip.
SMALLEST = kernel_memory(2, 64)


def check_backend(backend: str) -> None:
    """Raise UserError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise UserError(f"kernel backend '{backend}' is none of {', '.join(BACKENDS)}")


def check_floats(**arrays: jax.Array) -> None:
    """Raise UserError, naming the array, unless each is float32 or bfloat16 and not empty."""
    for name, array in arrays.items():
        if array.dtype not in FLOATS:
            raise UserError(f"{name} is {array.dtype}; kernels take float32 and bfloat16")
        if 0 in array.shape:
            raise UserError(f"{name} has shape {array.shape}; every dimension must be at least 1")


def tile_of(width: int, limit: int, step: int = LANES) -> int:
    """The block of a dimension: all of it, or about equal multiples of step, none over `limit`."""
    limit = max(limit // step * step, step)
    if width <= limit:
        return width
    share = ceil_div(width, ceil_div(width, limit))
    return ceil_div(share, step) * step


def ceil_div(dividend: Size, divisor: int) -> Size:
    """Quotient rounded up: how many blocks cover a dimension."""
    return -(-dividend // divisor)


def fitting(
    candidates: Sequence[Tiles], vmem: Callable[[Tiles], int], memory: KernelMemory
) -> list[Tiles]:
    """The candidates whose blocks, of `vmem(candidate)` bytes, fit VMEM."""
    return [tiles for tiles in candidates if vmem(tiles) <= memory.blocks]


def cheapest(
    what: str,
    candidates: Sequence[Tiles],
    vmem: Callable[[Tiles], int],
    traffic: Callable[[Tiles], int],
    memory: KernelMemory,
) -> Tiles:
    """The candidate of least HBM traffic among those whose blocks fit VMEM; of equals, the first.

    Args:
      what: the kernel and its shapes, for the error.
      candidates: block sizes.
      vmem, traffic: functions of a candidate, in bytes.
      memory: what the device has.

    Raises:
      UserError: none fits.
    """
    possible = fitting(candidates, vmem, memory)
    if not possible:
        raise UserError(
            f"no blocks of {what} fit {memory.blocks // 2**20} MiB of VMEM; use the backend 'xla'"
        )
    return min(possible, key=traffic)


def keep(block: jax.Array, axis: int, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    """Zero a block outside `low <= index < high` along `axis`.

    By selection, not by a product with 0: what lies outside an array may be NaN.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where((index >= low) & (index < high), block, jnp.zeros_like(block))


def options(
    backend: str,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    limit: int = SMALLEST.limit,
) -> dict[str, Any]:
    """Arguments of `pallas_call` that every matrix kernel shares.

    Args:
      backend: "pallas" or "interpret".
      semantics: "parallel" or "arbitrary" for each grid dimension.
      limit: bytes of VMEM that the kernel may take.
    """
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=limit
        ),
        "interpret": pltpu.InterpretParams() if backend == "interpret" else False,
    }
