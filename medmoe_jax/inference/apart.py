"""Weights whose layers lie apart, for decoding on a processor.

Axes: L layers.

A product of a few rows takes as long as its weights take from memory. A loop over layers copies
each out of its stack first, and where the cache does not hold the copy, the weights travel three
times. So the program that goes on token by token is given every layer by itself, and runs one after
the other. They are views on the stacks: nothing is there twice.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.apart import Apart
from medmoe_jax.inference.forward import Weights

_CACHED = 32 * 2**20  # bytes of a layer that a processor's last cache holds, about
_SMALL = 2**20  # bytes of a leaf's layer that may be copied, where no view can begin


def layers_apart(config: AdaptedConfig, weights: Weights) -> Weights:
    """The weights with their layers `Apart`, where that is faster and copies nothing.

    Compiling takes longer, layer by layer: small ones are not worth it, unless all were to be
    unrolled in any case.

    Args:
      config: names the active banks.
      weights: as the programs of `inference.steps` take them; those given stay in use.
    """
    execution, n_layers = config.execution, config.decoder.n_layers
    layers = weights.base["layers"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(layers)) // n_layers
    wanted = size > _CACHED or execution.unroll >= n_layers
    if execution.platform != "cpu" or not wanted:
        return weights
    stacks = {bank.name: _cut(weights.banks[bank.name], bank.layers) for bank in config.banks}
    layers = _cut(layers, n_layers)
    if layers is None or None in stacks.values():
        return weights
    return weights._replace(base={**weights.base, "layers": layers}, banks=stacks)


def _cut(stack: Any, n_layers: int) -> Apart | None:
    """A stack's layers as trees of their own; None where they are spread or would be copied."""
    leaves, shape = jax.tree.flatten(stack)
    cut = [_views(leaf, n_layers) for leaf in leaves]
    if None in cut:
        return None
    return Apart(jax.tree.unflatten(shape, of_layer) for of_layer in zip(*cut, strict=True))


def _views(leaf: jax.Array, n_layers: int) -> list[jax.Array] | None:
    """The `n_layers` layers of a leaf on one device; what they share, `[1, ...]`, is each one's."""
    leaf = jax.device_put(leaf, may_alias=True)  # also one of NumPy
    if len(leaf.sharding.device_set) > 1:
        return None
    size, start = leaf.nbytes // len(leaf), leaf.unsafe_buffer_pointer()
    views = [jax.device_put(one, leaf.sharding, may_alias=True) for one in np.asarray(leaf)]
    here = [start + i * size for i in range(len(leaf))]
    if size > _SMALL and [view.unsafe_buffer_pointer() for view in views] != here:
        return None
    return views if len(views) == n_layers else views * n_layers
