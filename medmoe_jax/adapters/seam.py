"""The decoder's seam where banks are present.

Axes: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.experts import expert_mlp
from medmoe_jax.adapters.site import adapted_linear
from medmoe_jax.base.seam import Context, Params, gated_mlp
from medmoe_jax.routing.dispatch import Strategy


@dataclass(frozen=True)
class AdaptedSeam:
    """The base with its banks; see `base.seam.Seam`.

    Attributes:
      on_sites: the banks that sit on single sites.
      networks: the bank whose experts are feed-forward networks, or None.
      strategy: runs experts and routers.
      activation: the nonlinearity of the feed-forward network's gate.
    """

    on_sites: tuple[BankSpec, ...]
    networks: BankSpec | None
    strategy: Strategy
    activation: Callable

    def linear(
        self,
        group: str,
        x_BxTxD: jax.Array,
        weights: Params,
        params: Mapping[str, Any],
        context: Context,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `base.seam.Seam`."""
        return adapted_linear(
            self.on_sites, self.strategy, group, x_BxTxD, weights, params, context
        )

    def mlp(
        self, x_BxTxD: jax.Array, weights: Params, params: Mapping[str, Any], context: Context
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `base.seam.Seam`."""
        if self.networks is None:
            return gated_mlp(self, self.activation, x_BxTxD, weights, params, context)
        return expert_mlp(
            self.networks,
            self.strategy,
            self,
            self.activation,
            x_BxTxD,
            weights,
            params,
            context,
        )
