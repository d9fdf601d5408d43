"""Whether the records of a stage belong together: each names those it stands on.

recipe.json     the stage, the base and the end of the stage before, by content
steps/N/SEAL    stage, recipe and step; with it, how far metrics.jsonl was written
final/SEAL      stage and recipe
manifest.json   stage, recipe, base, the end of the stage before, final/SEAL, metrics.jsonl and
                report.json; its `content` is what the next stage names
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.files import length_up_to
from medmoe_jax.checkpoints.fingerprint import file_mark, hasher
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.records import RecordError, read_record, remedy
from medmoe_jax.checkpoints.seals import changed
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import place


def read_recipe(folder: StageFolder, stage: str) -> tuple[dict[str, Any], str]:
    """The recipe that a stage was started with, by content, and its record's fingerprint.

    Raises:
      RecordError: it is gone, damaged, changed, or of a stage of another name.
    """
    try:
        record, fingerprint = read_record(folder.recipe, "stage", "recipe")
    except RecordError as error:
        raise RecordError(f"{error}; {remedy(folder.path)}") from None
    if record["stage"] != stage:
        raise RecordError(
            f"{folder.recipe} is of stage '{record['stage']}' and not of '{stage}'; "
            f"{remedy(folder.path)}"
        )
    return record["recipe"], fingerprint


def begun(workdir: str | Path) -> Iterator[tuple[StageFolder, dict[str, Any]]]:
    """Every stage that was started in a work directory, by name, with its recipe by content.

    Raises:
      RecordError: a recipe is damaged or was changed.
    """
    top = place(workdir) / "stages"
    for path in sorted(top.iterdir()) if top.is_dir() else ():
        folder = StageFolder(path)
        if not folder.recipe.exists():
            continue
        try:
            record, _ = read_record(folder.recipe, "stage", "recipe")
        except RecordError as error:
            raise RecordError(f"{error}; {remedy(path)}") from None
        if record["stage"] == path.name:  # else somebody's copy, put aside
            yield folder, record["recipe"]


def check_links(folder: StageFolder, stage: str, parent: str) -> dict[str, Any]:
    """The recipe of a finished stage, whose records belong together.

    Args:
      folder: the stage's.
      stage: its name.
      parent: `content` of the stage it starts from, as that one's manifest says now.

    Raises:
      UserError: a record is gone, damaged or another's; it names the file and says what to do.
    """
    recipe, fingerprint = read_recipe(folder, stage)
    manifest = Manifest.read(folder.manifest)
    links = (
        ("stage", manifest.stage, stage),
        ("recipe", manifest.recipe_fingerprint, fingerprint),
        ("end of the stage before", manifest.parent_fingerprint, parent),
        ("end of the stage before", recipe.get("after", ""), parent),
    )
    for what, there, here in links:
        if there != here:
            raise RecordError(
                f"{folder.manifest} is of another {what} ({there or 'none'}) than this folder's "
                f"({here or 'none'}); {remedy(folder.path)}"
            )
    for name, mark in manifest.files.items():
        if problem := changed(folder.path / name, mark):
            raise RecordError(f"{problem}; {remedy(folder.path)}")
    return recipe


def kept_files(folder: StageFolder) -> dict[str, list[Any]]:
    """What a manifest names of the files beside it."""
    found = (path for path in (folder.metrics, folder.report) if path.exists())
    return from_first_process(lambda: {path.name: file_mark(path) for path in found})


def check_metrics(folder: StageFolder, step: int, mark: list[Any]) -> None:
    """Raise RecordError unless a metrics log holds what it held at a checkpoint.

    Args:
      folder: the stage's.
      step: of the checkpoint.
      mark: `[bytes, fingerprint]` of the lines up to that step.
    """

    def problem() -> str:
        path, (size, digest) = folder.metrics, mark
        if not path.exists():
            return f"{path} is gone"
        content = path.read_bytes()
        if hasher(content[:size]).hexdigest() != digest:
            return f"{path} does not hold the lines up to step {step} that were written there"
        try:
            length = length_up_to(path, io.BytesIO(content), step)
        except UserError as error:
            return str(error)
        return "" if length == size else f"{path} holds more lines up to step {step} than it did"

    if found := from_first_process(problem):
        raise RecordError(f"{found}; {remedy(folder.path)}")
