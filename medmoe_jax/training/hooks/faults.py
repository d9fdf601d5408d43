"""Ending a run whose figures are not finite, before they are logged or its state is saved."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from medmoe_jax.checkpoints.files import write_bytes
from medmoe_jax.errors import UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.parallel.host import to_host
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord

Batch = Mapping[str, jax.Array]


class Faults(Hook):
    """Raises UserError for a step that went wrong; first in the list, so that nothing logs it.

    Wrong is a loss, a gradient or a router's logits that are not finite, and a first batch without
    a target.
    """

    def __init__(
        self,
        keep: Callable[[Batch], Path],
        first_layer: Mapping[str, int],
        bad_frozen: Callable[[], Sequence[str]],
        rate: Callable[[int], float],
        saved: Callable[[], Sequence[int]],
    ) -> None:
        """
        Args:
          keep: writes a batch down for a replay, and tells where (`keep_batch`).
          first_layer: where each bank's layers begin.
          bad_frozen: tells which arrays of base and frozen banks are not finite.
          rate: the learning rate, from the number of updates made before.
          saved: the steps whose checkpoints are whole.
        """
        self._keep, self._first_layer = keep, first_layer
        self._bad_frozen, self._rate, self._saved = bad_frozen, rate, saved
        self._before: list[float] = []  # the last losses that were finite

    def on_start(self, progress: Progress) -> None:
        """Note where this start began."""
        self._first, self._before = progress.step, []

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Look at a step before any other hook does."""
        if fault := self._fault(record):
            saved = list(self._saved())
            left = (
                f"The checkpoint of step {saved[-1]} is intact."
                if saved
                else ("There is no checkpoint yet.")
            )
            raise UserError(
                f"stage '{progress.stage}', step {record.step}: {fault}. "
                f"{self._cause(record)} {left}"
            )
        self._before = [*self._before[-2:], record.metrics["loss"]]
        if record.step == 1 and not record.metrics["target_tokens"]:
            raise UserError(
                f"stage '{progress.stage}': no token of the first batch is a target, so there is "
                "nothing to learn; most likely data.length cuts the rows before their answers "
                "begin"
            )

    def _cause(self, record: StepRecord) -> str:
        """What it comes from, as far as that can be told: base and banks, rows, or rates."""
        rows = f"the rows of this step, kept in {self._keep(record.batch)}"
        if bad := self._bad_frozen():
            return (
                f"The cause is in the base or a frozen bank: {', '.join(bad[:3])} holds NaN or "
                f"infinity. The batch is kept in {self._keep(record.batch)}."
            )
        if record.step == self._first + 1:
            return (
                "No update was made since the start, so learning_rate has no part in it, and base "
                f"and frozen banks are finite: look at {rows}, at the trained banks that the stage "
                "began with, or set base.dtype to float32."
            )
        losses = ", ".join(f"{loss:.4g}" for loss in self._before)
        rate = float(self._rate(record.step - 1))
        if len(self._before) > 1 and self._before[-1] > self._before[0]:
            return (
                f"The losses before rose ({losses}): lower learning_rate (it was {rate:.3g}), or "
                f"lengthen warmup; else look at {rows}."
            )
        return (
            f"The losses before did not rise ({losses}): look at {rows}; else lower learning_rate "
            f"(it was {rate:.3g})."
        )

    def _fault(self, record: StepRecord) -> str:
        """What is not finite, "" if all is well; takes the routers' flag out of the metrics."""
        if record.metrics.pop("non_finite", 0.0):
            return self._router_fault(record.router)
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(record.metrics[name]):
                return f"{name} is {record.metrics[name]}"
        return ""

    def _router_fault(self, router: Mapping[str, RouterStats]) -> str:
        """The first router, by depth, whose logits are not finite."""
        layer, key = min(
            (self._first_layer[key.split("/")[0]] + int(layer), key)
            for key, stats in jax.device_get(dict(router)).items()
            for layer in np.flatnonzero(stats.non_finite)
        )
        bank, site = key.split("/")
        return f"layer {layer}, {site}: the logits of bank '{bank}''s router are not finite"


def keep_batch(path: Path, batch: Batch) -> Path:
    """Write a batch to `path` as it lay on the mesh; all processes call this alike."""
    content = io.BytesIO()
    arrays = {name: to_host(array) for name, array in batch.items()}
    # numpy's stub takes every name for `allow_pickle` too.
    np.savez(content, **arrays)  # ty: ignore[invalid-argument-type]
    write_bytes(path, content.getvalue())
    return path
