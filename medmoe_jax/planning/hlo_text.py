"""The text of a compiled program (`compiled.as_text()`) as computations of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
      dtype, shape: as in the text.
      on_chip: whether it lies in another memory than the device's main one (VMEM, SMEM).
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for n in self.shape:
            total *= n
        return total

    @property
    def bytes(self) -> int:
        """Size in bytes, without the layout's padding."""
        named = self.dtype in _BITS
        bits = _BITS[self.dtype] if named else int(matched(r"\d+", self.dtype)[0])
        return (self.size * bits + 7) // 8


def matched(pattern: str, text: str) -> re.Match[str]:
    """The first match of what a program's text always has there; ValueError where it has not."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing like {pattern} in {text!r}")
    return match


@dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as in the text.
      arrays: the arrays of its result, a tuple's elements in order, nested ones flattened.
      operands: names of instructions of the same computation.
      inside: the text between the opcode's parentheses.
      attributes: the text after them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, key: str) -> str:
        """The computation that an attribute such as `body=%name` names; "" if there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def contracted(self) -> tuple[int, ...]:
        """The dimensions of its left operand that a product sums over."""
        found = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass
class Computation:
    """A named list of instructions in order.

    Attributes:
      name: as in the text.
      instructions: by name.
      root: name of the result.
      users: names of the instructions that use an instruction.
    """

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""
    users: dict[str, list[str]] = field(default_factory=dict)

    def parameters(self) -> list[Instruction]:
        """The parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return sorted(found, key=lambda i: int(i.inside))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction reads."""
        return [self.instructions[name] for name in instruction.operands]


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(
        Array(
            dtype,
            tuple(int(n.strip("<=")) for n in dims.split(",") if n),
            re.search(r"S\([1-9]\d*\)", layout or "") is not None,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _close(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced parentheses in: {text[start : start + 80]}")


def _instruction(name: str, rest: str) -> Instruction:
    end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _close(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    opcode = rest[end:opening].strip()
    constant = opcode in ("constant", "parameter")
    operands = () if constant else tuple(_NAME.findall(inside))
    return Instruction(name, opcode, arrays_of(rest[:end]), operands, inside, rest[closing:])


def _statements(text: str) -> Iterator[str]:
    """Lines, with those that an attribute's line break cut in two joined again."""
    pending = ""
    for line in text.splitlines():
        if _START.match(line) or line.rstrip() == "}" or _HEADER.match(line):
            if pending:
                yield pending
            pending = line
        elif pending:
            pending += line
    if pending:
        yield pending


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """`(name of the entry, computations by name)`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _statements(text):
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], Computation(header[2]))
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (start := _START.match(line)):
            one = _instruction(start[2], start[3])
            current.instructions[one.name] = one
            current.root = one.name if start[1] else current.root
            for operand in one.operands:
                current.users.setdefault(operand, []).append(one.name)
    return entry, computations
