"""What a collective sends over links: within a slice over ICI, between slices over the network.

n devices of a group lie in s slices, m = n / s in each; B is the collective's larger side in bytes.
A device receives, by the algorithms that move least (rings within a slice, and between slices the
devices of one place in theirs):

| kind | within a slice | between slices |
|---|---|---|
| all-gather, reduce-scatter | B (m − 1) / m | B (s − 1) / n |
| all-reduce | twice that | twice that |
| all-to-all | B (m − 1) / n | B (n − m) / n |
| collective-permute | B, if no pair crosses | B, if a pair crosses |
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_GRID = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _transposed(shape: str, order: str | None) -> np.ndarray:
    """The places of a grid of that shape, its axes in that order."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order or "") or None)


def _of_mesh(found: re.Match) -> list[list[int]]:
    """The groups along some axes of a mesh, or parts of them: `'a':(2)3` is the middle of `a`, if
    that is seen as 2 by 3 by the rest."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    shape = tuple(sizes.values())
    if found[4]:
        places = np.array(_numbers(found[4]))
    else:
        places = _transposed(found[2] or str(math.prod(shape)), found[3])
    where = np.indices(shape).reshape(len(shape), -1)
    apart = where.copy()  # what tells a device's group
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[5]):
        axis, whole = list(sizes).index(name), sizes[name]
        part = int(size or whole)
        step = whole // (int(before or 1) * part)
        apart[axis] -= where[axis] // step % part * step
    out: dict[tuple[int, ...], list[int]] = {}
    for key, place in zip(map(tuple, apart.T), places.ravel().tolist(), strict=True):
        out.setdefault(key, []).append(place)
    return list(out.values())


def groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective, or a permutation's pairs, as places in the program's devices.

    Args:
      attributes: of the instruction, as in the text: `replica_groups={{0,1},{2,3}}`;
        `replica_groups=[2,4]<=[4,2]T(1,0)`, the rows of a transposed grid; or
        `replica_groups=mesh['a'=2,'b'=4] {'b'}`, along axes of a mesh.
      devices: of the program; what names no group has one of all.
    """
    if lists := _LISTS.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
    if grid := _GRID.search(attributes):
        return _transposed(grid[2], grid[3]).reshape(_numbers(grid[1])).tolist()
    if mesh := _MESH.search(attributes):
        return _of_mesh(mesh)
    return [list(range(devices))]


def received(kind: str, size: int, attributes: str, slices: Sequence[int]) -> tuple[float, float]:
    """Bytes that a device receives over `(links within its slice, the network between slices)`.

    Args:
      kind: of the collective.
      size: bytes of its larger side on one device.
      attributes: see `groups`.
      slices: the slice of each device.
    """
    found = groups(attributes, len(slices))
    if kind == "collective-permute":
        moving = [(a, b) for a, b in found if a != b]
        if any(slices[a] != slices[b] for a, b in moving):
            return 0.0, float(size)
        return (float(size) if moving else 0.0), 0.0
    n = max(map(len, found))
    s = max(len({slices[i] for i in group}) for group in found)
    m = n / s
    if kind.endswith("all-to-all"):
        return size * (m - 1) / n, size * (n - m) / n
    times = 2 if kind == "all-reduce" else 1
    return times * size * (m - 1) / m, times * size * (s - 1) / n
