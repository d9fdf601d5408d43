"""The loss on rows that a stage does not learn from.

Axes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.attention import row_slots
from medmoe_jax.base.seam import Params
from medmoe_jax.data.batches import Batch, epoch_batches
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import SEQUENCE
from medmoe_jax.parallel.mesh import batch_sharding, put, replicated, round_up_rows
from medmoe_jax.training.compiling import compile_ahead
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.step import TrainState, nll


class HeldOut:
    """Mean −log p over all targets of all rows, one row to a sequence, without dropout."""

    def __init__(self, prepared: Prepared, sources: Mapping[str, EncodedRows]) -> None:
        """
        Args:
          prepared: the stage.
          sources: its rows, by name.

        Raises:
          UserError: a source has no target.
        """
        setup = prepared.stage.setup
        for name, rows in sources.items():
            if not rows.counts.target_tokens:
                raise UserError(f"source '{name}': no token of its rows is a target")
        self._prepared, self._sources = prepared, sources
        self._where = batch_sharding(setup.mesh)
        longest = max(len(row["tokens"]) for rows in sources.values() for row in rows)
        self._slots = row_slots(longest, setup.mesh.shape[SEQUENCE], setup.config.data.length)
        most = max(map(len, sources.values()))
        self._batch = round_up_rows(setup.mesh, min(setup.config.run.score_batch, most))
        self._program: Callable | None = None

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """`{"loss": ...}` of a state. Raises UserError where it is not finite."""
        total = count = 0.0
        for batch in self._batches():
            arrays = {name: put(array, self._where) for name, array in batch.items()}
            arguments = (state.trainable, self._prepared.frozen, arrays)
            if self._program is None:
                self._program = self._compiled(*arguments)
            nll_sum, targets = jax.device_get(self._program(*arguments))
            total, count = total + float(nll_sum), count + float(targets)
        if not math.isfinite(total):
            raise UserError(f"the loss on {', '.join(self._sources)} after step {step} is {total}")
        return {"loss": total / count}

    def _batches(self) -> itertools.chain[Batch]:
        return itertools.chain.from_iterable(
            epoch_batches(rows, self._batch, length=self._slots) for rows in self._sources.values()
        )

    def _compiled(self, *arguments) -> Callable:
        config, mesh = self._prepared.objective.model, self._prepared.stage.setup.mesh
        function = jax.jit(functools.partial(_sums, config), out_shardings=replicated(mesh))
        return compile_ahead(function, *arguments)[0]


def _sums(
    config: AdaptedConfig, trainable: Params, frozen: Params, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Σ −log p over the targets of a batch, and their number."""
    total, (targets, _) = nll(config, trainable, frozen, batch)
    return total, jnp.float32(targets)
