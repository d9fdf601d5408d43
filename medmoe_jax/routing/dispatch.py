"""Strategies that compute mixtures of experts; all are the same function.

Axes: B batch, T tokens, D model, F feed-forward, E experts, O output width.

| strategy | how |
|---|---|
| `reference` | a plain loop over experts, for tests |
| `stacked` | every expert on every token, gates in rank space (`dense`) |
| `grouped` | tokens sorted by expert, each expert on its own (`sparse`) |
| `all_to_all` | the same, experts spread over the mesh axis `expert`, tokens travel to them |
| `auto` | of the last three the one that takes least time by count, for each mixture (`auto`) |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import EXPERT
from medmoe_jax.routing import auto, dense, fused, gating
from medmoe_jax.routing.dispatchers import AllToAll, Local, padded_exchange, ragged_exchange
from medmoe_jax.routing.sparse import Sparse
from medmoe_jax.routing.terms import Term


class Strategy(NamedTuple):
    """One way to run mixtures.

    Attributes:
      linear: `(x_BxTxD, weights, {site: terms})` to `{site: y_BxTxO}`, the sites of a projection
        group with their terms; `weights` as in `base.decoder`.
      lora: `{site: terms}` to `{site: delta_BxTxO}`, the sum of the terms of each site of a
        projection group.
      ffn: `(x_BxTxD, gates, params, activation)` to `y_BxTxD`, the gated sum of whole feed-forward
        experts; `params` is `{"gate", "up": [E, D, F], "down": [E, F, D]}`.
      decide: `(x_BxTxD, valid_BxT, routers)` to the gates and statistics of each `gating.Router`.
      check: `(where, experts)` raises UserError if that many experts cannot be run.
    """

    linear: Callable[..., dict[str, Any]]
    lora: Callable[[Mapping[str, Sequence[Term]]], dict[str, Any]]
    ffn: Callable[..., Any]
    decide: Callable[..., list[gating.Decision]]
    check: Callable[[str, int], None]


def _any_number(where: str, experts: int) -> None:
    """Every number of experts will do."""


def _apart(lora: Callable, ffn: Callable, decide: Callable) -> Strategy:
    """A strategy whose terms are products beside the base's, with any number of experts."""
    return Strategy(functools.partial(dense.linear, lora), lora, ffn, decide, _any_number)


def _routing(execution: Execution) -> Callable[..., list[gating.Decision]]:
    if execution.backend == "xla":
        return gating.decide
    return functools.partial(gating.decide_by_kernel, execution)


def _reference(execution: Execution) -> Strategy:
    del execution
    return _apart(dense.reference_lora, dense.reference_ffn, gating.decide)


def _stacked(execution: Execution) -> Strategy:
    run = _apart(dense.stacked_lora, dense.stacked_ffn, _routing(execution))
    if execution.backend == "xla":
        return run
    return run._replace(linear=functools.partial(fused.linear, execution))


def _grouped(execution: Execution) -> Strategy:
    sparse = Sparse(execution, Local(execution.backend), execution.backend)
    return _apart(sparse.lora, sparse.ffn, _routing(execution))


def _expert_devices(execution: Execution) -> int:
    return execution.size(EXPERT)


def _all_to_all(execution: Execution) -> Strategy:
    devices = _expert_devices(execution)
    if devices == 1:
        return _grouped(execution)

    def check(where: str, experts: int) -> None:
        if experts % devices:
            raise UserError(
                f"{where}: {experts} experts do not divide over run.mesh.{EXPERT} {devices}; give "
                "an axis that divides them, or run.dispatch 'grouped'"
            )

    backend = execution.backend
    exchange = ragged_exchange if execution.platform == "tpu" else padded_exchange
    sparse = Sparse(execution, AllToAll(EXPERT, devices, exchange, backend), backend, EXPERT)
    return _apart(sparse.lora, sparse.ffn, _routing(execution))._replace(check=check)


def _auto(execution: Execution) -> Strategy:
    made = {name: STRATEGIES[name](execution) for name in ("stacked", "grouped", "all_to_all")}
    chip = auto.machine(execution.device)

    def chosen(what: str, shapes: tuple, x_BxTxD) -> Strategy:
        tokens = execution.local_tokens(*x_BxTxD.shape[:2])
        return made[auto.choose(what, chip, shapes, tokens, x_BxTxD.dtype.itemsize)]

    def of(terms: Mapping[str, Sequence[Term]]) -> Strategy:
        gated = [t for some in terms.values() for t in some if t.gates is not None]
        if not gated:
            return made["stacked"]
        shapes = tuple(
            auto.Lora(
                t.gates.picks_BxTxK.shape[-1],
                t.lora_a_DxExr.shape[0],
                t.lora_b_ExrxO.shape[2],
                *t.lora_a_DxExr.shape[1:],
            )
            for t in gated
        )
        return chosen(", ".join(terms), shapes, gated[0].x_BxTxD)

    def linear(x_BxTxD, weights, terms) -> dict[str, Any]:
        return of(terms).linear(x_BxTxD, weights, terms)

    def lora(terms) -> dict[str, Any]:
        return of(terms).lora(terms)

    def ffn(x_BxTxD, gates, params, activation):
        E, D, F = params["gate"].shape
        shape = auto.Ffn(gates.picks_BxTxK.shape[-1], D, F, E, _expert_devices(execution))
        run = chosen("feed-forward experts", (shape,), x_BxTxD)
        return run.ffn(x_BxTxD, gates, params, activation)

    return Strategy(linear, lora, ffn, _routing(execution), _any_number)


STRATEGIES: Mapping[str, Callable[[Execution], Strategy]] = {
    "reference": _reference,
    "stacked": _stacked,
    "grouped": _grouped,
    "all_to_all": _all_to_all,
    "auto": _auto,
}


def strategy(name: str, execution: Execution = Execution()) -> Strategy:
    """The strategy of that name, for the mesh and the chips that `execution` runs on.

    Raises:
      UserError: an unknown name.
    """
    if name not in STRATEGIES:
        raise UserError(f"run.dispatch: '{name}' is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](execution)
