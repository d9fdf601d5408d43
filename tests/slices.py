"""Where kernels are compiled that have no TPU to run on."""

import re

CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")


def compiled(rows, everywhere):
    """`(chip, *row)` for `parametrize`: every row on the first chip, the last ones on all.

    A kernel has the same blocks on every chip unless it is told what the chip has, so the others
    only show whether their instructions do: with the widest arrays, the oddest shapes and every
    number format.
    """
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        (chip, *row) for chip in CHIPS for row in (rows if chip == CHIPS[0] else rows[-everywhere:])
    ]


def kernels_of(program) -> list[str]:
    """Names of the Mosaic kernels in a compiled program, in their order."""
    call = r'%([a-z_]+)[.\w]* = .* custom_call_target="tpu_custom_call"'
    return re.findall(call, program.as_text())
