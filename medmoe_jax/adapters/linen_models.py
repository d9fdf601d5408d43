"""Banks inside any Flax Linen model: its linear layers are intercepted while it runs.

    adapted, banks = adapt(model, "Block_*.Dense_*", BankSpec("lora"), key, x)

    def loss(banks):
        with adapted.on(banks):
            return criterion(model.apply(variables, x))

The model, its variables and its code stay as they are. The banks are a tree of their own, which is
all that `jax.grad` and an optimiser are given; what they add is zero at first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from medmoe_jax.adapters import foreign, lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.foreign import LinearLayer, Within
from medmoe_jax.base import trees
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.routing.dispatch import Strategy
from medmoe_jax.routing.dispatch import strategy as strategy_of

# The collection that routers sow into: `model.apply(..., mutable=[STATISTICS])` gives it, and
# `foreign.statistics` reads it.
STATISTICS = "router_statistics"


def _path(module: nn.Module) -> str:
    return ".".join(module.path)


def _linear(module: nn.Module, method: str) -> bool:
    kinds = (nn.Dense, nn.DenseGeneral)
    return method == "__call__" and isinstance(module, kinds) and bool(module.path)


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _asks(model: nn.Module) -> bool:
    """Whether a call of the model is to give the statistics; `mutable=True` names none."""
    filters = None if model.scope is None else model.scope.mutable
    return not isinstance(filters, bool) and model.is_mutable_collection(STATISTICS)


@dataclass(frozen=True)
class Adapted:
    """Which layers of a model have banks, and how they are run; the parameters are kept apart.

    Its methods change nothing: they return a new one.

    Attributes:
      linear: the linear layers of the model, those that cannot have banks with the reason.
      others: `(path, what it is)` of all other modules.
      strategy: runs experts and routers.
      roster: `((BankSpec, state), ...)`; the states are those of `adapters.lifecycle`.
    """

    linear: tuple[tuple[LinearLayer, str], ...]
    others: tuple[tuple[str, str], ...]
    strategy: Strategy
    roster: tuple[tuple[BankSpec, str], ...] = ()

    def roster_by_name(self) -> dict[str, tuple[BankSpec, str]]:
        """The roster as `adapters.lifecycle` has it."""
        return {spec.name: (spec, state) for spec, state in self.roster}

    def _with(self, roster) -> Adapted:
        return dataclasses.replace(self, roster=tuple(roster.values()))

    def add(
        self,
        banks: Mapping[str, Any],
        patterns: str | Sequence[str],
        specs: BankSpec | Sequence[BankSpec],
        key: jax.Array,
    ) -> tuple[Adapted, dict[str, Any]]:
        """More banks on the layers that match: `(adapted, banks)`; arguments as of `adapt`."""
        specs = (specs,) if isinstance(specs, BankSpec) else tuple(specs)
        by_path = {layer.site: (layer, fault) for layer, fault in self.linear}
        paths = foreign.matched(patterns, tuple(by_path), dict(self.others))
        layers = [by_path[path][0] for path in paths]
        for path in paths:
            if by_path[path][1]:
                raise ParameterError(f"patterns: layer '{path}' {by_path[path][1]}")
        specs = foreign.added(self.roster_by_name(), specs, layers, self.strategy)
        new = {spec.name: foreign.init(spec, layers, key, self.strategy) for spec in specs}
        roster = self.roster_by_name() | {spec.name: (spec, "train") for spec in specs}
        return self._with(roster), {**banks, **new}

    @contextlib.contextmanager
    def on(self, banks: Mapping[str, Any]) -> Generator[None]:
        """Within it the model computes with its banks.

        Enter it inside of the function that is compiled or differentiated.

        Args:
          banks: `{bank: parameters}` of all banks that are not off.

        Raises:
          UserError: a bank's parameters are not all there; a compiled function is called inside, or
            none of the model's adapted layers; statistics that are asked for are dropped.
        """
        layers = {layer.site: layer for layer, _ in self.linear}
        specs = lifecycle.active_banks(self.roster_by_name())
        for spec in specs:
            leaves = banks.get(spec.name, {})
            if not all({"lora_a", "lora_b"} <= set(leaves.get(site, ())) for site in spec.sites):
                raise UserError(
                    f"on: not all parameters of bank '{spec.name}' are there; give those that do "
                    "not train, too: base.trees.overlay(frozen, trained)"
                )
        told = Within("on", banks)
        met: set[str] = set()
        asked, depth = False, 0

        def intercept(call, args, kwargs, context):
            nonlocal asked, depth
            if depth == 0:
                asked = _asks(context.module)
            depth += 1
            try:
                y = call(*args, **kwargs)
            finally:
                depth -= 1
            if not _linear(context.module, context.method_name):
                return y
            path = _path(context.module)
            here = tuple(spec for spec in specs if path in spec.sites)
            if not here:
                return y
            met.add(path)
            (x,) = (*args, *kwargs.values())
            params = {spec.name: told.read()[spec.name] for spec in here}
            delta, stats = foreign.delta(
                layers[path], here, self.strategy, jnp.asarray(x, y.dtype), params
            )
            # What `init` keeps, every later call would begin with.
            counted = {} if context.module.is_initializing() else stats
            for key, one in counted.items():
                kept = context.module.sow(STATISTICS, key, one, foreign.sum_of, lambda: None)
                if asked and not kept:
                    raise UserError(
                        f"layer '{path}': a transformation around it (nn.scan, nn.vmap) drops its "
                        f"statistics; give that variable_axes={{'{STATISTICS}': 0}}, or do not ask "
                        "for them"
                    )
            return y + delta

        with nn.intercept_methods(intercept), foreign.block():
            yield
        if specs and not met:
            raise UserError(
                f"on: no layer with banks was called, such as '{specs[0].sites[0]}'; call the "
                "model that was adapted, and enter the block inside of what is compiled"
            )

    def set_state(self, name: str, state: str) -> Adapted:
        """With a bank in another state; see `lifecycle.set_state`."""
        return self._with(foreign.in_state(self.roster_by_name(), name, state))

    def freeze(self, name: str) -> Adapted:
        """With a bank that stays in the forward but does not train."""
        return self.set_state(name, "frozen")

    def split(self, banks: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(frozen, trained)`; `base.trees.overlay(frozen, trained)` puts them together again."""
        return lifecycle.split(self.roster_by_name(), banks)

    def drop(self, banks: Mapping[str, Any], name: str) -> tuple[Adapted, dict[str, Any]]:
        """Without a bank and its routers: `(adapted, banks)`."""
        roster, banks = lifecycle.drop(self.roster_by_name(), banks, name)
        return self._with(roster), banks

    def merge(
        self, variables: Mapping[str, Any], banks: Mapping[str, Any], name: str
    ) -> tuple[Adapted, dict[str, Any], dict[str, Any]]:
        """A bank inside the kernels, `W += s Σ_e A_e Λ_e B_e`: `(adapted, banks, variables)`.

        Raises:
          UserError: no such bank, or its gate depends on the token.
        """
        spec, _ = lifecycle.find(self.roster_by_name(), name)
        merged = self._merged(variables, [(spec, banks[name])])
        return *self.drop(banks, name), merged

    def fold(self, variables: Mapping[str, Any], banks: Mapping[str, Any]) -> dict[str, Any]:
        """The variables with all banks that take part inside the kernels, in one rounding.

        Raises:
          UserError: a bank's gate depends on the token.
        """
        active = lifecycle.active_banks(self.roster_by_name())
        return self._merged(variables, [(spec, banks[spec.name]) for spec in active])

    def _merged(self, variables, members):
        out = dict(variables)
        for layer, _ in self.linear:
            if not any(layer.site in spec.sites for spec, _ in members):
                continue
            path = f"params.{layer.site}.kernel"
            held = trees.get(variables, path)
            boxed = isinstance(held, nn.meta.AxisMetadata)
            kernel = foreign.merged_kernel(layer, members, held.unbox() if boxed else held)
            kernel = held.replace_boxed(kernel) if boxed else kernel
            out = trees.overlay(out, trees.unflatten([(path, kernel)]))
        return out


def adapt(
    model: nn.Module,
    patterns: str | Sequence[str],
    banks: BankSpec | Sequence[BankSpec],
    key: jax.Array,
    *inputs: Any,
    dispatch: str = "stacked",
    execution: Execution = Execution(),
    **options: Any,
) -> tuple[Adapted, dict[str, Any]]:
    """Banks for the linear layers of a model that match: `(adapted, parameters)`.

    Args:
      model: any Linen model; its `nn.Dense` and `nn.DenseGeneral` layers can have banks.
      patterns: globs on paths, such as `Block_*.Dense_*`; each has to match a linear layer.
      banks: what is put on every layer that matches; `sites`, `start` and `stop` are filled in.
      key: draws A and the routers; B is zero.
      inputs, options: what the model is called with, to see its layers; nothing is computed.
      dispatch: a strategy of `routing.dispatch`.
      execution: where banks are run; `foreign.on_mesh` for a mesh.

    Raises:
      ParameterError: a pattern that matches no linear layer; layers whose kernels are no matrix;
        experts that the mesh does not divide.
      UserError: a bank that such layers cannot have, or a name that is there already.
    """
    linear: dict[str, tuple[LinearLayer, str]] = {}
    others: dict[str, str] = {}

    def look(call, args, kwargs, context):
        y = call(*args, **kwargs)
        module = context.module
        if _linear(module, context.method_name):
            (x,) = (*args, *kwargs.values())
            linear[_path(module)] = _layer(module, jnp.shape(x))
        elif context.method_name == "__call__":
            others[_path(module)] = f"of {type(module).__name__}"
        return y

    with nn.intercept_methods(look):
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        variables = nn.meta.unbox(jax.eval_shape(lambda: model.init(rngs, *inputs, **options)))
    for path, (layer, fault) in linear.items():
        if fault:
            continue
        shape = trees.get(variables, f"params.{path}.kernel").shape
        if shape != (*layer.inputs, *layer.outputs):
            fault = (
                f"has a kernel {shape}: layers that are stacked (nn.scan, nn.vmap) take no banks"
            )
            linear[path] = (layer, fault)
    strategy = strategy_of(dispatch, execution)
    adapted = Adapted(tuple(linear.values()), tuple(others.items()), strategy)
    return adapted.add({}, patterns, banks, key)


def _layer(module: nn.Dense | nn.DenseGeneral, shape: tuple[int, ...]) -> tuple[LinearLayer, str]:
    axes = _tuple(getattr(module, "axis", -1))
    inputs = tuple(shape[axis] for axis in sorted(axis % len(shape) for axis in axes))
    layer = LinearLayer(_path(module), axes, inputs, _tuple(module.features))
    if any("." in name for name in module.path):
        return layer, "has a '.' in one of its names, which stands between them; rename it"
    batched = getattr(module, "batch_dims", ())
    return layer, "has a kernel a batch entry (batch_dims)" if batched else ""
