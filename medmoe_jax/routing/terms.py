"""What a strategy is given: the banks on the sites of a projection group.

Axes: B batch, T tokens, D input width, O output width, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from medmoe_jax.kernels.dropout import Dropout
from medmoe_jax.kernels.router_equations import Gates


class LoraTerm(NamedTuple):
    """One bank on one site: what it adds there, `s · B ((x A) ∘ Λ ∘ gates)`.

    Attributes:
      x_BxTxD: the bank's input (after its dropout); terms with the same array share one product.
      dropout: the draw by which that came from the site's input; None where it is the input.
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
    dropout: Dropout | None = None


Terms = Mapping[str, Sequence[LoraTerm]]  # by site
