"""The seam: what runs a layer's linear work, so that adapters can take part in it.

Axes: B batch, T tokens, D model, F feed-forward, O output width.

The decoder asks a `Seam` for the sites of every projection group and for the feed-forward network.
`BareSeam` answers with the base alone, `adapters.model.AdaptedSeam` with the base and its banks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax

from medmoe_jax.base import quantised
from medmoe_jax.base.config import GROUPS, DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.quantised import Quantised

Params = Mapping[str, Any]


class Context(NamedTuple):
    """What is known of the tokens beside their values, for gates and dropout.

    Attributes:
      segment_ids_BxT: int32, 0 = padding; the decoder sets it.
      layer: [] int32, the layer that is run; the decoder sets it.
      language_ids_BxT: int32, the expert of each token's language, or -1; None where unknown.
      dropout_key: the key of this step's random draws; None = neither dropout nor noise on routers.
      training: whether gates treat the tokens as those of a training step.
    """

    segment_ids_BxT: Any = None
    layer: Any = None
    language_ids_BxT: Any = None
    dropout_key: jax.Array | None = None
    training: bool = False


class Seam(Protocol):
    """Runs the linear work of a layer.

    In both methods `params` are the layer's slice of the `LayerRange`'s own parameters, and the
    second result is a dict of statistics, which comes back stacked over layers.
    """

    def linear(
        self, group: str, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`({site: y_BxTxO}, statistics)` of the sites of a projection group.

        Args:
          group: a key of `base.config.GROUPS`: sites that share an input.
          x_BxTxD: the input.
          weights: `{site: {"kernel", "bias"?}}` of those sites.
          params, context: see above.
        """
        ...

    def mlp(
        self, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[Any, dict[str, Any]]:
        """`(y_BxTxD, statistics)` of the feed-forward network; arguments as in `linear`."""
        ...


@dataclass(frozen=True)
class BareSeam:
    """The base alone.

    Attributes:
      activation: the nonlinearity of the feed-forward network's gate.
    """

    activation: Callable

    def linear(
        self, group: str, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Seam`."""
        del group, params, context
        return {site: project(x_BxTxD, weight) for site, weight in weights.items()}, {}

    def mlp(
        self, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `Seam`."""
        return gated_mlp(self, self.activation, x_BxTxD, weights, params, context)


@dataclass(frozen=True)
class TravellingSeam:
    """A seam for few tokens: they travel to the weights, which stay where they lie.

    Attributes:
      seam: what runs the linear work; it leaves to the compiler what its products are cut by.
      execution: how the rest of the decoder is run.
    """

    seam: Seam
    execution: Execution

    def linear(
        self, group: str, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Seam`."""
        y, stats = self.seam.linear(group, self._there(x_BxTxD), weights, params, context)
        return {site: self._back(y_BxTxO) for site, y_BxTxO in y.items()}, stats

    def mlp(
        self, x_BxTxD: jax.Array, weights: Params, params: Any, context: Context
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `Seam`."""
        y_BxTxD, stats = self.seam.mlp(self._there(x_BxTxD), weights, params, context)
        return self._back(y_BxTxD), stats

    def _there(self, x_BxTxD):
        return self.execution.weights_at_rest().constrain_rows(x_BxTxD)

    def _back(self, y_BxTxO):
        # Pinned before, too: a product of which each device wants its own rows gathers the weight.
        return self.execution.constrain_rows(self._there(y_BxTxO))


@dataclass(frozen=True)
class LayerRange:
    """Layers `start..stop-1`, and what runs their linear work.

    Attributes:
      params: pytree with leading axis `stop - start`, handed to the seam layer by layer; `Apart`
        as the base's layers are.
      seam: what runs them; None = the bare base.
      kept: `{remat: names}`: what of the seam's `checkpoint_name`s the backward pass keeps under a
        rematerialisation of `base.execution.REMAT`.
    """

    start: int
    stop: int
    params: Any = None
    seam: Seam | None = None
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def gated_mlp(
    seam: Seam,
    activation: Callable,
    x_BxTxD: jax.Array,
    weights: Params,
    params: Any,
    context: Context,
) -> tuple[jax.Array, dict[str, Any]]:
    """`W_down (act(W_gate x) ∘ W_up x)`, its sites run by the seam: `(y_BxTxD, statistics)`."""
    inner = {site: weights[site] for site in GROUPS["mlp.in"]}
    y, stats_in = seam.linear("mlp.in", x_BxTxD, inner, params, context)
    h_BxTxF = activation(y["mlp.gate"]) * y["mlp.up"]
    outer = {"mlp.down": weights["mlp.down"]}
    y, stats_out = seam.linear("mlp.out", h_BxTxF, outer, params, context)
    return y["mlp.down"], stats_in | stats_out


def project(x_BxTxD: jax.Array, weight: Params) -> jax.Array:
    """`x W (+ b)` in the dtype of x."""
    kernel = weight["kernel"]
    if isinstance(kernel, Quantised):
        y_BxTxO = quantised.matmul(x_BxTxD, kernel)
    else:
        y_BxTxO = x_BxTxD @ kernel.astype(x_BxTxD.dtype)
    return add_bias(y_BxTxO, weight)


def add_bias(y_BxTxO: jax.Array, weight: Params) -> jax.Array:
    """`y (+ b)` in the dtype of y."""
    if "bias" not in weight:
        return y_BxTxO
    return y_BxTxO + weight["bias"].astype(y_BxTxO.dtype)[None, None]


def activation(config: DecoderConfig) -> Callable:
    """The nonlinearity of the feed-forward network's gate."""
    return {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}[
        config.activation
    ]
