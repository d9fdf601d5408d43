"""The loop over steps: read, update, log, save.

Step N−1's metrics are read after step N was dispatched, so that the device never waits for the
host's bookkeeping, and the next batch is made meanwhile by the stream's own thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from medmoe_jax.checkpoints.files import MetricsLog
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.parallel import processes
from medmoe_jax.routing import telemetry


@dataclass
class Loop:
    """What the loop needs beside the state.

    Attributes:
      name: of the stage, on the progress bar.
      step_fn: `(state, frozen, batch) -> (state, metrics)`, compiled.
      stream: batches on the host, with `get_state`.
      place: puts a host batch on the devices.
      save: `save(state, extra)`, called every `save_every` steps and at the end.
      keep: `keep(batch)` writes the batch of a step that is not finite, and returns where.
      stop: asked after every step, whether to save and end there.
      log: JSONL of every step; None on all processes but the first.
      board: a `tensorboardX.SummaryWriter`, or None.
      probe: figures of the state computed every `log_every` steps.
      rate: learning rate of a step.
      first_layer: where each bank's layers begin.
      steps, log_every, save_every: counts.
    """

    name: str
    step_fn: Callable
    stream: Any
    place: Callable[[Mapping[str, np.ndarray]], Any]
    save: Callable[[Any, dict], None]
    keep: Callable[[Any], Path]
    stop: Callable[[], bool]
    log: MetricsLog | None
    board: Any
    probe: Callable[[Any], dict[str, float]]
    rate: Callable[[int], float]
    first_layer: Mapping[str, int]
    steps: int
    log_every: int
    save_every: int


def run(loop: Loop, state, frozen, first: int):
    """Steps `first .. loop.steps - 1`; returns the final state.

    Raises:
      UserError: the loss, the gradient or a router's logits are not finite, or the first batch
        holds no target.
      Stopped: `loop.stop` asked for it; the state is saved.
    """
    bar = tqdm(
        total=loop.steps,
        initial=first,
        desc=loop.name,
        unit="step",
        dynamic_ncols=True,
        disable=processes.index() > 0,
    )
    pending: tuple[int, Any, Any] | None = None
    clock = _Clock()
    with bar:
        for step in range(first, loop.steps):
            waited = time.monotonic()
            batch = loop.place(next(loop.stream))
            waited = time.monotonic() - waited
            with jax.transfer_guard("disallow"):
                state, metrics = loop.step_fn(state, frozen, batch)
            metrics["data_wait"] = waited
            if pending is not None:
                _record(loop, bar, clock, *pending)
            pending = (step, batch, metrics)
            done = step + 1
            if done % loop.log_every == 0 or done == loop.steps:
                metrics["probe"] = loop.probe(state)
            stop = loop.stop()
            if stop or done % loop.save_every == 0 or done == loop.steps:
                _record(loop, bar, clock, *pending)
                pending = None
                if loop.log is not None:
                    loop.log.sync()
                loop.save(state, {"data": loop.stream.get_state()})
            if stop:
                raise Stopped(f"stage '{loop.name}' was asked to stop and is saved at step {done}")
    return state


class _Clock:
    """Seconds since the last call."""

    def __init__(self):
        self.last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        self.last, out = now, now - self.last
        return out


def _record(
    loop: Loop, bar: tqdm, clock: _Clock, step: int, batch, metrics: dict[str, Any]
) -> None:
    """Write one step's metrics to the bar, the log and TensorBoard.

    Its seconds are those from the end of the step before to its own, a save between them included.
    """
    probe = metrics.pop("probe", {})
    router = metrics.pop("router")
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    seconds = max(clock.lap(), 1e-9)
    if fault := _fault(loop, values, router):
        raise UserError(
            f"stage '{loop.name}', step {step + 1}: {fault}; lower learning_rate, or look at the "
            f"rows of this step, kept in {loop.keep(batch)}. The last checkpoint is intact."
        )
    if step == 0 and not values["target_tokens"]:
        raise UserError(
            f"stage '{loop.name}': no token of the first batch is a target, so there is nothing to "
            "learn; most likely data.length cuts the rows before their answers begin"
        )
    if loop.log is None:
        return
    values["learning_rate"] = float(loop.rate(step))
    row: dict[str, Any] = {**values, **probe}
    if (step + 1) % loop.log_every == 0 or step + 1 == loop.steps:
        summaries = {key: telemetry.summarise(s) for key, s in _router_stats(router)}
        for key, figures in summaries.items():
            row[f"router/{key}/entropy"] = float(figures["entropy"].mean())
            row[f"router/{key}/imbalance"] = float(figures["imbalance"].max())
        scalars = {**row, "tokens_per_second": values["tokens"] / seconds}
        if loop.board is not None:
            for name, value in scalars.items():
                loop.board.add_scalar(f"{loop.name}/{name}", value, step + 1)
        row["router"] = {
            key: {name: np.round(value, 6).tolist() for name, value in figures.items()}
            for key, figures in summaries.items()
        }
    loop.log.write(step + 1, row)
    bar.update(1)
    bar.set_postfix_str(
        f"loss {values['loss']:.4f}, {values['tokens'] / seconds:,.0f} tok/s", refresh=False
    )


def _fault(loop: Loop, values: dict[str, float], router) -> str:
    """What is not finite in a step's metrics, "" if all is well; takes the routers' flag out."""
    if values.pop("non_finite", 0.0):
        return _non_finite(loop, router)
    odd = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
    return f"{odd[0]} is {values[odd[0]]}" if odd else ""


def _non_finite(loop: Loop, router) -> str:
    """The first router, by depth, whose logits are not finite."""
    found = [
        (loop.first_layer[key.split("/")[0]] + int(layer), key)
        for key, stats in _router_stats(router)
        for layer in np.flatnonzero(stats.non_finite)
    ]
    layer, key = min(found)
    bank, site = key.split("/")
    return f"layer {layer}, {site}: the logits of bank '{bank}''s router are not finite"


def _router_stats(router) -> Iterator[tuple[str, RouterStats]]:
    for key, stats in router.items():
        yield key, jax.device_get(stats)
