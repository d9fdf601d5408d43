"""Banks on the linear layers of models written elsewhere: what NNX and Linen models share.

Axes: B rows, T tokens of a row, D input width, E experts, r rank, O output width.

A site is one linear layer, named by its path in the model, such as `blocks.0.mlp.up`. A bank there
is the same function as on a site of our decoder (`adapters.site`), and its parameters are the same
tree, `{site: {"lora_a": [1, D, E, r], ...}}`, with one layer a site: `lifecycle.stack`,
`orthogonality` and what else takes banks takes these. `nnx_models` and `linen_models` put them
into models.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.adapters.site import site_terms
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.mesh_axes import BATCH_AXES, EXPERT, MAKE_AUTO
from medmoe_jax.parallel.rules import spec_for
from medmoe_jax.routing.dispatch import AllToAll, Strategy

# Where the banks of `all_to_all` lie: a device has its own experts. All else is whole everywhere.
_TRAVEL = (
    (r"\.lora_a$", (None, None, EXPERT, None)),
    (r"\.lora_b$", (None, EXPERT, None, None)),
    (r"", ()),
)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model.

    Attributes:
      site: its path, joined by dots.
      axes: the axes of its input that it contracts.
      inputs, outputs: the shapes of its input's features and of its output's.
    """

    site: str
    axes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, int]:
        """`(D, O)`."""
        return math.prod(self.inputs), math.prod(self.outputs)

    def features_last(self, x: jax.Array) -> jax.Array:
        """Its input as `[..., D]`."""
        last = tuple(range(-len(self.axes), 0))
        # The kernel's order is that of the sorted axes, as `dot_general` takes them.
        x = jnp.moveaxis(x, sorted(axis % x.ndim for axis in self.axes), last)
        return x.reshape(*x.shape[: -len(last)], self.widths[0])


def on_mesh(mesh: Mesh, rows: Sequence[str] | None = None, kernels: str = "auto") -> Execution:
    """How banks are run on a mesh.

    Args:
      mesh: of devices; with `all_to_all` the experts lie over its axis `expert`.
      rows: the axes that the first axis of the layers' inputs is cut over; None: those of `data`,
        `fsdp` and `expert` that the mesh has.
      kernels: see `Execution`.

    Raises:
      ParameterError: no such axes, or one that is not of type Auto.
    """
    if rows is None:
        rows = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
        if not rows:
            raise ParameterError(
                f"rows: the mesh has the axes {', '.join(mesh.shape)}; name those that the rows "
                "of a batch are cut over"
            )
    if unknown := [axis for axis in rows if axis not in mesh.shape]:
        raise ParameterError(f"rows: '{unknown[0]}' is none of the axes {', '.join(mesh.shape)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ParameterError(f"mesh: its axes must be of type Auto: {MAKE_AUTO}")
    return Execution(
        kernels=kernels, activations=NamedSharding(mesh, PartitionSpec(tuple(rows), None, None))
    )


def matched(
    patterns: str | Sequence[str], linear: Sequence[str], others: Mapping[str, str]
) -> tuple[str, ...]:
    """The linear layers that match any of the globs, in the model's order.

    Args:
      patterns: on paths, such as `blocks.*.mlp.*`.
      linear: paths of the layers that banks can sit on.
      others: `{path: what it is}` of other modules, for the message.

    Raises:
      ParameterError: a pattern matches no linear layer.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        raise ParameterError("patterns: none is given; name layers such as 'blocks.*.mlp.*'")
    for pattern in patterns:
        if fnmatch.filter(linear, pattern):
            continue
        found = [path for path in others if fnmatch.fnmatch(path, pattern)]
        if found:
            raise ParameterError(
                f"patterns: '{pattern}' matches '{found[0]}', which is {others[found[0]]}, and no "
                "linear layer"
            )
        raise ParameterError(
            f"patterns: '{pattern}' matches no layer; linear are {', '.join(linear) or 'none'}"
        )
    return tuple(p for p in linear if any(fnmatch.fnmatch(p, pattern) for pattern in patterns))


def added(
    roster: Roster, specs: Sequence[BankSpec], layers: Sequence[LinearLayer], strategy: Strategy
) -> tuple[BankSpec, ...]:
    """The banks with their sites filled in, ready for layers.

    Args:
      roster: the banks that the model has already.
      specs: what is to be added.
      layers: where.
      strategy: what will run them.

    Raises:
      UserError: a bank that such layers cannot have, or a name that is there already.
    """
    sites = tuple(layer.site for layer in layers)
    names = [*roster]
    for spec in specs:
        where = f"bank '{spec.name}'"
        if spec.name in names:
            raise UserError(f"{where} is added twice; names are unique within a model")
        names.append(spec.name)
        if spec.form != "lora":
            raise UserError(f"{where}.form: '{spec.form}' is for our decoder; layers take 'lora'")
        if spec.mix_per_layer:
            raise UserError(
                f"{where}.mix_per_layer: give each layer, by its pattern, a bank of its own"
            )
        bank_lib.check_acts(spec)
        if spec.gate == "skill":
            bank_lib.check_gate_learns(spec, fresh=True)
        if "mix" in sites:
            raise UserError(f"{where}: a layer at the path 'mix' cannot have banks; rename it")
        if spec.routed:
            strategy.check(where, spec.experts)
    return tuple(spec.replace(sites=sites, start=0, stop=1) for spec in specs)


def in_state(roster: Roster, name: str, state: str) -> Roster:
    """`lifecycle.set_state` for layers, where a merge takes the bank away.

    Raises:
      UserError: no such bank or state.
    """
    if state == "merged":
        raise UserError(f"bank '{name}': to become 'merged', call merge")
    return lifecycle.set_state(roster, name, state)


def init(
    spec: BankSpec, layers: Sequence[LinearLayer], key: jax.Array, strategy: Strategy
) -> dict[str, Any]:
    """Fresh parameters of a bank, laid over the strategy's mesh; see `bank.init`."""
    params = bank_lib.init_on(spec, {layer.site: layer.widths for layer in layers}, key)
    mesh = strategy.execution.mesh
    if mesh is None:
        return params
    travels = spec.routed and isinstance(strategy, AllToAll) and EXPERT in mesh.shape
    rules = _TRAVEL if travels else _TRAVEL[-1:]

    def put(path, leaf):
        spec = spec_for(f".{path[-1].key}", leaf.shape, mesh, rules)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(put, params)


def _staged() -> bool:
    """Whether a function is being traced for compilation."""
    return isinstance(jnp.zeros(()), Tracer)


class Within:
    """A value given to all layers that are called inside a `with` block.

    A compiled function keeps what it was traced with: so the block belongs inside of it.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.staged = name, value, _staged()

    def read(self) -> Any:
        """The value.

        Raises:
          UserError: the block stands around a compiled function.
        """
        if _staged() and not self.staged:
            raise UserError(
                f"{self.name}: the with block stands outside of a compiled function (jit, remat, "
                "scan), which would go on with its first value; enter it inside of jax.jit"
            )
        return self.value


_TOLD: ContextVar[Within | None] = ContextVar("told", default=None)
_NUMBERS = itertools.count(1)
_BLOCK = jax.make_user_context(0)  # part of the key under which JAX keeps a trace; 0 = in no block


@contextlib.contextmanager
def block() -> Generator[None]:
    """Around a `with` block whose value layers read while they are traced.

    JAX keeps the traces of inner functions (remat, an inner jit) by what they are called with, and
    the value is no part of that. With a number of its own, no block is given the trace of another.
    Outside of a compiled function nothing reads the value in a trace, and one number does: with
    more of them every operation would be compiled anew.
    """
    with _BLOCK(next(_NUMBERS) if _staged() else -1):
        yield


@contextlib.contextmanager
def given(context: Context) -> Generator[None]:
    """Tells adapted layers and decoders that are called in the block what gates and dropout need.

    Arrays of one entry a row, `[B]`, or a token, `[B, T]`, or shorter ones such as `[B, 1]`, serve
    every layer whose input begins with these axes. `segment_ids_BxT` is 0 on padding, which picks
    no expert; without it every token counts. Dropout and noise on routers act only with a
    `dropout_key`. Enter it inside of the function that is compiled.
    """
    token = _TOLD.set(Within("given", context))
    try:
        with block():
            yield
    finally:
        _TOLD.reset(token)


def context_of(who: str, leading: tuple[int, ...]) -> Context:
    """What `given` has told of the tokens of a layer or model, as `[B, T]`.

    Args:
      who: sees them, for the message.
      leading: their shape, a row first.

    Raises:
      UserError: what was given does not fit them.
    """
    told = _TOLD.get()
    context = Context() if told is None else told.read()
    rows, tokens = _rows_and_tokens(leading)

    def fitted(name: str):
        ids = getattr(context, name)
        if ids is None:
            return None
        wide = jnp.shape(ids) + (1,) * (len(leading) - jnp.ndim(ids))
        if len(wide) != len(leading) or any(
            n not in (1, size) for n, size in zip(wide, leading, strict=True)
        ):
            raise UserError(
                f"given: {name} is {jnp.shape(ids)}, but {who} sees tokens {leading}; give one "
                f"entry a row, [{rows}], or keep banks off it"
            )
        return jnp.broadcast_to(jnp.reshape(ids, wide), leading).reshape(rows, tokens)

    valid = fitted("segment_ids_BxT")
    return context._replace(
        segment_ids_BxT=jnp.ones((rows, tokens), jnp.int32) if valid is None else valid,
        layer=0,
        language_ids_BxT=fitted("language_ids_BxT"),
    )


def _rows_and_tokens(leading: tuple[int, ...]) -> tuple[int, int]:
    return (leading[0] if leading else 1), math.prod(leading[1:])


def delta(
    layer: LinearLayer,
    specs: tuple[BankSpec, ...],
    strategy: Strategy,
    x: jax.Array,
    params: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, RouterStats]]:
    """What banks add to a layer's output, of its shape, in x's dtype.

    Args:
      layer: where.
      specs: the banks.
      strategy: runs their experts and routers.
      x: the layer's input.
      params: `{bank: {site: parameters, "mix"?}}`.

    Returns:
      `(delta, {"bank/site": RouterStats})`, the statistics' leaves `[1, ...]`.

    Raises:
      UserError: rows that the mesh does not divide, a context that does not fit the tokens, or
        an input that the strategy cannot run.
    """
    if any(spec.routed for spec in specs):
        strategy.check_input(f"layer '{layer.site}'", x)
    x = layer.features_last(x)
    leading = x.shape[:-1]
    rows, tokens = _rows_and_tokens(leading)
    shards = strategy.execution.row_shards
    if rows % shards:
        raise UserError(
            f"rows: the mesh cuts them into {shards} parts, which do not divide the {rows} rows "
            f"that layer '{layer.site}' sees"
        )
    terms, stats = site_terms(
        specs,
        strategy,
        layer.site,
        x.reshape(rows, tokens, x.shape[-1]),
        (layer.site,),
        jax.tree.map(lambda leaf: leaf[0], dict(params)),
        context_of(f"layer '{layer.site}'", leading),
    )
    y_BxTxO = strategy.lora(terms)[layer.site]
    return y_BxTxO.reshape(*leading, *layer.outputs), jax.tree.map(lambda v: v[None], stats)


def merged_kernel(
    layer: LinearLayer, members: Sequence[tuple[BankSpec, Any]], kernel: jax.Array
) -> jax.Array:
    """The layer's kernel plus the banks' `s Σ_e A_e Λ_e B_e`, rounded once.

    Raises:
      UserError: a bank's gate depends on the token.
    """
    for spec, _ in members:
        lifecycle.check_mergeable(spec)
    specs, params = lifecycle.members_at(members, layer.site)
    kernel_1xDxO = kernel.reshape(1, *layer.widths)
    w_DxO = lifecycle.kernel_with(specs, kernel_1xDxO, params, 0)
    return w_DxO.astype(kernel.dtype).reshape(kernel.shape)


def probe(layer: LinearLayer) -> jax.Array:
    """Two random rows of input, of no more axes than the layer needs, for `is_product`."""
    n = len(layer.axes)
    rank = max(n + 1, *(axis + 1 if axis >= 0 else -axis for axis in layer.axes))
    shape = (2, *[1] * (rank - 1 - n), *layer.inputs)
    x = jax.random.normal(jax.random.key(0), shape)
    return jnp.moveaxis(x, tuple(range(-n, 0)), sorted(axis % rank for axis in layer.axes))


def is_product(layer: LinearLayer, kernel: jax.Array, y: jax.Array) -> jax.Array:
    """Whether `y` is `x W` for the layer's `probe`, all but a twentieth, which may be rounding.

    Only then a bank adds the same to the output when it is added to the kernel.

    Args:
      layer: which.
      kernel: W, drawn anew: a mask or a norm may change nothing of the one that is there.
      y: the layer's output with it, less that with a kernel of zeros: what else is added is no
        matter.
    """
    w_DxO = kernel.astype(jnp.float32).reshape(layer.widths)
    x = layer.features_last(probe(layer))
    want = jnp.matmul(x, w_DxO, precision=jax.lax.Precision.HIGHEST)
    error = y.astype(jnp.float32).reshape(want.shape) - want
    return jnp.linalg.norm(error) <= jnp.linalg.norm(want) / 20


def sum_of(before: RouterStats | None, one: RouterStats) -> RouterStats:
    """How the statistics of a layer that is called twice are put together."""
    return one if before is None else jax.tree.map(jnp.add, before, one)


def no_statistics(experts: int) -> RouterStats:
    """Those of a router that has seen no token, leaves `[1, ...]`."""
    shapes = {name: (1, experts) if name.endswith("_E") else (1,) for name in RouterStats._fields}
    return RouterStats(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


def statistics(collected: Mapping[str, Any]) -> dict[str, RouterStats]:
    """`{"bank/site": RouterStats}` from what a call has collected.

    `routing.telemetry.summarise` makes figures of them, `router_loss` losses. The leaves are
    `[1, ...]`: all calls of a layer add up, those too that `nn.scan` has stacked.

    Args:
      collected: the state that `flax.nnx.capture` gives for `nnx_models.RouterStatistics`, or the
        collection `linen_models.STATISTICS`.
    """
    out = {}
    for key, value in collected.items():
        value = value if isinstance(value, Mapping | RouterStats) else value.get_value()
        out |= {key: _of_calls(value)} if isinstance(value, RouterStats) else statistics(value)
    return out


def _of_calls(stats: RouterStats) -> RouterStats:
    calls = tuple(range(stats.tokens.ndim - 1))
    return jax.tree.map(lambda leaf: leaf.sum(calls), stats)
