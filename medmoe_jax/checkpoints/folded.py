"""Weights on their way out: each made when it is asked for, with its banks added in float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import trees
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints.families import Part, Tensor, transposed
from medmoe_jax.parallel.host import to_host


class FoldedWeights:
    """The tensors of a decoder with its banks folded in.

    All processes ask for the same tensors in the same order.
    """

    def __init__(
        self, params: Params, members: Sequence[tuple[BankSpec, Any]], dtype: DTypeLike
    ) -> None:
        """
        Args:
          params: the base under any sharding, its kernels quantised or not.
          members: banks with their parameters, none of whose gates looks at the token.
          dtype: of what is made: one rounding from float32.
        """
        sites = dict.fromkeys(site for spec, _ in members for site in spec.sites)
        self.dtype = np.dtype(dtype)
        self._params = jax.tree.map(jnp.asarray, params)
        self._members = {
            f"layers.{site}.kernel": lifecycle.members_at(members, site) for site in sites
        }

    def tensor(self, tensor: Tensor) -> np.ndarray:
        """One tensor from its leaves, as Hugging Face lays it out."""
        rows = [self.part(part) for part in tensor.parts]
        return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])

    def part(self, part: Part) -> np.ndarray:
        """The rows of a tensor that one leaf fills."""
        specs, banks = self._members.get(part.path, ((), []))
        leaf = trees.get(self._params, part.path)
        if part.layer is None:
            x = to_host(leaf).astype(self.dtype)
        else:
            x = to_host(_read_layer(specs, self.dtype, leaf, banks, np.int32(part.layer)))
        return x.T if transposed(part.path) else x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_layer(specs: tuple[BankSpec, ...], dtype, leaf, banks, layer):
    return lifecycle.kernel_with(specs, leaf, banks, layer).astype(dtype)
