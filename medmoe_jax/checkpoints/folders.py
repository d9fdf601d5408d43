"""The folder of a stage in a work directory, and what lies in it.

W/stages/STAGE/recipe.json     what the stage was started with, by content
W/stages/STAGE/steps/          checkpoints while it trains
W/stages/STAGE/metrics.jsonl   one line a step
W/stages/STAGE/profile/        a trace of some steps, where `run.profile` asks for one
W/stages/STAGE/final/          its banks and trained base leaves
W/stages/STAGE/manifest.json   written last: it exists = the stage is finished
W/stages/STAGE/report.json     scores of its end, where `run.tasks` names tasks
W/stages/STAGE/evaluations/    scores while it trains, a folder a step (`stages.*.evaluation`)
W/stages/STAGE/bad_batch.npz   the rows of a step whose loss or gradient was not finite
"""

from dataclasses import dataclass
from pathlib import Path

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.storage.places import place

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StageFolder:
    """The paths of one stage.

    Attributes:
      path: the folder itself, on a disk that all processes see.
    """

    path: Path

    @classmethod
    def of(cls, workdir: str | Path, stage: str) -> "StageFolder":
        """The folder of the stage of that name."""
        return cls(place(workdir) / "stages" / stage)

    @property
    def recipe(self) -> Path:
        """What the stage was started with."""
        return self.path / "recipe.json"

    @property
    def steps(self) -> Path:
        """Checkpoints, each a folder named after its step."""
        return self.path / "steps"

    @property
    def metrics(self) -> Path:
        """The metrics log."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> Path:
        """The trace of some steps."""
        return self.path / "profile"

    @property
    def final(self) -> Path:
        """Banks and trained base leaves at the stage's end."""
        return self.path / "final"

    @property
    def manifest(self) -> Path:
        """What the finished stage is."""
        return self.path / MANIFEST

    @property
    def report(self) -> Path:
        """Scores of the stage's end."""
        return self.path / "report.json"

    def evaluation(self, step: int) -> Path:
        """Report and records of the evaluation after a step."""
        return self.path / "evaluations" / str(step)

    @property
    def bad_batch(self) -> Path:
        """The rows of a step that was not finite."""
        return self.path / "bad_batch.npz"

    def is_finished(self) -> bool:
        """Whether the stage has reached its end and its banks can be loaded."""
        return from_first_process(self.manifest.exists)

    def is_used(self) -> bool:
        """Whether a run has left something here that stands on `recipe`."""
        kept = (self.manifest, self.metrics, self.final, self.steps)
        return any(path.exists() for path in kept)
