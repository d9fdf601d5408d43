"""Quantised kernels of a frozen base: leaves that stand where a float kernel stood.

Axes: L layers, D input width, O output width, n blocks of rows, b rows of a block.
A leaf has a kernel's logical shape `[..., D, O]` and gives its values with `astype`. It is a pytree
of arrays whose leading axis is the kernel's, so that a scan indexes it by layer as it is, and what
`kernels.quantised` describes, so that a TPU kernel unpacks it block by block.

    int8  w = q · s          q in -127..127, s = max|w| / 127 of an output channel
    nf4   w = code[q] · s    code the 16 quantiles of QLoRA (arXiv 2305.14314, appendix E),
                             s = max|w| of 64 consecutive rows of an output channel
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from medmoe_jax.base import trees
from medmoe_jax.base.config import GROUPS
from medmoe_jax.errors import ParameterError

BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A byte a weight and a float32 scale an output channel."""

    codes: Any  # [..., D, O] int8
    scale: Any  # [..., 1, O] float32
    rows_held: ClassVar = (1, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The scale's dtype, in which the values are computed."""
        return self.scale.dtype

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The kernel's values: computed in float32, rounded once."""
        return self.unpack(self.codes, self.scale).astype(dtype)

    @staticmethod
    def unpack(codes: jax.Array, scale: jax.Array) -> jax.Array:
        """Float32 values `[..., rows, columns]` of a part of both arrays."""
        return codes.astype(jnp.float32) * scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4:
    """Four bits a weight and a float32 scale a block: 4.5 bits a weight.

    Rows are filled up with zeros to whole blocks. A byte holds two rows of one block, i in its low
    bits and i + 32 in its high ones, so that a shard of whole blocks unpacks by itself.
    """

    codes: Any  # [..., n b / 2, O] uint8
    scale: Any  # [..., n, O] float32
    rows: int = dataclasses.field(metadata={"static": True})  # D of the whole kernel
    rows_held: ClassVar = (2, BLOCK)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape, or a shard's."""
        *leading, packed, O = self.codes.shape
        return (*leading, min(self.rows, 2 * packed), O)

    @property
    def dtype(self) -> jnp.dtype:
        """The scale's dtype, in which the values are computed."""
        return self.scale.dtype

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The kernel's values: computed in float32, rounded once."""
        return self.unpack(self.codes, self.scale).astype(dtype)[..., : self.rows, :]

    @staticmethod
    def unpack(codes: jax.Array, scale: jax.Array) -> jax.Array:
        """Float32 values `[..., rows, columns]` of whole blocks: a part of both arrays."""
        *leading, n, O = scale.shape
        packed = codes.reshape(*leading, n, BLOCK // 2, O)
        values = _from_codes(jnp.concatenate([packed & 15, packed >> 4], axis=-2))
        return (values * scale[..., None, :]).reshape(*leading, n * BLOCK, O)


Quantised = Int8 | Nf4


def _from_codes(codes):
    """`code[q]` as a tree of selects: elementwise, so no shard leaves its device for a lookup."""
    values = [jax.lax.full(codes.shape, value, jnp.float32) for value in NF4]
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        # Not `where`: the compiler takes the constants of its inner call, as large as the kernel,
        # out of the loop over layers and keeps them all.
        values = [jax.lax.select(on, high, low) for low, high in pairs]
    return values[0]


def to_int8(kernel: jax.Array) -> Int8:
    """A kernel `[..., D, O]` in int8, rounded to the nearest."""
    kernel = kernel.astype(jnp.float32)
    scale = _or_one(jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127)
    return Int8(jnp.round(kernel / scale).astype(jnp.int8), scale)


def to_nf4(kernel: jax.Array) -> Nf4:
    """A kernel `[..., D, O]` in nf4, each weight at the nearest of the 16 values."""
    *leading, D, O = kernel.shape
    padding = [(0, 0)] * len(leading) + [(0, -D % BLOCK), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), padding).reshape(*leading, -1, BLOCK, O)
    scale = _or_one(jnp.max(jnp.abs(blocks), axis=-2))
    ratio = blocks / scale[..., None, :]
    bounds = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    codes = sum((ratio > bound).astype(jnp.uint8) for bound in bounds)
    packed = codes[..., : BLOCK // 2, :] | codes[..., BLOCK // 2 :, :] << 4
    return Nf4(packed.reshape(*leading, -1, O), scale, D)


def _or_one(scale):
    """Scales with 1 for those of zeros."""
    return jnp.where(scale > 0, scale, 1.0)


KINDS: dict[str, Callable[[Any], Quantised]] = {"int8": to_int8, "nf4": to_nf4}
KERNELS = frozenset(f"layers.{site}.kernel" for sites in GROUPS.values() for site in sites)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: Quantised) -> jax.Array:
    """`x W` in the dtype of x; the kernel has no gradient.

    The backward pass computes W from the codes once more: kept for it, the values of all layers
    would be the float base that quantisation saves.
    """
    return x @ kernel.astype(x.dtype)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), kernel


def _matmul_backward(kernel, dy):
    return dy @ kernel.astype(dy.dtype).T, None


matmul.defvjp(_matmul_forward, _matmul_backward)


def check_kind(kind: str) -> None:
    """Raise ParameterError unless `kind` is "" or a key of KINDS."""
    if kind and kind not in KINDS:
        raise ParameterError(f"quantise: '{kind}' is none of {', '.join(KINDS)} (empty = floats)")


def encoder(kind: str, path: str) -> Callable[[Any], Any]:
    """What turns the values of a base's leaf at `path` into what is stored.

    The kernels of the linear sites are quantised; for embeddings, head, norms and biases, and for
    every leaf where `kind` is "", it is the identity.
    """
    return KINDS[kind] if kind and path in KERNELS else _itself


def _itself(leaf):
    return leaf


def quantise(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A base with its kernels in `kind`; see `encoder`."""
    return trees.unflatten(
        (path, encoder(kind, path)(leaf)) for path, leaf in trees.flatten(params)
    )


def dequantise(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """A base with float kernels, those that were quantised in `dtype`."""
    return trees.unflatten(
        (path, leaf.astype(dtype) if isinstance(leaf, Quantised) else leaf)
        for path, leaf in trees.flatten(params)
    )
