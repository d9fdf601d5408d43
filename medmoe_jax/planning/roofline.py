"""The least time that a step can take on a chip, and the least work that it has to do.

Axes: T tokens of a step, P weights of the base's products (linear sites and head), H heads, h head
dimension, L layers.

A chip's four resources work at once, so the bound is the greatest of their times, not the sum: the
compiler runs collectives and fetches beside products, and a bound must not forbid what it may do.

    products   FLOPs / peak in bf16
    memory     bytes to and from HBM / its bandwidth
    ici        bytes received within the slice / half the links' figure, that of both directions
    dcn        bytes received from other slices / the chip's share of its host's network

A frozen base needs 2 P T FLOPs forward and 2 P' T for the gradients of activations, P' being what
lies at or above the lowest trainable bank; base leaves that train, another 2 P'' T for their own
gradients. Attention needs 4 H h FLOPs a layer for each key that a query sees, twice that
backward; causal, it sees half the row, and behind a window only what lies in it. Adapters, routers
and what is computed again are not in this floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.parallel.topology import Chip


class Bound(NamedTuple):
    """Seconds that each resource of a chip is busy."""

    products: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The least that the program takes."""
        return max(self)

    @property
    def resource(self) -> str:
        """The one that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def bound(chip: Chip, flops: float, memory: float, ici: float = 0.0, dcn: float = 0.0) -> Bound:
    """The times of FLOPs and of bytes to and from HBM, within and between slices."""
    return Bound(
        flops / (1e12 * chip.bf16_tflops),
        memory / (1e9 * chip.hbm_gb_s),
        ici / (0.5e9 * chip.ici_gb_s),
        dcn / (1e9 * chip.dcn_gb_s),
    )


def lowest_layer(roster: Roster, trained: Mapping[str, Any], n_layers: int) -> int:
    """The lowest layer through which gradients of activations must pass.

    Args:
      roster: the stage's banks.
      trained: the base leaves that it trains.
      n_layers: L, which is also the answer where no layer is concerned.
    """
    starts = [spec.start for spec, state in roster.values() if state in ("train", "gate")]
    if "embed" in trained or "layers" in trained:
        starts.append(0)
    return min(starts, default=n_layers)


def layer_weights(decoder: DecoderConfig) -> int:
    """Weights of one layer's linear sites."""
    return sum(d_in * d_out for d_in, d_out in site_shapes(decoder).values())


def _seen(length: int, window: int) -> float:
    """Keys that a query of a row sees in the mean; a window of 0, or of the whole row, hides none.

    A causal mask is taken for a triangle, of which a window cuts off a smaller one.
    """
    return window - window**2 / (2 * length) if 0 < window < length else length / 2


def floor_flops(
    decoder: DecoderConfig, tokens: int, length: int, lowest: int, trained: Mapping[str, Any]
) -> float:
    """FLOPs that a step cannot do without; see the module.

    Args:
      decoder: the base.
      tokens: T, in rows of `length`.
      length: tokens of a row.
      lowest: from `lowest_layer`.
      trained: the base leaves that it trains.
    """
    above = decoder.n_layers - lowest
    head = decoder.vocab_size * decoder.d_model
    used = {"embed"} if decoder.tied else {"head"}
    own = sum(
        leaf.size
        for path, leaf in trees.flatten(trained)
        if path in used or path.endswith(".kernel")
    )
    layer = layer_weights(decoder)
    products = 2 * (decoder.n_layers * layer + head) + 2 * (above * layer + head) + 2 * own
    seen = [_seen(length, window) for window in decoder.windows or (0,) * decoder.n_layers]
    attention = 4 * decoder.n_heads * decoder.head_dim * (sum(seen) + 2 * sum(seen[lowest:]))
    return float(tokens * (products + attention))
