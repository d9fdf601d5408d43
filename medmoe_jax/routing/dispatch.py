"""Strategies that compute mixtures of experts; all are the same function.

Axes: B batch, T tokens, D input width, F feed-forward, E experts, O output width.

| strategy | how |
|---|---|
| `Reference` | a plain loop over experts, for tests |
| `Stacked` | every expert on every token, gates in rank space (`dense`, on TPU `fused`) |
| `Grouped` | tokens sorted by expert, each expert on its own (`sparse`) |
| `AllToAll` | the same, experts spread over the mesh axis `expert`, tokens travel to them |
| `Auto` | of the last three the one that takes least time by count, for each mixture (`auto`) |

Each takes plain arrays. A router first, then what the experts add to a layer's output:

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> x_BxTxD = jnp.array([[[1.0, 2.0], [2.0, 0.0]]])
    >>> router = Router(jnp.array([[1.0, 0.0], [0.0, 1.0]]), None, top_k=1, renormalise=True)
    >>> stacked = strategy("stacked")
    >>> ((gates, stats),) = stacked.decide(x_BxTxD, jnp.array([[True, True]]), [router])
    >>> gates.picks_BxTxK.tolist(), stats.use_E.tolist()
    ([[[1], [0]]], [1.0, 1.0])
    >>> lora_a_DxExr, lora_b_ExrxO = jnp.ones((2, 2, 1)), jnp.array([[[1.0]], [[10.0]]])
    >>> term = LoraTerm(x_BxTxD, lora_a_DxExr, lora_b_ExrxO, gates, scale_Exr=None, s=1.0)
    >>> stacked.lora({"site": [term]})["site"].tolist()
    [[[30.0], [2.0]]]

The others compute the same; see their examples. On several devices, `strategy(name, execution)`
with an execution of `adapters.foreign.on_mesh`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.kernels import grouped, lora_linear
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.kernels.tiles import FLOATS
from medmoe_jax.mesh_axes import EXPERT, MAKE_AUTO
from medmoe_jax.routing import auto, dense, fused, gating, sparse
from medmoe_jax.routing.dispatchers import AllToAllDispatcher, LocalDispatcher
from medmoe_jax.routing.gating import Decision, Router
from medmoe_jax.routing.narrow import on_explicit_axes
from medmoe_jax.routing.sparse import Sparse
from medmoe_jax.routing.terms import Terms

# What the backward pass keeps of the kernels' results, by rematerialisation.
KEPT = {
    "dots": (
        sparse.PRODUCT,
        grouped.RANK_COLUMNS,
        lora_linear.PRODUCT,
        lora_linear.RANK_COLUMNS,
        lora_linear.LAST_RANK_COLUMNS,
    ),
    # Few columns: without them a layer's last product would be made again for their sake.
    "full": (lora_linear.LAST_RANK_COLUMNS,),
}


@dataclass(frozen=True)
class Strategy(ABC):
    """One way to run mixtures of experts.

    Attributes:
      execution: the mesh, the chips and the kernels that it runs on.
    """

    execution: Execution

    def linear(
        self, x_BxTxD: jax.Array, weights: Mapping[str, Any], terms: Terms
    ) -> dict[str, Any]:
        """The sites of a projection group with their terms: `{site: y_BxTxO}`.

        Here the terms are products beside the base's.

        Args:
          x_BxTxD: the sites' input.
          weights: `{site: {"kernel", "bias"?}}`, the base's, of every site.
          terms: what is added to some of the sites.
        """
        y = dense.base_products(x_BxTxD, weights)
        return dense.add(y, self.lora(terms))

    @abstractmethod
    def lora(self, terms: Terms) -> dict[str, Any]:
        """The sum of the terms of each site of a projection group: `{site: delta_BxTxO}`."""

    @abstractmethod
    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """The gated sum of whole feed-forward experts: `y_BxTxD`.

        Args:
          x_BxTxD: their input.
          gates: which expert counts for which token.
          params: `{"gate", "up": [E, D, F], "down": [E, F, D]}`.
          activation: the nonlinearity between the products.
        """

    def decide(
        self, x_BxTxD: jax.Array, valid_BxT: jax.Array, routers: Sequence[Router]
    ) -> list[Decision]:
        """The gates and statistics of each router that reads x.

        Args:
          x_BxTxD: their input.
          valid_BxT: False where no expert is to be picked.
          routers: their parameters.
        """
        kernel = self.execution.backend != "xla" and x_BxTxD.dtype in FLOATS
        if not kernel or not x_BxTxD.size:
            return gating.decide(x_BxTxD, valid_BxT, routers)
        return gating.decide_by_kernel(self.execution, x_BxTxD, valid_BxT, routers)

    def check(self, where: str, experts: int) -> None:
        """Raise ParameterError if that many experts cannot be run; `where` names their bank."""
        del where, experts

    def check_input(self, where: str, x: jax.Array) -> None:
        """Raise UserError if routed mixtures cannot be run on x; `where` names whose it is."""
        del where, x


@dataclass(frozen=True)
class Reference(Strategy):
    """A plain loop over experts, for tests.

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> x_BxTxD, a, b = jnp.ones((1, 1, 2)), jnp.ones((2, 3, 1)), jnp.ones((3, 1, 1))
    >>> term = LoraTerm(x_BxTxD, a, b, gates=None, scale_Exr=None, s=2.0)
    >>> Reference(Execution()).lora({"site": [term]})["site"].tolist()  # 3 experts, each 2 · 2
    [[[12.0]]]
    """

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `Strategy`."""
        return dense.reference_lora(terms)

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `Strategy`."""
        return dense.reference_ffn(x_BxTxD, gates, params, activation)

    def decide(
        self, x_BxTxD: jax.Array, valid_BxT: jax.Array, routers: Sequence[Router]
    ) -> list[Decision]:
        """See `Strategy`; in plain JAX everywhere."""
        return gating.decide(x_BxTxD, valid_BxT, routers)


@dataclass(frozen=True)
class Stacked(Strategy):
    """Every expert on every token; on TPU a site's base and banks are one kernel.

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> x_BxTxD, weights = jnp.ones((1, 1, 2)), {"site": {"kernel": jnp.ones((2, 1))}}
    >>> term = LoraTerm(x_BxTxD, jnp.ones((2, 3, 1)), jnp.ones((3, 1, 1)), None, None, 2.0)
    >>> Stacked(Execution()).linear(x_BxTxD, weights, {"site": [term]})["site"].tolist()
    [[[14.0]]]
    """

    def linear(
        self, x_BxTxD: jax.Array, weights: Mapping[str, Any], terms: Terms
    ) -> dict[str, Any]:
        """See `Strategy`."""
        if self.execution.backend == "xla":
            return super().linear(x_BxTxD, weights, terms)
        return fused.linear(self.execution, x_BxTxD, weights, terms)

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `Strategy`; of few tokens on one device, the experts that they picked."""
        if self.execution.devices == 1:
            return dense.picked_lora(terms)
        return dense.stacked_lora(terms)

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `Strategy`."""
        return dense.stacked_ffn(x_BxTxD, gates, params, activation)


@dataclass(frozen=True)
class Grouped(Strategy):
    """Tokens sorted by expert; an expert sees only those that picked it.

    Here two tokens pick one of two experts each, the second with weight one half:

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> dense_BxTxE = jnp.array([[[0.0, 1.0], [0.5, 0.0]]])
    >>> gates = Gates(dense_BxTxE, jnp.array([[[1], [0]]]), jnp.array([[[1.0], [0.5]]]))
    >>> x_BxTxD, lora_b_ExrxO = jnp.ones((1, 2, 2)), jnp.array([[[1.0]], [[10.0]]])
    >>> term = LoraTerm(x_BxTxD, jnp.ones((2, 2, 1)), lora_b_ExrxO, gates, None, 1.0)
    >>> Grouped(Execution()).lora({"site": [term]})["site"].tolist()
    [[[20.0], [1.0]]]
    """

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `Strategy`."""
        return self._sparse().lora(terms)

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `Strategy`."""
        return self._sparse().ffn(x_BxTxD, gates, params, activation)

    def check_input(self, where: str, x: jax.Array) -> None:
        """See `Strategy`."""
        if fault := _unsorted(x):
            raise UserError(f"{where}: {fault}, or take dispatch 'stacked'")

    def _sparse(self) -> Sparse:
        return Sparse(self.execution, LocalDispatcher(self.execution.backend))


@dataclass(frozen=True)
class AllToAll(Grouped):
    """`Grouped`, with the experts spread over the mesh axis `expert`; the same on one device.

    >>> AllToAll(Execution()).check("bank 'experts'", 7)  # every device has all of them
    """

    def check(self, where: str, experts: int) -> None:
        """See `Strategy`."""
        devices = self.execution.size(EXPERT)
        if experts % devices:
            raise ParameterError(
                f"dispatch: the {devices} devices of the mesh axis {EXPERT} do not divide the "
                f"{experts} experts of {where}; give an axis that divides them, or take 'grouped'"
            )

    def _sparse(self) -> Sparse:
        devices = self.execution.size(EXPERT)
        if devices == 1:
            return super()._sparse()
        dispatcher = AllToAllDispatcher(
            EXPERT,
            devices,
            ragged=self.execution.platform == "tpu",
            backend=self.execution.backend,
        )
        return Sparse(self.execution, dispatcher, EXPERT)


@dataclass(frozen=True)
class Auto(Strategy):
    """The strategy that takes least time by count, for each mixture; see `routing.auto`.

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> x_BxTxD, a, b = jnp.ones((1, 1, 2)), jnp.ones((2, 3, 1)), jnp.ones((3, 1, 1))
    >>> term = LoraTerm(x_BxTxD, a, b, gates=None, scale_Exr=None, s=2.0)
    >>> Auto(Execution()).lora({"site": [term]})["site"].tolist()
    [[[12.0]]]
    """

    def linear(
        self, x_BxTxD: jax.Array, weights: Mapping[str, Any], terms: Terms
    ) -> dict[str, Any]:
        """See `Strategy`."""
        return self._for_terms(terms).linear(x_BxTxD, weights, terms)

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `Strategy`."""
        return self._for_terms(terms).lora(terms)

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `Strategy`."""
        E, D, F = params["gate"].shape
        shape = auto.Ffn(gates.picks_BxTxK.shape[-1], D, F, E, self.execution.size(EXPERT))
        fastest = self._fastest("feed-forward experts", (shape,), x_BxTxD)
        return fastest.ffn(x_BxTxD, gates, params, activation)

    def _for_terms(self, terms: Terms) -> Strategy:
        gated = [
            (term, term.gates) for some in terms.values() for term in some if term.gates is not None
        ]
        if not gated:
            return Stacked(self.execution)
        shapes = tuple(
            auto.Lora(
                gates.picks_BxTxK.shape[-1],
                term.lora_a_DxExr.shape[0],
                term.lora_b_ExrxO.shape[2],
                *term.lora_a_DxExr.shape[1:],
            )
            for term, gates in gated
        )
        return self._fastest(", ".join(terms), shapes, gated[0][0].x_BxTxD)

    def _fastest(self, what: str, shapes: tuple, x_BxTxD) -> Strategy:
        if _unsorted(x_BxTxD):
            return Stacked(self.execution)
        tokens = self.execution.local_tokens(*x_BxTxD.shape[:2])
        chip = auto.machine(self.execution.device)
        name = auto.choose(what, chip, shapes, tokens, x_BxTxD.dtype.itemsize)
        return STRATEGIES[name](self.execution)


@dataclass(frozen=True)
class AtRest(Stacked):
    """Every expert on every token, where each lies: of few tokens, which are on all devices.

    >>> import jax.numpy as jnp
    >>> from medmoe_jax.routing.terms import LoraTerm
    >>> x_BxTxD, a, b = jnp.ones((1, 1, 2)), jnp.ones((2, 3, 1)), jnp.ones((3, 1, 1))
    >>> term = LoraTerm(x_BxTxD, a, b, gates=None, scale_Exr=None, s=2.0)
    >>> AtRest(Execution()).lora({"site": [term]})["site"].tolist()
    [[[12.0]]]
    """

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `Strategy`; all at once, as a loop over experts would fetch each to every device."""
        return dense.batched_ffn(x_BxTxD, gates, params, activation)


def _unsorted(x: jax.Array) -> str:
    """Why tokens cannot be sorted by expert, and what to do; empty where they can."""
    if x.dtype not in FLOATS:
        return f"it computes in {x.dtype}, sorted tokens in float32 or bfloat16: set its dtype"
    if on_explicit_axes(x):
        return f"tokens are not sorted over a mesh with Explicit axes: make it by {MAKE_AUTO}"
    return ""


# What `dispatch` may name.
STRATEGIES: dict[str, Callable[[Execution], Strategy]] = {
    "reference": Reference,
    "stacked": Stacked,
    "grouped": Grouped,
    "all_to_all": AllToAll,
    "auto": Auto,
}


def strategy(name: str, execution: Execution = Execution()) -> Strategy:
    """The strategy of that name, for the mesh and the chips that `execution` runs on.

    Raises:
      ParameterError: an unknown name.
    """
    if name not in STRATEGIES:
        raise ParameterError(f"dispatch: '{name}' is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](execution)
