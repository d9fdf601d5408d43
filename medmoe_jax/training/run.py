"""A run: a recipe in a work directory, and whether the directory is of that recipe.

Each stage has a folder (`checkpoints.folders`). What the stage was started with is written there
by content when it begins (`StageRun.claim`), and compared from then on. With several processes all
of them call everything here alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.records import write_record
from medmoe_jax.checkpoints.seals import SEAL
from medmoe_jax.checkpoints.stage_records import begun, check_links, read_recipe
from medmoe_jax.checkpoints.stages import check_final
from medmoe_jax.errors import UserError
from medmoe_jax.training.kept import keep
from medmoe_jax.training.reading import open_data as open_data  # where others have it from
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.stage import Stage, chain, find_stage

# The fields of a stage's section that decide which function its banks compute.
_MODEL_FIELDS = ("after", "merge", "drop", "stack", "banks", "states", "train_base")
# The fields of `data` that decide which text a model reads, and which experts read it.
_TEXT_FIELDS = ("tokenizer", "template", "template_options", "detect_language")
_UNREAD = "unread"  # in the place of a fingerprint of weights


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
        """The name of the last stage in order that is finished, or "".

        Raises:
          UserError: a later one has left its end, and what says so is gone.
        """
        for stage in reversed(self.stages):
            if stage.folder.is_finished():
                return stage.name
            if from_first_process((stage.folder.final / SEAL).exists):
                raise UserError(
                    f"{stage.folder.manifest}: no such file, though {stage.folder.final} is there; "
                    "put it back, or let medmoe train finish the stage"
                )
        return ""


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
        """`content` of the stage it starts from, which is finished, or ""."""
        if not self.recipe.after:
            return ""
        return Manifest.read(self.run.stage(self.recipe.after).folder.manifest).content

    def is_claimed(self) -> bool:
        """Whether the stage's folder belongs to a recipe already."""
        return self.folder.recipe.exists()

    def is_imported(self) -> bool:
        """Whether the stage is finished with banks that were not trained here."""
        return self.folder.is_finished() and "imported" in read_recipe(self.folder, self.name)[0]

    def claim(self, digests: Mapping[str, str], imported: Mapping[str, Any] | None = None) -> str:
        """Write what the stage is run with, or compare it with what it was; gives its fingerprint.

        Args:
          digests: content of the sources it reads.
          imported: what its banks come from where it is not trained: the content of files, or that
            of a task's rows and how it was fitted on them.

        Where the stage is not finished, the configuration is kept beside it (`training.kept`).

        Raises:
          UserError: the folder was made by another recipe, or a stage beside it on another base or
            text, and the message lists the fields; or what it was made by is gone or changed.
        """
        content = self._content(digests)
        if imported is not None:
            content["imported"] = dict(imported)

        def claim() -> str:
            fingerprint = self._claim(_read_back(content))
            if not self.folder.manifest.exists():
                keep(self.setup.config, self.run.workdir)
            return fingerprint

        return from_first_process(claim)

    def _claim(self, content: dict[str, Any]) -> str:
        folder = self.folder
        if not self._is_begun():
            self._check_beside(content)
            return write_record(folder.recipe, {"stage": self.name, "recipe": content})
        before, fingerprint = read_recipe(folder, self.name)
        self._compare(before, content)
        return fingerprint

    def _is_begun(self) -> bool:
        return self.folder.recipe.exists() or self.folder.is_used()

    def _compare(self, before: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        rows = self._changed_rows(*(one["data"]["sources"] for one in (before, content)))
        known = {**before, "data": {**before["data"], "sources": content["data"]["sources"]}}
        if changed := [*rows, *_differences(known, content)]:
            raise UserError(
                f"{self.folder.path} was made by another recipe; {'; '.join(changed)}. Use another "
                "workdir, or remove that folder to run the stage anew"
            )

    def _changed_rows(self, then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
        """What is to be said of sources whose content is not what it was: digests say nothing."""
        found = []
        for name in sorted(then.keys() | now.keys()):
            if name not in now or name not in then:
                read = "now and not then" if name in now else "then and not now"
                found.append(f"data.sources.{name}: read {read}")
            elif then[name] != now[name]:
                fields = self.setup.config.data.sources[name]
                found.append(
                    f"data.sources.{name}: the rows of {fields.path or fields.reader} have changed "
                    "(the file, or what prompt, columns, window and data.ignore make of it)"
                )
        return found

    def check_claim(self) -> None:
        """Raise UserError where `claim` or `check` would, were weights and rows what they were.

        Those are not read. The stages that it builds on are finished.
        """
        if not self._is_begun():
            self._check_beside(_read_back(self._content({}, _UNREAD)))
            return
        then, _ = read_recipe(self.folder, self.name)
        now = _read_back(self._content(then["data"]["sources"], then["base"]["weights"]))
        if "imported" not in then:
            self._compare(then, now)
        if self.folder.is_finished():
            self._check(now)

    def _check_beside(self, now: Mapping[str, Any]) -> None:
        """Raise UserError where a stage of the work directory is of another base or text.

        The configuration that is kept opens every stage there, and this one's is about to be.
        """
        for folder, then in begun(self.run.workdir):
            unread = now["base"]["weights"] == _UNREAD
            base = {**now["base"], "weights": then["base"]["weights"]} if unread else now["base"]
            if changed := _other_text(then, {**now, "base": base}):
                raise UserError(
                    f"{folder.path} was trained on another base, or with another tokenizer or "
                    f"template; {'; '.join(changed)}. A work directory has one of each: use "
                    "another workdir, or set base and data to what is there"
                )

    def _content(self, digests: Mapping[str, str], weights: str = "") -> dict[str, Any]:
        """All that decides what training the stage gives, by content.

        Args:
          digests: of its sources.
          weights: fingerprint of the base's; "" = they are read for it.
        """
        setup = self.setup
        data = setup.config.data.to_dict()
        data.pop("sources")
        data.pop("ignore")  # what it leaves of the rows is in the digests
        section = self.recipe.config.to_dict()
        if not section["evaluation"]["best"]:
            section.pop("evaluation")  # it tells, and decides nothing
        content = {
            "base": {"weights": weights or setup.weights_fingerprint, **setup.identity["base"]},
            "data": {
                **data,
                **setup.identity["data"],
                "languages": dict(setup.languages.ids) if setup.languages else {},
                "sources": dict(digests),
            },
            "stage": section,
        }
        if self.recipe.after:
            content["after"] = self.parent_fingerprint
        return content

    def check(self) -> None:
        """Raise UserError unless it is finished and is the model that the configuration means.

        Its records belong together, and it was made with this base, this text and these banks. Of
        what it left, `load_final` sees whether that is whole, as `check_whole` does.
        """
        now = _read_back(self._content({}))
        from_first_process(lambda: self._check(now))

    def check_whole(self) -> None:
        """`check`, and raise CheckpointError where what it left is damaged or another's."""
        self.check()
        check_final(self.folder)

    def _check(self, now: Mapping[str, Any]) -> None:
        folder = self.folder
        if not folder.manifest.exists():
            raise UserError(
                f"stage '{self.name}' is not finished in {self.run.workdir}; run medmoe train first"
            )
        then = check_links(folder, self.name, self.parent_fingerprint)
        if changed := _other_text(then, now):
            raise UserError(
                f"{folder.path} was trained on another base, or with another tokenizer or "
                f"template; {'; '.join(changed)}. Set base and data to what it was trained with"
            )
        if changed := _changed(then, now, "stage", _MODEL_FIELDS, f"stages.{self.name}"):
            raise UserError(f"{folder.path} holds another model; {'; '.join(changed)}")


def _other_text(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two recipes in base, tokenizer, template and languages."""
    changed = _changed(then, now, "base") + _changed(then, now, "data", _TEXT_FIELDS)
    # Others may have joined since: the experts answer them as they are.
    known = tuple(then["data"]["languages"])
    languages = (recipe["data"]["languages"] for recipe in (then, now))
    return changed + _differences(*(_of(one, known) for one in languages), "data.languages")


def _changed(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    section: str,
    fields: Sequence[str] = (),
    shown: str = "",
) -> list[str]:
    """The differences in a section of a recipe, of all its fields or of some; `shown`: its name."""
    parts = [dict(recipe.get(section) or {}) for recipe in (then, now)]
    old, new = (_of(part, fields or tuple(part)) for part in parts)
    return _differences(old, new, shown or section)


def _of(section: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {name: section.get(name) for name in fields}


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
