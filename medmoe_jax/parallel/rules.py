"""Sharding by ordered rules on parameter paths: the first pattern that matches decides.

A rule is `(regular expression, axes)`, `axes` one entry an array dimension: a mesh axis, a tuple of
them, or None. Where a dimension does not divide by the product of its axes, trailing axes are left
off until it does: `describe` shows what came of it, `undivided` what it costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import EXPERT, FSDP, SEQUENCE, TENSOR, WEIGHT_AXES

Rule = tuple[str, tuple]
_COLUMN = r"(attn\.[qkv]|mlp\.(gate|up))"
_ROW = r"(attn\.o|mlp\.down)"
_REST = (FSDP, SEQUENCE)  # where E lies on `expert`
# A quantised kernel's arrays have its axes, some of them shorter.
_PARTS = r"(\.(codes|scale))?$"

BASE_RULES: tuple[Rule, ...] = (
    (r"(^|\.)(embed|head)$", (TENSOR, WEIGHT_AXES)),
    (rf"layers\.{_COLUMN}\.kernel{_PARTS}", (None, WEIGHT_AXES, TENSOR)),
    (rf"layers\.{_COLUMN}\.bias$", (None, TENSOR)),
    (rf"layers\.{_ROW}\.kernel{_PARTS}", (None, TENSOR, WEIGHT_AXES)),
    (rf"layers\.{_ROW}\.bias$", ()),
    (r"norm$", ()),
)

# A column-parallel site keeps A whole on the tensor axis and splits B's outputs; a row-parallel one
# splits A's inputs, so that the low-rank output joins the base's partial sum before its reduction.
# Every factor is spread over the other axes too, as the base is: gradients and moments with it.
BANK_RULES: tuple[Rule, ...] = (
    (rf"{_COLUMN}\.lora_a$", (None, WEIGHT_AXES, None, None)),
    (rf"{_COLUMN}\.lora_b$", (None, None, None, (TENSOR, *WEIGHT_AXES))),
    (rf"{_ROW}\.lora_a$", (None, (TENSOR, *WEIGHT_AXES), None, None)),
    (rf"{_ROW}\.lora_b$", (None, None, None, WEIGHT_AXES)),
    # Whole feed-forward experts live on the expert axis.
    (rf"{_COLUMN}\.experts$", (None, EXPERT, _REST, TENSOR)),
    (rf"{_ROW}\.experts$", (None, EXPERT, TENSOR, _REST)),
    (r"(?<!\.kernel)\.(scale|router\.(kernel|bias)|mix\.weight)$", ()),
)

# Banks whose experts stay on their device while the tokens travel.
TRAVEL_RULES: tuple[Rule, ...] = (
    (rf"{_COLUMN}\.lora_a$", (None, _REST, EXPERT, None)),
    (rf"{_COLUMN}\.lora_b$", (None, EXPERT, None, (TENSOR, *_REST))),
    (rf"{_ROW}\.lora_a$", (None, (TENSOR, *_REST), EXPERT, None)),
    (rf"{_ROW}\.lora_b$", (None, EXPERT, None, _REST)),
)

RULES = BANK_RULES + BASE_RULES


def rules_for(dispatch: str) -> tuple[Rule, ...]:
    """The rules of a run with that dispatch strategy: `all_to_all` puts E on the axis `expert`."""
    return TRAVEL_RULES + RULES if dispatch == "all_to_all" else RULES


def row_parallel(site: str) -> bool:
    """Whether a site's inputs are cut over the axis `tensor`; else its outputs are."""
    return re.fullmatch(_ROW, site) is not None


def path_name(path: jax.tree_util.KeyPath) -> str:
    """A pytree path as keys joined by dots."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def spec_for(name: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[Rule]) -> PartitionSpec:
    """The first matching rule's spec, cut to what divides.

    Raises:
      UserError: no rule matches.
    """
    axes = _axes_for(name, rules)
    if axes is None:
        raise UserError(f"no sharding rule matches parameter '{name}'")
    return _fit(shape, mesh, axes)


def _axes_for(name: str, rules: Sequence[Rule]) -> tuple | None:
    return next((axes for pattern, axes in rules if re.search(pattern, name)), None)


def _names(wanted: str | tuple | None) -> list[str]:
    return list(wanted) if isinstance(wanted, tuple) else [wanted] if wanted else []


def _fit(shape: Sequence[int], mesh: Mesh | AbstractMesh, axes: tuple) -> PartitionSpec:
    out: list[Any] = []
    for size, wanted in zip(shape, axes, strict=False):
        names = _names(wanted)
        while names and size % math.prod(mesh.shape[n] for n in names):
            names.pop()
        out.append(tuple(names) if names else None)
    return PartitionSpec(*out)


def fitted(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """A sharding for an array of another shape, its axes cut to what divides."""
    spec = _fit(shape, sharding.mesh, tuple(sharding.spec))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """`NamedSharding`s for a tree of arrays or `ShapeDtypeStruct`s."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules)),
        tree,
    )


def state_shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """`NamedSharding`s for an optimiser's state: moments follow their parameter."""

    def leaf_sharding(path, leaf):
        # Counts and what else is no parameter's match no rule, and are whole.
        axes = _axes_for(path_name(path), rules) or ()
        return NamedSharding(mesh, _fit(leaf.shape, mesh, axes))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def placed(tree: Any, sharding_tree: Any) -> Any:
    """The shapes of a tree's arrays, or of its `ShapeDtypeStruct`s, with these shardings."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        tree,
        sharding_tree,
    )


def describe(tree: Any, sharding_tree: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield `(path, shape, spec)` of every leaf, for printing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(sharding_tree), strict=True):
        yield path_name(path), tuple(leaf.shape), str(sharding.spec)


def undivided(tree: Any, rules: Sequence[Rule]) -> dict[str, int]:
    """Bytes, by path, that one device holds only because axes of its rule were left off.

    Args:
      tree: arrays, or `ShapeDtypeStruct`s, with `NamedSharding`s of these rules.
      rules: see above; a leaf that none matches is meant to be whole.
    """
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        sizes = leaf.sharding.mesh.shape
        axes = (_axes_for(name, rules) or ())[: leaf.ndim]
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        share = leaf.size / math.prod(sizes[n] for wanted in axes for n in _names(wanted))
        if held > share:
            out[name] = round((held - share) * leaf.dtype.itemsize)
    return out
