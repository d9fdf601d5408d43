"""Strategies that compute mixtures of experts; all are the same function.

Axes: B batch, T tokens, D model, F feed-forward, E experts, O output width.

| strategy | how |
|---|---|
| `reference` | a plain loop over experts, for tests |
| `stacked` | every expert on every token, gates in rank space (`dense`) |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from medmoe_jax.base.decoder import Execution
from medmoe_jax.errors import UserError
from medmoe_jax.routing import dense
from medmoe_jax.routing.terms import Term


class Strategy(NamedTuple):
    """One way to run mixtures.

    Attributes:
      lora: `{site: terms}` to `{site: delta_BxTxO}`, the sum of the terms of each site of a
        projection group.
      ffn: `(x_BxTxD, gates, params, activation)` to `y_BxTxD`, the gated sum of whole feed-forward
        experts; `params` is `{"gate", "up": [E, D, F], "down": [E, F, D]}`.
    """

    lora: Callable[[Mapping[str, Sequence[Term]]], dict[str, Any]]
    ffn: Callable[..., Any]


def _reference(execution: Execution) -> Strategy:
    del execution
    return Strategy(dense.reference_lora, dense.reference_ffn)


def _stacked(execution: Execution) -> Strategy:
    del execution
    return Strategy(dense.stacked_lora, dense.stacked_ffn)


STRATEGIES: Mapping[str, Callable[[Execution], Strategy]] = {
    "reference": _reference,
    "stacked": _stacked,
}


def strategy(name: str, execution: Execution = Execution()) -> Strategy:
    """The strategy of that name, for the mesh and the chips that `execution` runs on.

    Raises:
      UserError: an unknown name.
    """
    if name not in STRATEGIES:
        raise UserError(f"run.dispatch: '{name}' is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](execution)
