"""The optimiser of a stage, and the learning rate of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from medmoe_jax.adapters.adalora import BudgetSchedule
from medmoe_jax.training import allocation

Rate = Callable[[Any], Any]


def schedule(section: ConfigDict, steps: int) -> Rate:
    """The learning rate: a linear warm-up, then a cosine down to a share of the peak.

    Args:
      section: a stage's, with `warmup`, `learning_rate` and `final_learning_rate`.
      steps: how many the stage takes.

    Returns:
      A function of the number of updates made before, an optax schedule.
    """
    warmup = round(section.warmup * steps)
    peak, floor = section.learning_rate, section.final_learning_rate

    def rate(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(step < warmup, rising, cosine)

    return rate


def make_optimiser(
    section: ConfigDict, rate: Rate, budget_schedules: Mapping[str, BudgetSchedule] | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW and the allocation of ranks, on the trainable tree.

    Args:
      section: a stage's, with `clip` (0 = none), `b1`, `b2`, `eps` and `weight_decay`.
      rate: the learning rate (`schedule`).
      budget_schedules: by bank, how its ranks shrink.
    """
    update = optax.adamw(
        rate, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay
    )
    if budget_schedules:
        update = allocation.allocating(update, budget_schedules)
    return optax.chain(optax.clip_by_global_norm(section.clip), update) if section.clip else update
