"""FLOPs of the products of a compiled program, which TPU programs write as convolutions."""

from __future__ import annotations

import math
import re

from medmoe_jax.planning.hlo_text import Computation, Instruction, matched


def product_flops(here: Computation, one: Instruction) -> int:
    """FLOPs of a product, 2 an element pair, padding left out; 0 of any other instruction."""
    if one.opcode == "dot":
        (left,) = here.operands(one)[0].arrays
        summed = math.prod(left.shape[d] for d in one.contracted)
        return 2 * one.arrays[0].size * summed
    if one.opcode == "convolution":
        return _convolution_flops(here, one)
    return 0


def _window(attributes: str, key: str, rank: int, default: str) -> list[str]:
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\dx_\-]+)", attributes)
    return found[1].split("x") if found else [default] * rank


def _convolution_flops(here: Computation, one: Instruction) -> int:
    """2 · batch · outputs · inputs of a group · the pairs of positions that meet data.

    TPU programs write a product as a convolution, a batch of them as one with holes.
    """
    (source,), (kernel,) = (operand.arrays for operand in here.operands(one)[:2])
    (result,) = one.arrays
    left, right, out = matched(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    groups = int((re.search(r"batch_group_count=(\d+)", one.attributes) or [0, 1])[1])
    rank = len(left) - 2
    pads, strides, holes, spread = (
        _window(one.attributes, key, rank, default)
        for key, default in (
            ("pad", "0_0"),
            ("stride", "1"),
            ("lhs_dilate", "1"),
            ("rhs_dilate", "1"),
        )
    )
    pairs = 1
    for d in range(rank):
        size = source.shape[left.index(str(d))]
        pairs *= _pairs(
            size,
            kernel.shape[right.index(str(d))],
            result.shape[out.index(str(d))],
            int(pads[d].split("_")[0]),
            int(strides[d]),
            int(holes[d]),
            int(spread[d]),
        )
    outputs = result.shape[out.index("b")] * result.shape[out.index("f")]
    return 2 * outputs * kernel.shape[right.index("i")] * pairs // groups


def _pairs(size, window, outputs, pad, stride, hole, spread) -> int:
    """Pairs of an output and a kernel position, of one dimension, that meet an input element."""
    total = 0
    for k in range(window):
        at = (o * stride + k * spread - pad for o in range(outputs))
        total += sum(1 for i in at if i % hole == 0 and 0 <= i // hole < size)
    return total
