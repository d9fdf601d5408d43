"""The loop over steps: read a batch, dispatch a step, tell the hooks, save.

Step N−1's metrics are read after step N was dispatched, so that the devices never wait for the
host's bookkeeping, and the next batch is made meanwhile by the stream's own thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from medmoe_jax.base.seam import Params
from medmoe_jax.errors import Stopped
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.step import TrainState


@dataclass
class Loop:
    """What the loop needs beside the state.

    Attributes:
      name: of the stage.
      step_fn: `(state, frozen, batch) -> (state, metrics)`, compiled.
      stream: batches on the host, with `get_state`.
      to_mesh: puts a host batch on the devices.
      save: `save(step, state, extra)`, called every `save_every` steps, where a hook asks for it,
        and at the end.
      stop: asked after every step, whether to save and leave the stage unfinished.
      hooks: told of everything, in this order.
      steps, save_every: counts.
    """

    name: str
    step_fn: Callable
    stream: Any
    to_mesh: Callable[[Mapping[str, np.ndarray]], Any]
    save: Callable[[int, Any, dict], None]
    stop: Callable[[], bool]
    hooks: Sequence[Hook]
    steps: int
    save_every: int


class _Dispatched(NamedTuple):
    """A step whose metrics are not read yet: those of the devices, and those of the host."""

    step: int
    batch: Any
    metrics: dict[str, Any]
    own: dict[str, float]


def run(loop: Loop, state: TrainState, frozen: Params, first: int) -> TrainState:
    """Steps `first + 1 .. loop.steps`, or fewer if a hook ends the stage.

    Returns:
      The state after the last step.

    Raises:
      UserError: a hook says that a step went wrong.
      Stopped: `loop.stop` asked for it; the state is saved.
    """
    progress = Progress(loop.name, first, loop.steps, state)
    with contextlib.ExitStack() as leaving:
        for hook in loop.hooks:
            hook.on_start(progress)
            leaving.callback(hook.on_end, progress)
        _make_steps(loop, progress, frozen)
    return progress.state


def _make_steps(loop: Loop, progress: Progress, frozen) -> None:
    before: _Dispatched | None = None
    clock = _Clock()
    while progress.step < progress.last:
        asked = time.monotonic()
        batch = loop.to_mesh(next(loop.stream))
        own = {"data_wait": time.monotonic() - asked}
        traced = jax.profiler.StepTraceAnnotation(loop.name, step_num=progress.step + 1)
        with traced, jax.transfer_guard("disallow"):
            progress.state, metrics = loop.step_fn(progress.state, frozen, batch)
        progress.step += 1
        progress.settles = progress.saves = False
        if before is not None:
            _tell_metrics(loop, progress, clock, before)
        for hook in loop.hooks:
            own |= hook.on_step(progress)
        before = _Dispatched(progress.step, batch, metrics, own)
        stop = loop.stop()
        told = stop or progress.settles or progress.saves
        if told or progress.is_due(progress.step, loop.save_every):
            _tell_metrics(loop, progress, clock, before)
            before = None
        # A hook may have ended the stage here, or asked for a save.
        if stop or progress.saves or progress.is_due(progress.step, loop.save_every):
            for hook in loop.hooks:
                hook.on_save(progress)
            loop.save(progress.step, progress.state, {"data": loop.stream.get_state()})
        if stop:
            raise Stopped(
                f"stage '{loop.name}' was asked to stop and is saved at step {progress.step}"
            )


class _Clock:
    """Seconds since the last call."""

    def __init__(self):
        self.last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        self.last, out = now, now - self.last
        return out


def _tell_metrics(loop: Loop, progress: Progress, clock: _Clock, made: _Dispatched) -> None:
    """Read a step's metrics, which waits for its end, and tell the hooks.

    Its seconds are those from the end of the step before to its own, a save or an evaluation
    between them included.
    """
    router = made.metrics.pop("router", {})
    metrics = {name: float(value) for name, value in jax.device_get(made.metrics).items()}
    metrics["tokens_per_second"] = metrics["tokens"] / max(clock.lap(), 1e-9)
    record = StepRecord(made.step, made.batch, router, {**metrics, **made.own})
    for hook in loop.hooks:
        hook.on_metrics(progress, record)
