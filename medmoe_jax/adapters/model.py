"""A decoder with banks: cuts the layers into ranges, each with the seam of its banks.

Axes: B batch, T tokens, D model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medmoe_jax.adapters import foreign
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.nnx_models import BankParam, FrozenBankParam, sow
from medmoe_jax.adapters.seam import AdaptedSeam
from medmoe_jax.base import decoder, trees
from medmoe_jax.base.apart import Apart
from medmoe_jax.base.attention import Branches
from medmoe_jax.base.cache import Cache
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from medmoe_jax.base.module import token_rows
from medmoe_jax.base.seam import (
    BareSeam,
    Context,
    LayerRange,
    Params,
    Seam,
    TravellingSeam,
    activation,
)
from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.mesh_axes import TENSOR
from medmoe_jax.parallel.mesh import check_divides
from medmoe_jax.routing.dispatch import KEPT, AtRest, Strategy, strategy
from medmoe_jax.routing.telemetry import collect


@dataclass(frozen=True)
class AdaptedConfig:
    """Everything static about a decoder and the banks that take part in its forward pass.

    Attributes:
      decoder: shapes of the base.
      banks: the active banks, in order.
      execution: how the base is run.
      dispatch: name of the strategy (`routing.dispatch`).
      travelling: whether tokens travel to weights of which every device holds a part, instead of
        weights to tokens: for few tokens, and no gradients.
    """

    decoder: DecoderConfig
    banks: tuple[BankSpec, ...] = ()
    execution: Execution = field(default_factory=Execution)
    dispatch: str = "stacked"
    travelling: bool = False

    def __post_init__(self) -> None:
        run = strategy(self.dispatch, self.execution)
        check_divides(self.execution.mesh, TENSOR, self.decoder.n_heads, "attention heads")
        for bank in self.banks:
            if bank.routed:
                run.check(f"bank '{bank.name}'", bank.experts)
            if bank.form != "lora" and self.decoder.mlp_bias:
                raise UserError(
                    f"bank '{bank.name}': feed-forward experts have no biases, and this base's "
                    "network has; use banks of form 'lora'"
                )
            for other in self.banks:
                if other is not bank and _clash(bank, other):
                    raise UserError(
                        f"bank '{bank.name}' puts feed-forward experts into layers where bank "
                        f"'{other.name}' sits on mlp sites too; give them other layers or sites"
                    )


def _clash(bank: BankSpec, other: BankSpec) -> bool:
    """Whether `bank`'s networks leave no place for `other` in some layer."""
    if bank.form == "lora" or other.start >= bank.stop or bank.start >= other.stop:
        return False
    on_mlp = any(site in bank.sites for site in other.sites)
    return other.form != "lora" or (bank.form == "ffn" and on_mlp)


def ranges(config: AdaptedConfig, banks: Mapping[str, Any]) -> tuple[LayerRange, ...]:
    """Layer ranges within which the set of banks is constant.

    Args:
      config: names the active banks.
      banks: `{bank: parameters}`; may hold banks that are not active. Their layers lie `Apart`
        where the base's do.
    """
    n_layers = config.decoder.n_layers
    cuts = sorted({0, n_layers, *(c for b in config.banks for c in (b.start, b.stop))})
    out = []
    for start, stop in itertools.pairwise(cuts):
        here = tuple(b for b in config.banks if b.start <= start and stop <= b.stop)
        if not here:
            seam = BareSeam(activation(config.decoder))
            out.append(LayerRange(start, stop, seam=_travelling(config, seam)))
            continue
        params = {b.name: _layers_of(b, banks[b.name], start, stop) for b in here}
        seam = AdaptedSeam(
            on_sites=tuple(b for b in here if b.form == "lora"),
            networks=next((b for b in here if b.form != "lora"), None),
            strategy=_strategy(config),
            activation=activation(config.decoder),
        )
        out.append(LayerRange(start, stop, params, _travelling(config, seam), KEPT))
    return tuple(out)


def _strategy(config: AdaptedConfig) -> Strategy:
    if config.travelling:
        return AtRest(config.execution.weights_at_rest())
    return strategy(config.dispatch, config.execution)


def _travelling(config: AdaptedConfig, seam: Seam) -> Seam:
    return TravellingSeam(seam, config.execution) if config.travelling else seam


def _layers_of(bank: BankSpec, params, start: int, stop: int):
    """A bank's parameters in layers `start..stop-1`; what all layers share is repeated."""
    if isinstance(params, Apart):
        return Apart(params[start - bank.start : stop - bank.start])

    def cut(leaf):
        if leaf.shape[0] == 1 < bank.layers:
            return jnp.broadcast_to(leaf, (stop - start, *leaf.shape[1:]))
        whole = (start, stop) == (bank.start, bank.stop)
        return leaf if whole else leaf[start - bank.start : stop - bank.start]

    return jax.tree.map(cut, params)


def hidden(
    config: AdaptedConfig,
    params: Params,
    banks: Mapping[str, Any],
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array,
    positions_BxT: jax.Array,
    *,
    trained: Params | None = None,
    context: Context = Context(),
    cache: Cache | None = None,
    branches: Branches | None = None,
) -> tuple[jax.Array, Cache | None, tuple[dict[str, RouterStats], ...]]:
    """Final hidden states of the decoder with its active banks; see `base.decoder.hidden`.

    Returns:
      `(x_BxTxD, cache, statistics)`, the last of them a tuple of one dict
      `{"bank/site": RouterStats}` a layer range, in order, with leaves `[layers, ...]`;
      `routing.telemetry.collect` joins them.
    """
    return decoder.hidden(
        config.decoder,
        params,
        tokens_BxT,
        segment_ids_BxT,
        positions_BxT,
        execution=config.execution,
        ranges=ranges(config, banks),
        trained=trained,
        context=context,
        cache=cache,
        branches=branches,
    )


class AdaptedDecoder(nnx.Module):
    """A frozen decoder with banks as an NNX module, for use in other Flax projects.

    The base is held as plain `nnx.Variable`s, the banks that train as `BankParam`s, which are
    `nnx.Param`s: so `nnx.grad` and `nnx.Optimizer(..., wrt=nnx.Param)` see these banks only.
    What gates and dropout need beside the tokens it is told by `adapters.foreign.given`; what its
    routers did, `nnx.capture(model, nnx_models.RouterStatistics)` collects.
    """

    def __init__(
        self,
        config: AdaptedConfig,
        params: Params,
        banks: Mapping[str, Any],
        frozen: Mapping[str, Any] | None = None,
    ) -> None:
        """Holds the arrays as they are.

        Args:
          config: the decoder and its active banks.
          params: the base.
          banks, frozen: `{bank: parameters}` that train, and that do not; `lifecycle.split` gives
            them from a roster, a bank of which the gate alone trains in both.
        """
        self.config = config
        self.base = nnx.data(_wrap(params, nnx.Variable))
        self.banks = nnx.data(_wrap(banks, BankParam))
        self.frozen = nnx.data(_wrap(frozen or {}, FrozenBankParam))

    def __call__(
        self, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array, positions_BxT: jax.Array
    ) -> jax.Array:
        """Float32 logits `[B, T, V]`.

        Args:
          tokens_BxT, segment_ids_BxT, positions_BxT: as of `base.decoder.hidden`.

        Raises:
          ParameterError: one that is not whole numbers `[B, T]`, with a row and a token at least.
          UserError: what `given` has told does not fit the tokens.
        """
        ids = token_rows(
            tokens_BxT=tokens_BxT, segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT
        )
        base, banks, frozen = (nnx.as_pure(x) for x in (self.base, self.banks, self.frozen))
        context = foreign.context_of("the decoder", ids[0].shape)
        x_BxTxD, _, stats = hidden(
            self.config, base, trees.overlay(frozen, banks), *ids, context=context
        )
        sow(self, collect(stats))
        return logits(self.config.decoder, decoder.head(base), x_BxTxD)


def _wrap(tree, kind):
    return {k: _wrap(v, kind) if isinstance(v, Mapping) else kind(v) for k, v in tree.items()}
