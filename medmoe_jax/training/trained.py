"""Opening a model that a run has trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.parallel.rules import placed
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.transitions import replay


@dataclass(frozen=True)
class Trained:
    """A model at the end of a stage (or the bare base), ready for the forward pass.

    Attributes:
      stage: its name, "" for the base.
      roster, banks, base: see `adapters.lifecycle`.
      leaves: of the base, those that the stage has trained; `base` has the others.
    """

    stage: str
    roster: Roster
    banks: Mapping[str, Any]
    base: Any
    leaves: Any = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Any]:
        """The base with its trained leaves."""
        return trees.overlay(self.base, self.leaves)


def open_trained(run: Run, name: str, base: Any = None) -> Trained:
    """The model at the end of a finished stage; "" is the bare base.

    Args:
      run: the run.
      name: of the stage.
      base: the base as loaded, which others use too; what a merge changes is made anew. None: it is
        loaded here, and given up to the model.

    Raises:
      CheckpointError: the stage's files are damaged.
      UserError: the stage is not finished, or the work directory is of another base, tokenizer or
        other banks.
    """
    setup = run.setup
    for stage in run.chain(name):
        stage.check()
    replayed = replay(
        setup.stages,
        name,
        setup.load_base() if base is None else base,
        setup.base.config,
        lambda one: load_final(run.stage(one)),
        setup.shardings,
        donate=base is None,
    )
    return Trained(name, *replayed)


def content_of(run: Run, trained: Trained) -> str:
    """What tells a model from others: that of its stage's end, or of the bare base."""
    if not trained.stage:
        return run.setup.identify(trained.base)
    return Manifest.read(run.stage(trained.stage).folder.manifest).content


def load_final(stage: StageRun) -> dict[str, Any]:
    """`{"banks", "base"}` at the end of a finished stage, on the mesh; one that is empty is absent.

    Raises:
      CheckpointError: the stage's files are damaged.
    """
    return store.load_final(stage.folder, lambda tree: placed(tree, stage.setup.shardings(tree)))[0]
