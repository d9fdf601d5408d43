"""Layers that lie apart, where a stack has leaves `[L, ...]`. Axes: L layers."""

from __future__ import annotations

from typing import Any

import jax


class Apart(tuple):
    """The layers of a stack in order, each a tree of its own; itself a pytree of them."""


jax.tree_util.register_pytree_node(Apart, lambda apart: (tuple(apart), None), lambda _, x: Apart(x))


def layer(stacks: Any, i: int) -> Any:
    """Layer `i` of a tree of stacks, some of which may lie apart."""
    return jax.tree.map(
        lambda stack: stack[i], stacks, is_leaf=lambda node: isinstance(node, Apart)
    )
