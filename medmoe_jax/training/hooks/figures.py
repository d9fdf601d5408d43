"""Hooks that add metrics to those which a step returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from medmoe_jax.base import trees
from medmoe_jax.parallel.mesh import replicated
from medmoe_jax.routing import telemetry
from medmoe_jax.training import allocation
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.optimiser import Rate
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.step import TrainState

Measure = Callable[[TrainState], Mapping[str, float]]


def figures(prepared: Prepared) -> list[Hook]:
    """All hooks of this module, for a stage."""
    every = prepared.stage.setup.config.run.log_every
    return [
        LearningRate(prepared.rate),
        Measured(every, regularisers(prepared)),
        Measured(every, allocated(prepared)),
        Routers(every),
    ]


class LearningRate(Hook):
    """`learning_rate` of every step."""

    def __init__(self, rate: Rate) -> None:
        """`rate` gives it from the number of updates made before."""
        self._rate = rate

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Add it."""
        record.metrics["learning_rate"] = float(self._rate(record.step - 1))


class Measured(Hook):
    """Figures of the state, every few steps."""

    def __init__(self, every: int, measure: Measure) -> None:
        """`measure` gives them; all processes call it alike."""
        self._every, self._measure = every, measure

    def on_step(self, progress: Progress) -> Mapping[str, float]:
        """Measure what the step leaves, where that is due."""
        due = progress.is_due(progress.step, self._every)
        return self._measure(progress.state) if due else {}


def regularisers(prepared: Prepared) -> Measure:
    """What the losses on parameters tell of the banks."""
    objective, frozen_banks = prepared.objective, prepared.frozen["banks"]
    specs = {spec.name: spec for spec in objective.specs}

    @functools.partial(jax.jit, out_shardings=replicated(prepared.stage.setup.mesh))
    def small(trainable, frozen_banks):
        banks = trees.overlay(frozen_banks, trainable["banks"])
        return [one.measure(specs, banks) for one in objective.regularisers]

    def measure(state: TrainState) -> dict[str, float]:
        measured = jax.device_get(small(state.trainable, frozen_banks))
        out: dict[str, float] = {}
        for one, values in zip(objective.regularisers, measured, strict=True):
            out |= one.figures(values)
        return out

    return measure


def allocated(prepared: Prepared) -> Measure:
    """Budget and ranks of the banks that are allocated."""

    def measure(state: TrainState) -> dict[str, float]:
        banks = state.trainable["banks"]
        return allocation.figures(prepared.budget_schedules, banks, state.optimiser)

    return measure


class Routers(Hook):
    """Entropy and imbalance of every router, every few steps, and their tables by layer."""

    def __init__(self, every: int) -> None:
        """Add them every so many steps."""
        self._every = every

    def on_metrics(self, progress: Progress, record: StepRecord) -> None:
        """Add them where that is due."""
        if not progress.is_due(record.step, self._every):
            return
        summaries = {
            key: telemetry.summarise(stats)
            for key, stats in jax.device_get(dict(record.router)).items()
        }
        for key, summary in summaries.items():
            record.metrics[f"router/{key}/entropy"] = float(summary["entropy"].mean())
            record.metrics[f"router/{key}/imbalance"] = float(summary["imbalance"].max())
        record.details["router"] = {
            key: {name: np.round(value, 6).tolist() for name, value in summary.items()}
            for key, summary in summaries.items()
        }
