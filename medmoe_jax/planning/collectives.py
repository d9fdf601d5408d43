"""What collectives move over links within a slice, and over the network between slices.

A group of n devices, of a slice or of the slices themselves, exchanges B bytes, the larger side of
the collective on one device. Each of them receives, by the algorithms that move least (rings):

| kind | bytes |
|---|---|
| all-gather, reduce-scatter, all-to-all | B (n − 1) / n |
| all-reduce | twice that |
| collective-permute | B |

A program for several slices has collectives within each, and between them pairs of `send` and
`recv` that name the kind; a device exchanges with those in its place in the other slices.
"""

from __future__ import annotations

import math
import re

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
    for key, place in zip(map(tuple, apart.T.tolist()), places.ravel().tolist(), strict=True):
        out.setdefault(key, []).append(place)
    return list(out.values())


def groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective, or a permutation's pairs, as places in the program's devices.

    Args:
      attributes: the instruction's, as in the text: `replica_groups={{0,1},{2,3}}`;
        `replica_groups=[2,4]<=[4,2]T(1,0)`, the rows of a transposed grid; or
        `replica_groups=mesh['a'=2,'b'=4] {'b'}`, along axes of a mesh.
      devices: how many the program runs on; what names no group has one of all.
    """
    if lists := _LISTS.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
    if grid := _GRID.search(attributes):
        return _transposed(grid[2], grid[3]).reshape(_numbers(grid[1])).tolist()
    if mesh := _MESH.search(attributes):
        return _of_mesh(mesh)
    return [list(range(devices))]


def received(kind: str, size: int, n: int) -> float:
    """Bytes that a device receives in a collective.

    Args:
      kind: such as `all-gather`.
      size: bytes of its larger side on one device.
      n: devices that take part.
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def within_slice(kind: str, size: int, attributes: str, devices: int) -> float:
    """Bytes that a device receives from others of its slice.

    Args:
      kind, size: see `received`.
      attributes: see `groups`.
      devices: how many the program runs on.
    """
    found = groups(attributes, devices)
    if kind == "collective-permute":
        return received(kind, size, 2) if any(a != b for a, b in found) else 0.0
    return received(kind, size, max(map(len, found)))


def between_slices(opcode: str, attributes: str) -> str:
    """The kind of collective that a `send` or `recv` stands for, or "".

    A collective is counted once, at the one of its two ends that has the larger side.
    """
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    kind = named[1].lower().replace("_", "-") if named else ""
    return kind if opcode == ("send" if kind == "reduce-scatter" else "recv") else ""
