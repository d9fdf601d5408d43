"""Strategies in which an expert sees only the tokens that picked it.

Axes: B batch, T tokens, K picks a token, D input width, O output width, F feed-forward, E experts,
r rank, M rows sorted by expert, one for each pick; under a mesh, of this device.

A dispatcher turns tokens into rows and back; in between stand the grouped products of
`kernels.grouped`. Under a mesh every device works on its own tokens, and on the mesh axis `tensor`
on its own part of the experts' wide dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from medmoe_jax.base.execution import Execution
from medmoe_jax.kernels.grouped import RANK_COLUMNS, grouped_lora, grouped_matmul
from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.parallel.rules import row_parallel
from medmoe_jax.routing.dense import stacked_lora
from medmoe_jax.routing.dispatchers import Dispatcher
from medmoe_jax.routing.terms import LoraTerm, Terms

# What the results of experts' inner layers are called for the policies of `jax.checkpoint`.
PRODUCT = "experts_product"


@dataclass(frozen=True)
class Sparse:
    """Dispatch, grouped products, combine.

    Attributes:
      execution: the mesh, the chips and the kernels.
      dispatcher: how tokens reach their experts.
      expert_axis: the mesh axis that experts are spread over; None where each device has all.
    """

    execution: Execution
    dispatcher: Dispatcher
    expert_axis: str | None = None

    def lora(self, terms: Terms) -> dict[str, Any]:
        """See `routing.dispatch.Strategy`; terms without gates move no tokens."""
        if not all(term.x_BxTxD.size for some in terms.values() for term in some):
            return stacked_lora(terms)  # no token that could travel
        always = {site: [t for t in some if t.gates is None] for site, some in terms.items()}
        out = stacked_lora({site: some for site, some in always.items() if some})
        for site, some in terms.items():
            for term in some:
                if term.gates is not None:
                    delta = self._term(site, term, term.gates)
                    out[site] = out[site] + delta if site in out else delta
        return out

    def _term(self, site: str, term: LoraTerm, gates: Gates):
        b_ExrxO = term.lora_b_ExrxO
        if term.scale_Exr is not None:
            b_ExrxO = b_ExrxO * term.scale_Exr[..., None]
        split_in = row_parallel(site)
        wide = term.lora_a_DxExr.shape[0] if split_in else b_ExrxO.shape[2]
        part = self.execution.tensor_axis(wide)
        on_in, on_out = (part, None) if split_in else (None, part)
        run = self._sharded(
            functools.partial(self._local_lora, on_in),
            term.x_BxTxD.shape[1],
            (on_in, on_out),
            ((on_in, self.expert_axis), (self.expert_axis, None, on_out)),
        )
        weights_BxTxK = term.s * gates.weights_BxTxK
        return run(gates.picks_BxTxK, weights_BxTxK, term.x_BxTxD, term.lora_a_DxExr, b_ExrxO)

    def _local_lora(self, summed, picks_BxTxK, weights_BxTxK, x_BxTxD, a_DxExr, b_ExrxO):
        """One device's share; `summed` is the mesh axis over which D is cut, if any."""
        rows, journey = self._dispatch(picks_BxTxK, weights_BxTxK, x_BxTxD, a_DxExr.shape[1])
        backend = self.execution.backend
        if summed is None:
            y_MxO = grouped_lora(
                rows.x_MxD,
                jnp.moveaxis(a_DxExr, 0, 2),
                b_ExrxO,
                rows.weight_M,
                rows.sizes_E,
                backend=backend,
            )
        else:
            a_ExDxr = jnp.moveaxis(a_DxExr, 0, 1)
            h_Mxr = grouped_matmul(rows.x_MxD, a_ExDxr, rows.sizes_E, backend=backend)
            h_Mxr = jax.lax.psum(h_Mxr.astype(jnp.float32), summed)
            h_Mxr = checkpoint_name(h_Mxr, RANK_COLUMNS) * rows.weight_M[:, None]
            y_MxO = grouped_matmul(
                h_Mxr.astype(x_BxTxD.dtype), b_ExrxO, rows.sizes_E, backend=backend
            )
        return self._combine(journey, y_MxO, x_BxTxD)

    def ffn(
        self, x_BxTxD: jax.Array, gates: Gates, params: Mapping[str, Any], activation: Callable
    ) -> jax.Array:
        """See `routing.dispatch.Strategy`."""
        if not x_BxTxD.size:
            return x_BxTxD
        part = self.execution.tensor_axis(params["gate"].shape[2])
        on = self.expert_axis
        run = self._sharded(
            functools.partial(self._local_ffn, activation, part),
            x_BxTxD.shape[1],
            (None, None),
            ((on, None, part), (on, None, part), (on, part)),
        )
        # Cast before they are gathered: whole experts in float32 would take twice the room.
        experts = (params[name].astype(x_BxTxD.dtype) for name in ("gate", "up", "down"))
        return run(gates.picks_BxTxK, gates.weights_BxTxK, x_BxTxD, *experts)

    def _local_ffn(
        self, activation, summed, picks_BxTxK, weights_BxTxK, x_BxTxD, gate_ExDxF, up_ExDxF,
        down_ExFxD,
    ):  # fmt: skip
        rows, journey = self._dispatch(picks_BxTxK, weights_BxTxK, x_BxTxD, gate_ExDxF.shape[0])
        backend = self.execution.backend
        product = functools.partial(grouped_matmul, sizes_E=rows.sizes_E, backend=backend)
        gate_MxF = checkpoint_name(product(rows.x_MxD, gate_ExDxF), PRODUCT)
        up_MxF = checkpoint_name(product(rows.x_MxD, up_ExDxF), PRODUCT)
        h_MxF = activation(gate_MxF) * up_MxF
        h_MxF = (h_MxF.astype(jnp.float32) * rows.weight_M[:, None]).astype(h_MxF.dtype)
        y_BxTxD = self._combine(journey, product(h_MxF, down_ExFxD), x_BxTxD)
        return y_BxTxD if summed is None else jax.lax.psum(y_BxTxD, summed)

    def _dispatch(self, picks_BxTxK, weights_BxTxK, x_BxTxD, local_experts: int):
        devices = self.execution.size(self.expert_axis)
        flat = (v.reshape(-1, v.shape[-1]) for v in (x_BxTxD, picks_BxTxK, weights_BxTxK))
        return self.dispatcher.dispatch(*flat, local_experts * devices)

    def _combine(self, journey, y_MxO, x_BxTxD):
        return self.dispatcher.combine(journey, y_MxO).reshape(*x_BxTxD.shape[:2], -1)

    def _sharded(self, function: Callable, length: int, widths: tuple, axes: Sequence[tuple]):
        """`function(picks, weights, x, *arrays)` on every device's share of rows of that length.

        `widths` are the mesh axes of the widths of x and of the result, `axes` those of the arrays.
        """
        spec, (on_x, on_out) = self.execution.spec, widths
        picks = spec(length, None)
        inputs = (picks, picks, spec(length, on_x), *(PartitionSpec(*one) for one in axes))
        return self.execution.per_device(function, inputs, spec(length, on_out))
