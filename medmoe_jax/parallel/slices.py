"""The names of TPU slices: `v5e:4x4`, `v5e-16` and `v5litepod-16` are one slice.

A name is CHIP:LAYOUT or CHIP-NUMBER, with Nx before it for N slices. The layout counts chips along
the links. The number counts chips on v5e and v6e; on v4, v5p and v7x it counts TensorCores, two a
chip, as Google's own names do: `v5p-16` has 8 chips.

    python -m medmoe_jax.parallel.slices NAME

prints a slice for launch/tpu_run.sh, a line `KEY=VALUE` each. This module needs Python alone.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from medmoe_jax.errors import UserError


class SliceFamily(NamedTuple):
    """What the slices of one chip are called, and how they are rented.

    Attributes:
      alias: the chip's other name, in CHIP-NUMBER the one that Google Cloud uses.
      cores: TensorCores of a chip, which NUMBER counts.
      most: chips of the largest slice.
      flat: whether chips lie in two dimensions; else in three.
      runtime: software of a Cloud TPU machine; "" = not rented as one.
      accelerator: what GKE's nodes are labelled with.
      machine: GKE's machine type, without the number of its chips.
    """

    alias: str
    cores: int
    most: int
    flat: bool
    runtime: str
    accelerator: str
    machine: str


# cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), and for the last two columns
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
FAMILIES: Mapping[str, SliceFamily] = {
    "v4": SliceFamily(
        "v4", 2, 4096, False, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"
    ),
    "v5e": SliceFamily(
        "v5litepod", 1, 256, True, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"
    ),
    "v5p": SliceFamily("v5p", 2, 6144, False, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": SliceFamily("v6e", 1, 256, True, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
    "v7x": SliceFamily("tpu7x", 2, 9216, False, "", "tpu7x", "tpu7x-standard"),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")


class Slice(NamedTuple):
    """One slice, or several alike.

    Attributes:
      chip: the name of its family.
      layout: chips along the links, such as `4x4`.
      count: how many slices.
    """

    chip: str
    layout: str
    count: int = 1

    @property
    def name(self) -> str:
        """The name by layout."""
        return f"{f'{self.count}x' * (self.count > 1)}{self.chip}:{self.layout}"

    @property
    def chips(self) -> int:
        """Chips of one of the slices."""
        return chips_of(self.layout)

    @property
    def accelerator_type(self) -> str:
        """What Google Cloud calls one of the slices."""
        family = FAMILIES[self.chip]
        return f"{family.alias}-{self.chips * family.cores}"

    @property
    def hosts(self) -> int:
        """Machines of one of the slices."""
        alone = 8 if FAMILIES[self.chip].flat else 4
        return 1 if self.chips <= alone else self.chips // 4


def chips_of(layout: str) -> int:
    """Chips of a layout."""
    return math.prod(map(int, layout.split("x")))


@functools.cache
def layouts(chip: str) -> tuple[str, ...]:
    """The layouts of a family, the fewest chips first, then the most compact."""
    family = FAMILIES[chip]
    if family.flat:
        return _FLAT
    # Whole cubes of 4 x 4 x 4 chips, joined in any way.
    edges = range(4, family.most // 16 + 1, 4)
    cubes = [
        sizes
        for sizes in itertools.combinations_with_replacement(edges, 3)
        if math.prod(sizes) <= family.most
    ]
    cubes.sort(key=lambda sizes: (math.prod(sizes), sum(sizes)))
    return (*_SMALL_CUBES, *("x".join(map(str, sizes)) for sizes in cubes))


def parse(name: str) -> Slice:
    """The slice of a name.

    Raises:
      UserError: an unknown name; the message has the closest one.
    """
    pattern = r"(?:([1-9]\d{0,5})x)?(\w+)(?:-([1-9]\d{0,5})|:(\w+))?"
    found = re.fullmatch(pattern, name, re.ASCII)
    several, given, number, layout = found.groups() if found else (None, name, None, None)
    both = {alias: chip for chip, family in FAMILIES.items() for alias in (chip, family.alias)}
    # The closest is whatever there is: a cutoff of 0 lets all pass.
    chip = both[difflib.get_close_matches(given.lower(), both, 1, 0)[0]]
    sizes = map(int, re.findall(r"\d{1,6}", layout or ""))
    wanted = int(number) / FAMILIES[chip].cores if number else math.prod(sizes)

    def fits(one: str) -> bool:
        return chips_of(one) == wanted if number else one == layout

    exact = next(filter(fits, layouts(chip)), None)
    if given in both and exact:
        return Slice(chip, exact, int(several or 1))
    near = min(layouts(chip), key=lambda one: abs(chips_of(one) - wanted))
    raise UserError(
        f"slice '{name}' is not known; the closest is {Slice(chip, near, int(several or 1)).name}. "
        f"A slice is CHIP:LAYOUT or CHIP-NUMBER, such as v5e:4x4 or v5litepod-16, and 2xv5e:4x4 "
        f"are two; chips are {', '.join(both)}"
    )


def main(words: list[str]) -> int:
    """Print the slice of a name for a shell; the exit status."""
    try:
        one = parse(words[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    family = FAMILIES[one.chip]
    told = {
        "NAME": one.name,
        "LAYOUT": one.layout,
        "COUNT": one.count,
        "CHIPS": one.chips,
        "HOSTS": one.hosts,
        "TYPE": one.accelerator_type,
        "RUNTIME": family.runtime,
        "ACCELERATOR": family.accelerator,
        "MACHINE": family.machine,
    }
    for key, value in told.items():
        print(f"{key}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
