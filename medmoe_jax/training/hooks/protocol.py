"""What a hook is, and what the loop tells it.

The loop dispatches a step to the devices and reads its metrics only after it has dispatched the
next one, so that the devices never wait for the host. So a hook hears of every step twice:

    on_start     once, before the first step
    on_step      the devices work on a step; the state that it leaves can be used and waited for
    on_metrics   the metrics of a step are known: one step later, or at once where a save follows
                 or a hook has asked for it (`Progress.settle`)
    on_save      the state is saved next
    on_end       once, when the loop is left, by an error too

A class derives from `Hook` and overrides what it needs. Each event reaches the hooks in the order
of the loop's list, and they hear it before the next event; what one hook adds to a step's metrics,
those after it see. So a new metric is one hook, or a value in what the step itself returns, and
every log has it.

With several processes the loop runs in all of them. A hook that uses the devices, or that may end
the stage, has to be in the list of every process and to decide alike everywhere. All metrics are
the same in every process but `data_wait` and `tokens_per_second`, which its own clock measures. One
that only writes or prints belongs to the first process alone (`parallel.processes.index`).

A hook that remembers something has to know it again after a restart. Every step's line is on the
disk before that step's state is saved: `on_start` can read the lines of the metrics log up to
`progress.step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.training.step import TrainState


@dataclass
class Progress:
    """How far a stage is.

    Attributes:
      stage: its name.
      step: steps dispatched so far; while `on_start` runs, those made before a restart.
      last: the step after which the stage ends.
      state: what the dispatched steps leave. The next step takes its memory: a hook that keeps
        any of it has to copy it.
      settles, saves: what hooks have asked for at this step.
    """

    stage: str
    step: int
    last: int
    state: TrainState
    settles: bool = False
    saves: bool = False

    def settle(self) -> None:
        """Have the metrics of the step under way told before the next one is dispatched.

        For `on_step`: `on_metrics` of this step then finds the state that the step leaves.
        """
        self.settles = True

    def save(self) -> None:
        """Have the state saved, though no save is due; for `on_metrics` of a settled step."""
        self.saves = True

    def end(self) -> None:
        """End the stage after the step that is under way, as if it had been the last one."""
        self.last = self.step

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is due at `step`."""
        return step % every == 0 or step == self.last


@dataclass
class StepRecord:
    """What is known of a step that the devices have made.

    Attributes:
      step: its number, from 1 on.
      batch: what it was given, on the mesh.
      router: use and load of the experts by bank and site, on the devices.
      metrics: numbers by name, for every log; hooks may add to them.
      details: more JSON-able values, for the metrics log alone; hooks may add to them.
      rare: whether a log that leaves steps out has to write this one; hooks may set it.
    """

    step: int
    batch: Mapping[str, jax.Array]
    router: Mapping[str, RouterStats]
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    rare: bool = False


class Hook:
    """Something that watches the loop; each method does nothing unless it is overridden."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step. It may end the stage: then no step is made."""

    def on_step(self, progress: Progress) -> Mapping[str, float]:
        """Step `progress.step` was dispatched.

        Returns:
          More metrics of this step.
        """
        return {}

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """The metrics of a step are known; `progress` may be a step ahead of `record`."""

    def on_save(self, progress: Progress) -> None:
        """The state after step `progress.step` is saved next; all metrics up to it are known."""

    def on_end(self, progress: Progress) -> None:
        """The loop is left, after the last step or by an error; in reverse order of the list."""
