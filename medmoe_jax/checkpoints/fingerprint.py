"""Fingerprints: short strings that tell content apart, of JSON values, files, code and trees."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

import medmoe_jax
from medmoe_jax.parallel.hashing import array_hashes
from medmoe_jax.storage.objects import size_of
from medmoe_jax.storage.places import place


def json_fingerprint(value: Any) -> str:
    """32 hex digits for a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hasher(content: bytes = b"") -> Any:
    """What makes a fingerprint of bytes that come one after another: `update`, `hexdigest`."""
    return hashlib.blake2b(content, digest_size=16)


def file_fingerprint(path: str | Path) -> str:
    """32 hex digits for the bytes of a file. Raises OSError if it cannot be read."""
    with place(path).open("rb") as file:
        return hashlib.file_digest(file, hasher).hexdigest()


def file_mark(path: Path) -> list[Any]:
    """`[bytes, fingerprint]` of a file. Raises OSError if it cannot be read."""
    return [size_of(path), file_fingerprint(path)]


def code_fingerprint() -> str:
    """32 hex digits for the Python files of this package."""
    root = Path(medmoe_jax.__file__).parent
    files = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    return json_fingerprint({name: file_fingerprint(path) for name, path in files.items()})


def tree_fingerprint(tree: Any) -> str:
    """32 hex digits for a pytree of arrays: paths, dtypes, shapes and every bit of the values.

    It is the same on any mesh, machine and number of processes; `parallel.hashing.array_hashes`
    says what a leaf may be, and which processes call this.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    rows = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    ]
    hashes = array_hashes(leaf for _, leaf in leaves)
    return json_fingerprint(sorted([*row, total] for row, total in zip(rows, hashes, strict=True)))
