"""What a strategy is given: one bank on one site.

Axes: B batch, T tokens, D input width, O output width, E experts, r rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from medmoe_jax.routing.routers import Gates


class Term(NamedTuple):
    """One bank on one site.

    Attributes:
      x_BxTxD: the bank's input (after its dropout); terms with the same array share one product.
      lora_a_DxExr, lora_b_ExrxO: the experts, float32.
      gates: a router's decision, or None for ones.
      scale_Exr: Λ, or None for ones.
      s: alpha / r.
    """

    x_BxTxD: Any
    lora_a_DxExr: Any
    lora_b_ExrxO: Any
    gates: Gates | None
    scale_Exr: Any
    s: float
