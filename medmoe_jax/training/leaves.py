"""The leaves of the base that a stage trains, named by globs of their paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from medmoe_jax.base import trees
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError


def match_leaves(paths: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The paths that match any of the globs; UserError where one matches none."""
    out: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(paths, pattern)
        if not found:
            raise UserError(f"train_base: '{pattern}' matches none of {', '.join(paths)}")
        out.update(found)
    return out


def split_base(base: Params, patterns: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(frozen leaves, trained leaves)`: those whose path matches a glob move, in float32.

    Raises:
      UserError: a pattern matches no leaf.
    """
    paths = dict(trees.flatten(base))
    moved = match_leaves(paths, patterns)
    frozen = trees.unflatten((p, leaf) for p, leaf in paths.items() if p not in moved)
    frozen.setdefault("layers", {})
    trained = trees.unflatten((p, paths[p].astype(jnp.float32)) for p in sorted(moved))
    return frozen, trained
