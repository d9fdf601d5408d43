"""Opening a model that a run has trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.parallel.rules import placed
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.transitions import replay


@dataclass(frozen=True)
class Trained:
    """A model at the end of a stage (or the bare base), ready for the forward pass.

    Attributes:
      stage: its name, "" for the base.
      roster, banks, base: see `adapters.lifecycle`.
    """

    stage: str
    roster: Roster
    banks: Mapping[str, Any]
    base: Any


def open_trained(run: Run, name: str) -> Trained:
    """The model at the end of a finished stage; "" is the bare base.

    Raises:
      CheckpointError: the stage's files are damaged.
      UserError: the stage is not finished, or the work directory is of another base, tokenizer or
        other banks.
    """
    setup = run.setup
    for stage in run.chain(name):
        stage.check()
    roster, banks, base = replay(
        setup.stages,
        name,
        setup.load_base(),
        setup.base.config,
        lambda one: load_final(run.stage(one)),
        setup.shardings,
    )
    return Trained(name, roster, banks, base)


def load_final(stage: StageRun) -> dict[str, Any]:
    """`{"banks", "base"}` at the end of a finished stage, on the mesh; one that is empty is absent.

    Raises:
      CheckpointError: the stage's files are damaged.
    """
    tree = store.abstract_final(stage.folder)
    return store.load_final(stage.folder, placed(tree, stage.setup.shardings(tree)))[0]
