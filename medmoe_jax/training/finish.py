"""The end of a stage: its model evaluated, then saved with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from medmoe_jax.adapters import adalora
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.fingerprint import json_fingerprint, tree_fingerprint
from medmoe_jax.checkpoints.manifest import BankEntry, Manifest, library_versions
from medmoe_jax.checkpoints.stage_records import kept_files
from medmoe_jax.training import summary
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.run import StageRun
from medmoe_jax.training.step import TrainState
from medmoe_jax.training.trained import Trained
from medmoe_jax.training.transitions import operations

Evaluate = Callable[[Trained], dict[str, Any]]


def finish(
    prepared: Prepared,
    state: TrainState,
    read: Mapping[str, Any],
    fingerprint: str,
    evaluate: Evaluate,
    confirm_lease: Callable[[], None],
) -> None:
    """Finish a stage that has made its steps.

    Args:
      prepared, state: the stage and the state that it ends with.
      read: what is to be kept of what it read.
      fingerprint: of its recipe, from `StageRun.claim`.
      evaluate: figures of the model, for the manifest.
      confirm_lease: raises where nothing more may be written.

    Raises:
      CheckpointError: it cannot be written.
    """
    stage, banks = prepared.stage, prepared.banks(state)
    figures = evaluate(prepared.trained(state))
    ranks = {
        bank: adalora.ranks(prepared.roster[bank][0], banks[bank])
        for bank in prepared.budget_schedules
    }
    summary.print_ranks(stage.name, ranks)
    steps = int(jax.device_get(state.step))
    lines = from_first_process(
        lambda: [line for line in read_metrics(stage.folder.metrics) if line["step"] == steps]
    )
    (line,) = lines or [{}]
    line.pop("router", None)
    confirm_lease()
    save_end(
        stage,
        prepared.roster,
        {"banks": banks, "base": state.trainable["base"]},
        fingerprint,
        steps=steps,
        metrics={"train": line, "ranks": ranks, **read, "evaluation": figures},
    )


def save_end(
    stage: StageRun,
    roster: Roster,
    final: Mapping[str, Any],
    fingerprint: str,
    *,
    steps: int,
    metrics: dict[str, Any],
    more: Sequence[dict[str, Any]] = (),
) -> None:
    """Save the end of a stage, which is finished then.

    Args:
      stage: the stage.
      roster: its banks.
      final: `{"banks", "base"}`: their parameters, and the base leaves it has trained.
      fingerprint: of its recipe, from `StageRun.claim`.
      steps, metrics: for the manifest.
      more: operations for the manifest besides those of the recipe.

    Raises:
      CheckpointError: it cannot be written.
    """
    left = {name: tree for name, tree in final.items() if tree}
    manifest = Manifest(
        stage=stage.name,
        after=stage.recipe.after,
        recipe_fingerprint=fingerprint,
        base_fingerprint=stage.setup.base_fingerprint,
        parent_fingerprint=stage.parent_fingerprint,
        operations=[*operations(stage.recipe), *more],
        banks={
            name: BankEntry(roster[name][1], _shapes(params))
            for name, params in final["banks"].items()
        },
        steps=steps,
        metrics=metrics,
        versions=library_versions(),
        content=json_fingerprint([fingerprint, tree_fingerprint(left)]),
        files=kept_files(stage.folder),
    )
    store.save_final(stage.folder, left, manifest)


def _shapes(params) -> dict[str, list[int]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
