"""Choice of a strategy by counted work: seconds of each, forward and backward, on one chip.

Axes: T tokens of one chip, K picks a token, D input width, O output width, E experts, r rank,
F feed-forward width.

A low-rank term makes three products of `D + O` with its rank columns: forward, input gradient,
weight gradient. Stacked, all `Σ E·r` columns of a group are computed on T rows; grouped, one
expert's on K·T rows, which are moved forward and backward, each time read and written:

    stacked   3 · product(T, ΣE·r)
    grouped   3 · product(K·T, r) + 4 · K·T·(D + O) · bytes / memory
    product(rows, columns) = max(2 · rows · columns · (D + O) / flops,
                                 rows · (D + O) · bytes / memory)

with the columns filled up to what the chip computes at once. Low-rank banks of `auto` are gathered:
it pays that their tokens travel only from E·r ≈ 2·K·T / 3 on, beyond any published bank.

A feed-forward expert costs 18·D·F FLOPs a row, and 6·D·F more in `stacked`, which recomputes. On a
mesh axis of P devices either the experts are gathered, twice, and their gradients reduced, or the
rows travel, there and back, twice:

    stacked, grouped   9·E·D·F · bytes · (1 − 1/P) / link
    all_to_all         4·K·T·D · bytes · (1 − 1/P) / link
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax

from medmoe_jax.parallel.topology import CHIPS

log = logging.getLogger(__name__)


class Machine(NamedTuple):
    """What one chip does in a second.

    Attributes:
      flops: in products, at the dtype that it trains in.
      memory: bytes to and from its main memory.
      link: bytes to other chips.
      columns: a product with fewer columns takes as long as one with that many.
    """

    flops: float
    memory: float
    link: float
    columns: int


# Only the ratios matter. A TPU's kernel packs experts side by side, up to the matrix unit's width.
_TPU = {
    chip.kind: Machine(
        1e12 * chip.bf16_tflops,
        1e9 * chip.hbm_gb_s,
        1e9 * chip.ici_gb_s,
        chip.columns,
    )
    for chip in CHIPS.values()
}
# Two x86-64 cores with float32, measured: rank 16 runs at a quarter of the speed of rank 64, and
# simulated devices exchange data at the speed of a copy.
_CPU = Machine(250e9, 16e9, 16e9, 64)


def machine(device: jax.Device) -> Machine:
    """The constants of a device; those of a processor where it is not a known TPU."""
    return _TPU.get(device.device_kind, _CPU)


class Lora(NamedTuple):
    """Shapes of a gated low-rank term: `K, D, O, E, r`."""

    picks: int
    d_in: int
    d_out: int
    experts: int
    rank: int


def _filled(columns: int, chip: Machine) -> int:
    return -(-columns // chip.columns) * chip.columns


def lora_seconds(
    chip: Machine, terms: tuple[Lora, ...], tokens: int, itemsize: int
) -> dict[str, float]:
    """`{strategy: seconds}` of the gated terms of a projection group; see the module.

    Args:
      chip: its speed.
      terms: the gated terms of all sites.
      tokens: T.
      itemsize: bytes of a number.
    """

    def product(rows: int, columns: float, width: int) -> float:
        return max(2 * rows * columns * width / chip.flops, rows * width * itemsize / chip.memory)

    total = sum(t.experts * t.rank for t in terms)
    # The columns that fill up the last tile belong to all terms of the group.
    fill = _filled(total, chip) / total
    stacked = grouped = 0.0
    for t in terms:
        width = t.d_in + t.d_out
        stacked += 3 * product(tokens, t.experts * t.rank * fill, width)
        grouped += 3 * product(t.picks * tokens, _filled(t.rank, chip), width)
        grouped += 4 * t.picks * tokens * width * itemsize / chip.memory
    return {"stacked": stacked, "grouped": grouped}


class Ffn(NamedTuple):
    """Shapes of feed-forward experts: `K, D, F, E`, and P devices that they are spread over."""

    picks: int
    d_model: int
    d_ff: int
    experts: int
    devices: int


def ffn_seconds(chip: Machine, experts: Ffn, tokens: int, itemsize: int) -> dict[str, float]:
    """`{strategy: seconds}` of a mixture of feed-forward experts; see the module."""
    K, D, F, E, P = experts
    across = (1 - 1 / P) * itemsize / chip.link
    gather = 9 * E * D * F * across
    one = 6 * D * F / chip.flops
    move = 8 * K * tokens * D * itemsize / chip.memory
    out = {
        "stacked": 4 * E * tokens * one + gather,
        "grouped": 3 * K * tokens * one + move + gather,
    }
    if P > 1 and E % P == 0:
        # Rows are sorted once at home and once where they arrive.
        out["all_to_all"] = 3 * K * tokens * one + 2 * move + 4 * K * tokens * D * across
    return out


@functools.lru_cache(maxsize=1024)
def choose(what: str, chip: Machine, shapes: tuple, tokens: int, itemsize: int) -> str:
    """The fastest strategy for a mixture; logs each distinct choice once.

    Args:
      what: its sites, for the log.
      chip: the speed of one chip.
      shapes: `Lora`s, one a gated term, or one `Ffn`.
      tokens: T.
      itemsize: bytes of a number.
    """
    if isinstance(shapes[0], Ffn):
        seconds = ffn_seconds(chip, shapes[0], tokens, itemsize)
    else:
        seconds = lora_seconds(chip, shapes, tokens, itemsize)
    best = min(seconds, key=seconds.__getitem__)
    log.info(
        "dispatch of %s: %s, for %d tokens a chip (%s)",
        what,
        best,
        tokens,
        ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items()),
    )
    return best
