"""Small functions on nested dicts of arrays; a leaf's path joins its keys with dots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, leaf)` of a nested dict, in key order."""
    for key in tree:
        path = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            yield from flatten(tree[key], path + ".")
        else:
            yield path, tree[key]


def unflatten(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The nested dict of `(path, leaf)` pairs."""
    tree: dict[str, Any] = {}
    for path, leaf in items:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at a path."""
    for key in path.split("."):
        tree = tree[key]
    return tree


def without(tree: Mapping[str, Any], these: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` less the leaves that `these` has too; a node that loses all of them stays, empty."""
    out = {}
    for key, value in tree.items():
        if key not in these:
            out[key] = value
        elif isinstance(these[key], Mapping):
            out[key] = without(value, these[key])
    return out


def overlay(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the leaves of `over` added or put in place of its own."""
    out = dict(tree)
    for key, value in over.items():
        inner = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = overlay(out[key], value) if inner else value
    return out
