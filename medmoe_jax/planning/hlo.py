"""FLOPs, bytes and collectives of a compiled program, counted from its optimised HLO text.

XLA's own `cost_analysis()` counts the body of a loop once, charges a fusion that reads one slice
of an array for the whole array, and knows nothing of a Pallas kernel. The rules here:

- A loop's body is multiplied by its trips; of a conditional the dearest branch counts.
- FLOPs are those of products (`dot`, `convolution`: 2 an element pair, padding left out) and of
  Pallas kernels. Elementwise work is not counted.
- Bytes are what instructions outside fusions read from and write to the device's main memory:
  operands and results, except those in on-chip memory (`S(1)` in a layout). A slice, gather or
  dynamic slice counts by what it reads, an update in place by what it writes, also inside a
  fusion; tuples, bitcasts and the ends of asynchronous pairs are free.
- A Pallas kernel counts as `kernels` says (see `planning.attention`), else by its own
  `cost_estimate`, which takes everything to be in main memory: what is not is taken off once,
  however often it is read; else by its operands and results once, and is listed in `unknown`.
- A collective's bytes are its larger side, its operands or its results, on one device; those that
  cross links are `planning.collectives`'.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from medmoe_jax.planning import collectives
from medmoe_jax.planning.hlo_text import Array, Computation, Instruction, parse
from medmoe_jax.planning.products import product_flops
from medmoe_jax.planning.trips import trip_count

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_SLICES = {"dynamic-slice", "gather", "slice", "slice-start"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written


class Cost(NamedTuple):
    """What one run of a kernel costs."""

    flops: float
    bytes: float


class Traffic(NamedTuple):
    """What one kind of collective moves, over the whole program, on one device.

    Attributes:
      count: how often it runs.
      bytes: those of its larger side.
      ici, dcn: bytes received over links within a slice, and over the network between slices.
    """

    count: float
    bytes: float
    ici: float
    dcn: float


class Extent(NamedTuple):
    """What a program runs on: devices of a slice, and slices."""

    devices: int
    slices: int


class Buffer(NamedTuple):
    """An array that the program holds, beside its arguments."""

    bytes: int
    shape: tuple[int, ...]
    name: str


@dataclass
class Counts:
    """What one run of a program costs on one device.

    Attributes:
      flops: those of products and kernels.
      bytes: to and from main memory.
      collectives: by kind.
      largest: the largest array that an instruction outside fusions makes.
      unknown: loops whose trips depend on data and kernels counted without FLOPs.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, Traffic] = field(default_factory=dict)
    largest: Buffer = field(default_factory=lambda: Buffer(0, (), ""))
    unknown: tuple[str, ...] = ()


def count(
    text: str,
    kernels: Mapping[str, Cost] | None = None,
    slices: int = 1,
    turns: int | None = None,
) -> Counts:
    """The costs of a compiled program.

    Args:
      text: `compiled.as_text()`.
      kernels: the cost of a run of a Pallas kernel, by its name.
      slices: that the program runs on.
      turns: how often a loop turns whose trips depend on the program's data; None = not known:
        such loops count once, and are listed in `unknown`.
    """
    entry, computations = parse(text)
    devices = re.search(r"\bnum_partitions=(\d+)", text)
    extent = Extent(int(devices[1]) if devices else 1, slices)
    counter = _Counter(computations, kernels or {}, extent, turns)
    counter.run(computations[entry], 1)
    return counter.counts()


class _Counter:
    """One walk over the computations that are run, with how often each is."""

    def __init__(
        self,
        computations: Mapping[str, Computation],
        kernels: Mapping[str, Cost],
        extent: Extent,
        turns: int | None,
    ):
        self.computations = computations
        self.kernels = kernels
        self.extent = extent
        self.turns = turns
        self.cost = Cost(0.0, 0.0)
        self.largest = Buffer(0, (), "")
        self.unknown: dict[str, None] = {}
        self.traffic: dict[str, Traffic] = defaultdict(lambda: Traffic(0, 0, 0, 0))

    def counts(self) -> Counts:
        return Counts(*self.cost, dict(self.traffic), self.largest, tuple(self.unknown))

    def run(self, here: Computation, times: float) -> None:
        """Count a computation outside fusions."""
        for one in here.instructions.values():
            self._see(one)
            if one.opcode == "while":
                self._loop(here, one, times)
            elif one.opcode == "conditional":
                self._branches(one, times)
            elif one.opcode in ("call", "async-start"):
                self.run(self._inner(one), times)
            elif _kind(one):
                self._collective(here, one, times)
            elif one.opcode in ("send", "recv"):
                self._transfer(one, times)
            elif one.opcode == "fusion":
                self._fusion(here, one, times)
            elif one.opcode not in _FREE and not one.opcode.endswith(("-done", "-update")):
                self._add(*self._plain(here, one), times)

    def _inner(self, one: Instruction) -> Computation:
        return self.computations[one.called("calls") or one.called("to_apply")]

    def _add(self, flops: float, bytes_: float, times: float) -> None:
        self.cost = Cost(self.cost.flops + times * flops, self.cost.bytes + times * bytes_)

    def _exchange(self, kind: str, once: Traffic, times: float) -> None:
        pairs = zip(self.traffic[kind], once, strict=True)
        self.traffic[kind] = Traffic(*(old + times * one for old, one in pairs))

    def _see(self, one: Instruction) -> None:
        if one.opcode in _FREE or one.opcode in ("while", "conditional"):
            return
        for array in one.arrays:
            if array.bytes > self.largest.bytes:
                self.largest = Buffer(array.bytes, array.shape, one.name)

    def _loop(self, here: Computation, one: Instruction, times: float) -> None:
        trips = trip_count(self.computations, here, one)
        trips = self.turns if trips is None else trips
        if trips is None:
            self.unknown[one.name] = None
            trips = 1
        self.run(self.computations[one.called("body")], times * trips)

    def _branches(self, one: Instruction, times: float) -> None:
        named = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = re.findall(r"[\w.\-]+", named[1]) if named else []
        names = names or [one.called("true_computation"), one.called("false_computation")]
        tried = []
        for name in names:
            branch = _Counter(self.computations, self.kernels, self.extent, self.turns)
            branch.run(self.computations[name], 1)
            tried.append((branch.counts().flops, branch.counts().bytes, name))
        self.run(self.computations[max(tried)[2]], times)

    def _collective(self, here: Computation, one: Instruction, times: float) -> None:
        results = _results(here, one)
        operands = [a for operand in here.operands(one) for a in operand.arrays]
        larger = max(sum(a.bytes for a in results), sum(a.bytes for a in operands))
        # Of such a fusion's sums, every device needs a part.
        kind = "reduce-scatter" if here.name.startswith("all-reduce-scatter") else _kind(one)
        ici = collectives.within_slice(kind, larger, one.attributes, self.extent.devices)
        self._exchange(kind, Traffic(1, larger, ici, 0), times)
        self._add(0, _main(results) + _main(operands), times)

    def _transfer(self, one: Instruction, times: float) -> None:
        """One end of an exchange with the host; between slices, it is a collective's."""
        size = one.arrays[0].bytes
        self._add(0, _main(one.arrays[:1]), times)
        if kind := collectives.between_slices(one.opcode, one.attributes):
            dcn = collectives.received(kind, size, self.extent.slices)
            self._exchange(kind, Traffic(1, size, 0, dcn), times)

    def _fusion(self, here: Computation, one: Instruction, times: float) -> None:
        inner = self._inner(one)
        self._inside(inner, times)
        read = sum(
            self._reads(inner, parameter, operand.arrays)
            for parameter, operand in zip(inner.parameters(), here.operands(one), strict=True)
        )
        self._add(0, read + self._writes(inner, inner.instructions[inner.root]), times)

    def _inside(self, inner: Computation, times: float) -> None:
        """The products, kernels and collectives of a fusion."""
        for one in inner.instructions.values():
            if one.opcode == "fusion":
                self._inside(self._inner(one), times)
            elif not _kind(one):
                self._add(product_flops(inner, one), 0, times)
            elif not _goes_on(inner):
                self._collective(inner, one, times)

    def _reads(self, inner: Computation, source: Instruction, arrays) -> int:
        """Bytes that a fusion reads of one parameter."""
        whole, total = _main(arrays), 0
        for name in set(inner.users.get(source.name, ())):
            user = inner.instructions[name]
            first = user.operands[0] == source.name and source.name not in user.operands[1:]
            if user.opcode == "bitcast" or _in_place(user, source):
                total += self._reads(inner, user, arrays)
            elif user.opcode == "fusion":
                nested = self._inner(user)
                total += sum(
                    self._reads(nested, parameter, arrays)
                    for parameter, operand in zip(nested.parameters(), user.operands, strict=True)
                    if operand == source.name
                )
            elif user.opcode in _SLICES and first:
                total += sum(a.bytes for a in user.arrays)
            elif not (user.opcode in _UPDATES and first) and user.opcode != "tuple":
                total += 0 if _kind(user) else whole
        return min(whole, total)

    def _writes(self, inner: Computation, root: Instruction) -> int:
        """Bytes that a fusion writes for one result."""
        if root.opcode == "tuple":
            return sum(self._writes(inner, one) for one in inner.operands(root))
        if root.opcode == "parameter" or _kind(root):
            return 0
        if root.opcode == "bitcast":
            return min(_main(root.arrays), self._writes(inner, inner.operands(root)[0]))
        if root.opcode in _UPDATES:
            return min(_main(root.arrays), _updated(inner, root))
        return _main(root.arrays)

    def _plain(self, here: Computation, one: Instruction) -> Cost:
        """An instruction outside fusions that calls nothing."""
        operands, results = here.operands(one), _results(here, one)
        if one.opcode == "custom-call":
            return self._kernel(here, one)
        if one.opcode in _SLICES:
            on_chip = not _main(operands[0].arrays)
            read = 0 if on_chip else sum(a.bytes for a in results)
            rest = sum(_main(o.arrays) for o in operands[1:])
            return Cost(0, read + rest + _main(results))
        if one.opcode in _UPDATES:
            rest = sum(_main(o.arrays) for o in operands[1:])
            return Cost(0, rest + min(_main(results), _updated(here, one)))
        read = sum(_main(operand.arrays) for operand in operands)
        return Cost(product_flops(here, one), read + _main(results))

    def _kernel(self, here: Computation, one: Instruction) -> Cost:
        name = one.name.partition(".")[0]  # `.2`, `.clone`, and whose operand it is: `.2.rows_ref`
        if name in self.kernels:
            return self.kernels[name]
        if "AllocateBuffer" in one.attributes:
            return Cost(0, 0)
        arrays = [a for operand in here.operands(one) for a in operand.arrays] + [*one.arrays]
        estimate = re.search(r'"cost_estimate":\{([^}]*)\}', one.attributes)
        if estimate:
            fields = {k: float(v) for k, v in re.findall(r'"(\w+)":"?([\d.e+]+)', estimate[1])}
            on_chip = sum(a.bytes for a in arrays if a.on_chip)
            moved = fields.get("bytes_accessed", 0.0) - on_chip
            return Cost(fields.get("flops", 0.0), max(0.0, moved))
        if "tpu_custom_call" in one.attributes:
            self.unknown[name] = None
        return Cost(0, _main(arrays))


def _kind(one: Instruction) -> str:
    """The kind of a collective, or ""; its asynchronous end is none."""
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _in_place(user: Instruction, source: Instruction) -> bool:
    """Whether a fusion within a fusion is the same bytes in another form, as of tiles."""
    same = "output_to_operand_aliasing={{}: (0, {})}" in user.attributes
    return user.opcode == "fusion" and same and user.operands == (source.name,)


def _goes_on(inner: Computation) -> bool:
    """Whether a fusion holds a later piece of a collective that runs beside products.

    Every piece names the whole of it; one fusion starts it (`AsyncCollectiveStart`).
    """
    ends = any("AsyncCollectiveDone" in one.attributes for one in inner.instructions.values())
    return ends or inner.name.startswith("async_collective_fusion")


def _main(arrays) -> int:
    """Bytes in main memory."""
    return sum(a.bytes for a in arrays if not a.on_chip)


def _results(here: Computation, one: Instruction) -> list[Array]:
    """What an instruction makes; the start of an asynchronous pair repeats its operands."""
    made = list(one.arrays)
    if one.opcode.endswith("-start"):
        for operand in here.operands(one):
            for array in operand.arrays:
                if array in made:
                    made.remove(array)
        made = [a for a in made if a.size > 1]
    return made


def _updated(here: Computation, one: Instruction) -> int:
    """Bytes of the update that an instruction writes into its first operand."""
    update = here.operands(one)[_UPDATES[one.opcode]]
    return sum(a.bytes for a in update.arrays)
