"""What a stage starts from, on the mesh, and what its steps are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from medmoe_jax.adapters.adalora import BudgetSchedule
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.training.optimiser import Rate, make_optimiser, schedule
from medmoe_jax.training.parts import first_state, make_objective, split
from medmoe_jax.training.recipe import budget_schedules
from medmoe_jax.training.run import StageRun
from medmoe_jax.training.step import Objective, TrainState
from medmoe_jax.training.trained import Trained, open_trained
from medmoe_jax.training.transitions import start


@dataclass(frozen=True)
class Prepared:
    """A stage that is about to train, or trains: all but its state, which changes.

    Attributes:
      stage: the stage.
      roster: its banks.
      steps: how many it takes.
      rate: the learning rate, from the number of updates made before.
      budget_schedules: by bank, how its ranks shrink.
      optimiser, objective: of its steps.
      frozen: what does not train, on the mesh (see `training.step`).
    """

    stage: StageRun
    roster: Roster
    steps: int
    rate: Rate
    budget_schedules: Mapping[str, BudgetSchedule]
    optimiser: optax.GradientTransformation
    objective: Objective
    frozen: Mapping[str, Any]

    def banks(self, state: TrainState) -> dict[str, Any]:
        """All banks, trained and frozen."""
        return trees.overlay(self.frozen["banks"], state.trainable["banks"])

    def trained(self, state: TrainState) -> Trained:
        """The model that a state stands for, such as an evaluation takes."""
        dtype = self.stage.setup.dtype
        leaves = jax.tree.map(lambda leaf: leaf.astype(dtype), state.trainable["base"])
        banks, base = self.banks(state), self.frozen["base"]
        return Trained(self.stage.name, self.roster, banks, base, leaves)


def prepare(stage: StageRun, steps: int) -> tuple[Prepared, TrainState]:
    """A stage before its first step.

    Args:
      stage: the stage; those that it builds on are finished.
      steps: how many it takes.

    Raises:
      UserError: a stage before it is not finished, or the allocators do not fit the steps.
    """
    setup, recipe = stage.setup, stage.recipe
    before = open_trained(stage.run, recipe.after)
    roster, banks, base = start(
        recipe, before.roster, before.banks, before.whole, setup.base.config, setup.shardings
    )
    rate = schedule(recipe.config, steps)
    shrinking = budget_schedules(recipe, roster, steps)
    optimiser = make_optimiser(recipe.config, rate, shrinking)
    objective = make_objective(setup, recipe, roster)
    frozen, trainable = split(recipe, roster, banks, base)
    del base, banks, before  # what is spread over the mesh next is not held twice
    state, frozen = first_state(setup, optimiser, trainable, frozen)
    prepared = Prepared(stage, roster, steps, rate, shrinking, optimiser, objective, frozen)
    return prepared, state
