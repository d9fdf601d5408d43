"""Training a recipe: `medmoe_jax.train`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax import interrupts
from medmoe_jax.api import configs
from medmoe_jax.api.in_training import task_scorer
from medmoe_jax.api.model import Model, load
from medmoe_jax.api.opening import open_run
from medmoe_jax.api.table import Table
from medmoe_jax.api.tasks import stage_evaluator
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.training.run import Run
from medmoe_jax.training.train import MakeHooks
from medmoe_jax.training.train import train as train_stages


@dataclass(frozen=True)
class Finished:
    """A run whose stages are all finished.

    Attributes:
      run: the recipe and its work directory.
    """

    run: Run

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages in order."""
        return tuple(stage.name for stage in self.run.stages)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What each stage is, by its name: banks, steps, last metrics, versions."""
        return {stage.name: Manifest.read(stage.folder.manifest) for stage in self.run.stages}

    @property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """A row a step of each stage, by its name; none for one that was not trained here."""
        files = {stage.name: stage.folder.metrics for stage in self.run.stages}
        return {name: read_metrics(file) if file.is_file() else [] for name, file in files.items()}

    @property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """`score`, `low` and `high` of the tasks of `run.tasks` at each stage's end, by names."""
        return {
            name: manifest.metrics.get("evaluation", {})
            for name, manifest in self.manifests.items()
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a stage, for a `Table`: steps, parameters in banks that it trained, loss, scores.

        A score is a share from 0 to 1, by its task of `run.tasks`.
        """
        return [
            {
                "stage": name,
                "steps": manifest.steps,
                "bank parameters": manifest.trained,
                "loss": manifest.metrics.get("train", {}).get("loss"),
                **{task: found["score"] for task, found in self.scores[name].items()},
            }
            for name, manifest in self.manifests.items()
        ]

    def load(self, stage: str | None = None, off: Sequence[str] = (), language: str = "") -> Model:
        """The model at the end of a stage; see `medmoe_jax.load`."""
        return load(self.run, stage=stage, off=off, language=language)

    def __repr__(self) -> str:
        return f"Finished({', '.join(self.stages) or 'no stage'}; in {self.run.workdir})"

    def _repr_html_(self) -> str:
        return Table(self.rows)._repr_html_()


@interrupts.never_lost()
def train(
    config: str | os.PathLike[str] | ConfigDict,
    workdir: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    more_hooks: MakeHooks = lambda _: (),
) -> Finished:
    """Run every stage of a recipe that is not finished; the same call resumes.

    Args:
      config: the recipe, as of `medmoe_jax.config`.
      workdir: where everything is kept and resumed.
      overrides: values by field, `{"stages.align.epochs": 2.0}`.
      stop: asked after every step, whether to save and end there.
      more_hooks: gives hooks of the caller (docs/architecture.md#hooks).

    Raises:
      UserError: a bad configuration or input, or the work directory belongs to another recipe.
      LeaseError: another program writes into the work directory.
      StorageError: it cannot be written.
      Stopped: `stop` said so; the same call continues.
    """
    run = open_run(configs.config(config, overrides), os.fspath(workdir))
    try:
        train_run(run, stop, more_hooks)
    except KeyboardInterrupt as error:
        # A notebook keeps the traceback, whose frames would keep the model's arrays.
        traceback.clear_frames(error.__traceback__)
        raise
    return Finished(run)


def train_run(run: Run, stop: Callable[[], bool], more_hooks: MakeHooks = lambda _: ()) -> None:
    """Run the stages of a run, with the scores that its configuration asks for; see `train`."""
    at_end, meanwhile = stage_evaluator(run, stop), task_scorer(run, stop)
    train_stages(run, at_end, stop, more_hooks, score_tasks=meanwhile)
