"""A run: a recipe in a work directory, and whether the directory is of that recipe.

Each stage has a folder (`checkpoints.folders`). What the stage was started with is written there
by content when it begins (`StageRun.claim`), and compared from then on. With several processes all
of them call everything here alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.fingerprint import json_fingerprint
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.jinja_template import Jinja
from medmoe_jax.errors import UserError
from medmoe_jax.training.reading import open_data as open_data  # where others have it from
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import Stage, chain, find_stage

# The fields of a stage's section that decide which function its banks compute.
_MODEL_FIELDS = ("after", "merge", "drop", "stack", "banks", "states", "train_base")


@dataclass(frozen=True)
class Run:
    """A recipe in a work directory.

    Attributes:
      setup: the configuration's parts.
      workdir: where everything is kept; the same directory continues the same recipe. "" = none,
        for a recipe with no stage.
    """

    setup: Setup
    workdir: str | Path

    @property
    def stages(self) -> tuple[StageRun, ...]:
        """The recipe's stages in order."""
        return tuple(StageRun(self, stage) for stage in self.setup.stages)

    def stage(self, name: str) -> StageRun:
        """The stage of that name. Raises ParameterError, which names those there are."""
        return StageRun(self, find_stage(self.setup.stages, name))

    def chain(self, name: str) -> tuple[StageRun, ...]:
        """The stage of that name with those it builds on, first to last; "" gives none."""
        return tuple(StageRun(self, stage) for stage in chain(self.setup.stages, name))

    def last_finished(self) -> str:
        """The name of the last stage in order that is finished, or ""."""
        return next((s.name for s in reversed(self.stages) if s.folder.is_finished()), "")


@dataclass(frozen=True)
class StageRun:
    """One stage of a run.

    Attributes:
      run: the run.
      recipe: the stage's part of the recipe.
    """

    run: Run
    recipe: Stage

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.recipe.name

    @property
    def setup(self) -> Setup:
        """The run's setup."""
        return self.run.setup

    @property
    def folder(self) -> StageFolder:
        """Where the stage is kept."""
        return StageFolder.of(self.run.workdir, self.name)

    @property
    def parent_fingerprint(self) -> str:
        """The recipe fingerprint of the stage it starts from, or ""."""
        if not self.recipe.after:
            return ""
        return read_json(self.run.stage(self.recipe.after).folder.recipe)["fingerprint"]

    def is_claimed(self) -> bool:
        """Whether the stage's folder belongs to a recipe already."""
        return self.folder.recipe.exists()

    def is_imported(self) -> bool:
        """Whether the stage is finished with banks that were not trained here."""
        finished = self.folder.is_finished()
        return finished and "imported" in read_json(self.folder.recipe)["recipe"]

    def claim(self, digests: Mapping[str, str], imported: Mapping[str, Any] | None = None) -> str:
        """Write what the stage is run with, or compare it with what it was; gives its fingerprint.

        Args:
          digests: content of the sources it reads.
          imported: what its banks come from where it is not trained: the content of files, or that
            of a task's rows and how it was fitted on them.

        Raises:
          UserError: the folder was made by another recipe; the message lists the fields.
        """
        content = self._content(digests)
        if imported is not None:
            content["imported"] = dict(imported)
        fingerprint = json_fingerprint(content)
        path = self.folder.recipe
        if not path.exists():
            write_json(path, {"fingerprint": fingerprint, "recipe": content})
            return fingerprint
        before = read_json(path)
        if before["fingerprint"] != fingerprint:
            changed = _differences(before["recipe"], _read_back(content))
            raise UserError(
                f"{path.parent} was made by another recipe; {'; '.join(changed)}. Use another "
                "workdir, or remove that folder to run the stage anew"
            )
        return fingerprint

    def _content(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """All that decides what training the stage gives, by content."""
        setup = self.setup
        config, data = setup.config, setup.config.data.to_dict()
        data.pop("sources")
        data.pop("ignore")  # what it leaves of the rows is in the digests
        if not data["template_options"]:
            data.pop("template_options")  # as work directories know it that are older than it
        data["languages"] = dict(setup.languages.ids) if setup.languages else {}
        if isinstance(setup.template, Jinja):
            data["template"] = json_fingerprint(setup.template.source)
        section = self.recipe.config.to_dict()
        if not section["evaluation"]["best"]:
            section.pop("evaluation")  # it tells, and decides nothing
        content = {
            "base": {
                "content": setup.base_fingerprint,
                "dtype": config.base.dtype,
                "quantise": config.base.quantise,
            },
            "data": {**data, "tokenizer": setup.tokenizer.digest, "sources": dict(digests)},
            "stage": section,
        }
        if self.recipe.after:
            content["after"] = self.parent_fingerprint
        return content

    def check(self) -> None:
        """Raise UserError unless it is finished and was made with this base and these banks."""
        folder, setup = self.folder, self.setup
        if not folder.is_finished():
            raise UserError(
                f"stage '{self.name}' is not finished in {self.run.workdir}; run medmoe train first"
            )
        manifest = Manifest.read(folder.manifest)
        if manifest.base_fingerprint != setup.base_fingerprint:
            raise UserError(
                f"{folder.path} was trained on another base (content "
                f"{manifest.base_fingerprint[:12]}, this one is {setup.base_fingerprint[:12]}); "
                "set base.path, base.dtype and base.quantise to what it was trained with"
            )
        then = read_json(folder.recipe)["recipe"]
        now = _read_back(self.recipe.config.to_dict())
        changed = _differences(
            {name: then["stage"].get(name) for name in _MODEL_FIELDS},
            {name: now[name] for name in _MODEL_FIELDS},
            f"stages.{self.name}",
        )
        changed += _differences(then["data"]["tokenizer"], setup.tokenizer.digest, "tokenizer")
        if changed:
            raise UserError(f"{folder.path} holds another model; {'; '.join(changed)}")


def _read_back(value: Any) -> Any:
    """A value as JSON gives it back (tuples become lists)."""
    if isinstance(value, Mapping):
        return {key: _read_back(item) for key, item in value.items()}
    return [_read_back(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields in which two JSON values differ, each with both its values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path.lstrip('.')}: {old!r} then, {new!r} now"]
