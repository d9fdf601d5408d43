"""Banks inside any Flax NNX model: its linear layers are wrapped where they stand.

Axes: D input width, E experts, r rank, O output width.

    adapt(model, "blocks.*.mlp.*", BankSpec("experts", experts=8, gate="token"), rngs=rngs)
    optimiser = nnx.Optimizer(model, optax.adamw(1e-3), wrt=BankParam)

After `adapt` the model computes what it did; what a layer's banks add is zero at first. Its own
parameters stay `nnx.Param`s, and nobody but the optimiser that is made `wrt=BankParam` changes
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters import foreign, lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.foreign import LinearLayer
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.routing.dispatch import Strategy
from medmoe_jax.routing.dispatch import strategy as strategy_of


class BankParam(nnx.Param):
    """A parameter of a bank that trains."""


class FrozenBankParam(nnx.Variable):
    """A parameter of a bank that does not train, whichever parameters of the model do."""


class RouterStatistics(nnx.Intermediate):
    """What routers sow: `nnx.capture(model, RouterStatistics)(x)` gives `(y, collected)`.

    `foreign.statistics` reads `collected`.
    """


def sow(module: nnx.Module, stats: Mapping[str, RouterStats]) -> None:
    """Gives a capture of `RouterStatistics` those of a module's call."""
    # Outside of a capture `sow` would leave the statistics in the model.
    if any(isinstance(one, RouterStatistics) for one in getattr(module, "__captures__", ())):
        for key, one in stats.items():
            module.sow(RouterStatistics, key, one, foreign.sum_of, lambda: None)


class AdaptedLinear(nnx.Module):
    """A linear layer with its banks: `y = base(x) + Σ_banks s B(gate ∘ Λ ∘ A x)`.

    Attributes:
      base: the layer as it was.
      layer: its path and shapes.
      strategy: runs experts and routers.
      roster: `((BankSpec, state), ...)`; the states are those of `adapters.lifecycle`.
      banks: `{bank: parameters}`, with `mix` beside the layer's own where mixing weights, which all
        layers of a bank share, are the gate.
    """

    def __init__(self, base: nnx.Module, layer: LinearLayer, strategy: Strategy) -> None:
        self.base: Any = base
        self.layer = layer
        self.strategy = strategy
        self.roster: tuple[tuple[BankSpec, str], ...] = ()
        self.banks = nnx.data({})

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """The layer's output; all arguments are the layer's own."""
        y = self.base(inputs, *args, **options)
        specs = lifecycle.active_banks(_roster_of(self))
        if not specs:
            return y
        params = {spec.name: _tree_of(self, spec.name) for spec in specs}
        x = inputs.astype(y.dtype)
        delta, stats = foreign.delta(self.layer, specs, self.strategy, x, params)
        sow(self, stats)
        return y + delta

    def __getattr__(self, name: str) -> Any:
        """What the model reads of the layer that stood here, such as its `kernel`."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(vars(self)["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model changes of the layer that stood here, such as its `kernel`."""
        base = vars(self).get("base")
        mine = base is None or name.startswith("_") or name in vars(self)
        if mine or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)


# No methods: `nnx.tabulate` shows what methods return, and these return no arrays.
def _roster_of(layer: AdaptedLinear) -> dict[str, tuple[BankSpec, str]]:
    """A layer's roster as `adapters.lifecycle` has it."""
    return {spec.name: (spec, state) for spec, state in layer.roster}


def _tree_of(layer: AdaptedLinear, name: str) -> dict[str, Any]:
    """A bank's arrays in a layer, `{site: parameters, "mix"?}`."""
    leaves = dict(nnx.as_pure(layer.banks[name]))
    mix = {"mix": leaves.pop("mix")} if "mix" in leaves else {}
    return {layer.layer.site: leaves, **mix}


def adapt(
    model: nnx.Module,
    patterns: str | Sequence[str],
    banks: BankSpec | Sequence[BankSpec],
    *,
    rngs: nnx.Rngs,
    dispatch: str | None = None,
    execution: Execution | None = None,
) -> tuple[str, ...]:
    """Puts banks on the linear layers of a model that match, in place; returns their paths.

    A layer that has banks already gets more, so that every pattern can have its own.

    Args:
      model: any NNX model; its `nnx.Linear` and `nnx.LinearGeneral` layers can have banks.
      patterns: globs on paths, such as `blocks.*.mlp.*`; each has to match a linear layer.
      banks: what is added to every layer that matches; `sites`, `start` and `stop` are filled in.
      rngs: its stream `params` draws A and the routers; B is zero.
      dispatch: a strategy of `routing.dispatch`, for all banks of these layers; None = as the
        layers that have banks run theirs, else `stacked`.
      execution: where they are run; `foreign.on_mesh` for a mesh; None = likewise.

    Raises:
      ParameterError: a pattern that matches no linear layer; layers whose kernels are no matrix;
        experts that the mesh does not divide; layers whose banks are run in another way.
      UserError: a bank that such layers cannot have, or a name that is there already.
    """
    specs = (banks,) if isinstance(banks, BankSpec) else tuple(banks)
    linear, others = _modules(model)
    paths = foreign.matched(patterns, tuple(linear), others)
    chosen = {path: linear[path] for path in paths}
    _check_reached(model, chosen)
    strategy = _strategy(chosen, dispatch, execution)
    layers = [_layer(path, linear[path]) for path in paths]
    specs = foreign.added(roster(model), specs, layers, strategy)
    params = {s.name: foreign.init(s, layers, rngs.params(), strategy) for s in specs}
    wrappers = {
        path: one if isinstance(one, AdaptedLinear) else AdaptedLinear(one, layer, strategy)
        for path, layer in zip(paths, layers, strict=True)
        for one in (linear[path],)
    }
    for spec in specs:
        leaves = params[spec.name]
        mix = {"mix": _wrapped(leaves["mix"])} if "mix" in leaves else {}
        for path, wrapper in wrappers.items():
            own = {**_wrapped(leaves[path]), **mix}
            wrapper.strategy = strategy
            wrapper.roster = (*wrapper.roster, (spec, "train"))
            wrapper.banks = nnx.data({**wrapper.banks, spec.name: own})
    by_id = {id(linear[path]): wrapper for path, wrapper in wrappers.items()}
    _replace(model, lambda module: by_id.get(id(module), module))
    return paths


def _wrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _wrapped(v) if isinstance(v, Mapping) else BankParam(v) for k, v in tree.items()}


def _modules(model: nnx.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Linear layers by path, and what all other modules are."""
    modules = {".".join(map(str, parts)): one for parts, one in nnx.iter_modules(model)}
    within = tuple(f"{path}." for path, m in modules.items() if isinstance(m, AdaptedLinear))
    # They look their layer's parameters up by paths that banks change.
    normed = tuple(f"{path}." if path else "" for path, m in modules.items() if _normalises(m))
    linear: dict[str, Any] = {}
    others: dict[str, str] = {}
    for path, module in modules.items():
        if path.startswith(within):
            continue
        if path.startswith(normed):
            others[path] = "inside of a layer that normalises its weights"
            continue
        if isinstance(module, AdaptedLinear):
            linear[module.layer.site] = module
        elif isinstance(module, nnx.Linear | nnx.LinearGeneral) and path:
            linear[path] = module
        else:
            others[path] = f"of {type(module).__name__}"
    return linear, others


def _normalises(module: nnx.Module) -> bool:
    return isinstance(module, nnx.WeightNorm | nnx.SpectralNorm)


def _layer(path: str, module: Any) -> LinearLayer:
    if isinstance(module, AdaptedLinear):
        return module.layer
    general = isinstance(module, nnx.LinearGeneral)
    axes, inputs, outputs = (
        (module.axis, module.in_features, module.out_features)
        if general
        else ((-1,), (module.in_features,), (module.out_features,))
    )
    kernel = module.kernel.get_value()
    if general and module.batch_axis:
        raise ParameterError(f"patterns: layer '{path}' has a kernel a batch entry (batch_axis)")
    if kernel.shape != (*inputs, *outputs) or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ParameterError(
            f"patterns: the kernel of layer '{path}' is {kernel.dtype} {kernel.shape}, not floats "
            f"{(*inputs, *outputs)}; layers that are stacked (nnx.vmap) or quantised take no banks"
        )
    return LinearLayer(path, axes, inputs, outputs)


def _replace(node: Any, swap: Callable[[nnx.Module], Any], seen: dict[int, Any] | None = None):
    """The node with each module below it as `swap` gives it, in place but for tuples."""
    seen = {} if seen is None else seen
    if not isinstance(node, nnx.Module | dict | list | tuple):
        return node
    if id(node) in seen:
        return seen[id(node)]
    new = swap(node) if isinstance(node, nnx.Module) else node
    seen[id(node)] = new
    if new is not node:
        return new
    if isinstance(node, tuple):
        items = [_replace(child, swap, seen) for child in node]
        if any(a is not b for a, b in zip(items, node, strict=True)):
            new = type(node)(*items) if hasattr(node, "_fields") else tuple(items)
        return new
    if isinstance(node, list):
        children, put = list(enumerate(node)), node.__setitem__
    elif isinstance(node, dict):
        children, put = list(node.items()), node.__setitem__
    else:
        children = [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
        put = lambda key, value: setattr(node, key, value)  # noqa: E731
    for key, child in children:
        other = _replace(child, swap, seen)
        if other is not child:
            put(key, other)
    return node


def _strategy(
    layers: Mapping[str, nnx.Module], dispatch: str | None, execution: Execution | None
) -> Strategy:
    """What runs all banks of some layers, in which some may be already."""
    there = {
        path: one.strategy
        for path, one in layers.items()
        if isinstance(one, AdaptedLinear) and one.roster
    }
    if dispatch is None and execution is None and there:
        chosen = next(iter(there.values()))
    else:
        chosen = strategy_of(dispatch or "stacked", execution or Execution())
    for path, strategy in there.items():
        if strategy != chosen:
            raise ParameterError(
                f"dispatch: layer '{path}' has banks that run by {type(strategy).__name__} on "
                f"{'a mesh' if strategy.execution.mesh else 'no mesh'}; give the dispatch and "
                "execution that these were given, or neither"
            )
    return chosen


def _check_reached(model: nnx.Module, layers: Mapping[str, nnx.Module]) -> None:
    reached: dict[int, Any] = {}
    _replace(model, lambda module: module, reached)
    for path, layer in layers.items():
        if id(layer) not in reached:
            raise ParameterError(
                f"patterns: layer '{path}' is held by no module, list, tuple or dict, "
                "so that nothing can be put in its place; hold it in one of these"
            )


def _adapted(model: nnx.Module) -> list[AdaptedLinear]:
    """All adapted layers; who goes through them may change them."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedLinear)]


def roster(model: nnx.Module) -> dict[str, tuple[BankSpec, str]]:
    """The model's banks and their states, as `adapters.lifecycle` has them."""
    return {name: one for layer in _adapted(model) for name, one in _roster_of(layer).items()}


def bank_tree(model: nnx.Module) -> dict[str, Any]:
    """`{bank: {site: parameters}}`: the tree that losses on parameters and `lifecycle` take.

    Read inside of a loss, it carries gradients.
    """
    out: dict[str, Any] = {name: {} for name in roster(model)}
    for layer in _adapted(model):
        for name in layer.banks:
            out[name] |= _tree_of(layer, name)
    return out


def no_statistics(model: nnx.Module) -> nnx.State:
    """What a capture begins with whose layers run in a loop of Flax, which takes on nothing new:

    nnx.capture(model, RouterStatistics, init=no_statistics(model))(x)
    """
    out = nnx.State({})
    for parts, layer in nnx.iter_modules(model):
        if not isinstance(layer, AdaptedLinear):
            continue
        routed = [spec for spec in lifecycle.active_banks(_roster_of(layer)) if spec.routed]
        here: Any = out
        for part in parts if routed else ():
            here = here.setdefault(part, nnx.State({}))
        for spec in routed:
            key = f"{spec.name}/{layer.layer.site}"
            here[key] = RouterStatistics(foreign.no_statistics(spec.experts))
    return out


def set_state(model: nnx.Module, name: str, state: str) -> None:
    """Puts a bank into another state: `train`, `gate` (routers and mixing weights train), `frozen`
    or `off` (kept, but absent from the forward).

    What trains is a `BankParam`, the rest a `FrozenBankParam`. Make the optimiser anew afterwards.

    Raises:
      UserError: no such bank or state.
    """
    states = foreign.in_state(roster(model), name, state)
    done: dict[int, Any] = {}

    def of_kind(tree, trains):
        return {
            key: of_kind(value, trains or (state == "gate" and key in ("router", "mix")))
            if isinstance(value, Mapping)
            else _as(BankParam if trains else FrozenBankParam, value, done)
            for key, value in tree.items()
        }

    for layer in _adapted(model):
        if name in layer.banks:
            banks = {**layer.banks, name: of_kind(layer.banks[name], state == "train")}
            layer.banks = nnx.data(banks)
            layer.roster = tuple(states[spec.name] for spec, _ in layer.roster)


def _as(kind, variable, done):
    """The variable as one of another kind; one that layers share stays one."""
    if type(variable) is kind:
        return variable
    if id(variable) not in done:
        # Kept beside the new one, or another could have its address.
        done[id(variable)] = (
            variable,
            kind(variable.get_value(), **variable.get_metadata(exclude_required=True)),
        )
    return done[id(variable)][1]


def freeze(model: nnx.Module, name: str) -> None:
    """Keeps a bank in the forward but untrained; see `set_state`."""
    set_state(model, name, "frozen")


def drop(model: nnx.Module, name: str) -> None:
    """Takes a bank and its routers away.

    Raises:
      UserError: no such bank.
    """
    lifecycle.find(roster(model), name)
    for layer in _adapted(model):
        if name in layer.banks:
            layer.banks = nnx.data({k: v for k, v in layer.banks.items() if k != name})
            layer.roster = tuple(one for one in layer.roster if one[0].name != name)


def merge(model: nnx.Module, name: str) -> None:
    """Adds a bank to the kernels of its layers, `W += s Σ_e A_e Λ_e B_e`, and takes it away.

    Raises:
      UserError: no such bank, its gate depends on the token, or a kernel is not just what its layer
        multiplies by; nothing is changed.
    """
    spec, _ = lifecycle.find(roster(model), name)
    lifecycle.check_mergeable(spec)
    layers = [layer for layer in _adapted(model) if name in layer.banks]
    _check_kernels(model, layers)
    for layer in layers:
        _merge_into(layer, (spec,))
    drop(model, name)


def fold(model: nnx.Module) -> None:
    """Adds all banks that take part to the kernels, in one rounding, and gives the layers back.

    Afterwards the model has no trace of `adapt`; banks that were off are gone.

    Raises:
      UserError: a bank's gate depends on the token, or a kernel is not just what its layer
        multiplies by; nothing is changed.
    """
    for spec in lifecycle.active_banks(roster(model)):
        lifecycle.check_mergeable(spec)
    layers = _adapted(model)
    _check_kernels(model, layers)
    for layer in layers:
        _merge_into(layer, lifecycle.active_banks(_roster_of(layer)))
    _replace(model, lambda one: one.base if isinstance(one, AdaptedLinear) else one)


def _check_kernels(model: nnx.Module, layers: Sequence[AdaptedLinear]) -> None:
    """Raise UserError where a kernel does more than its layer's product, or does another one."""
    users = _users(model)
    for layer in layers:
        if len(paths := users[id(layer.base.kernel)]) > 1:
            raise UserError(
                f"{' and '.join(paths)} share one kernel: banks of one layer cannot be merged "
                "into it"
            )
        # At once also within a compiled function, in which the model's numbers are not known.
        with jax.ensure_compile_time_eval():
            twin, x = _twin(layer.base), foreign.probe(layer.layer)
            y, kernel = twin(x), twin.kernel.get_value()
            twin.kernel.set_value(jnp.zeros_like(kernel))
            if not foreign.is_product(layer.layer, kernel, y - twin(x)):
                raise UserError(
                    f"layer '{layer.layer.site}' ({type(layer.base).__name__}) does not multiply "
                    "by its kernel as it stands: banks cannot be merged into it; keep them beside "
                    "it"
                )


def _users(model: nnx.Module) -> dict[int, list[str]]:
    """The paths at which each variable is held, by its id."""
    users: dict[int, list[str]] = {}
    for parts, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            continue
        children, _ = jax.tree.flatten_with_path(node, is_leaf=lambda one, of=node: one is not of)
        for key, child in children:
            if isinstance(child, nnx.Variable):
                path = ".".join((*map(str, parts), jax.tree_util.keystr(key, simple=True)))
                users.setdefault(id(child), []).append(path)
    return users


def _twin(base: nnx.Module) -> Any:
    """A layer like this one, its floats drawn anew."""
    graph, state = nnx.split(base)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(rng.random(leaf.shape, np.float32) - 0.5, leaf.dtype)

    return nnx.merge(graph, jax.tree.map(draw, state))


def _merge_into(layer: AdaptedLinear, specs: Sequence[BankSpec]) -> None:
    members = [(spec, _tree_of(layer, spec.name)) for spec in specs]
    kernel = layer.base.kernel
    kernel.set_value(foreign.merged_kernel(layer.layer, members, kernel.get_value()))


def count(model: nnx.Module) -> int:
    """Number of parameters that train."""
    return bank_lib.count(nnx.to_pure_dict(nnx.state(model, BankParam)))
