"""What a stage's folder was made with, and whether this run is of the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.fingerprint import json_fingerprint
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.templates import Jinja
from medmoe_jax.errors import UserError
from medmoe_jax.training.recipe import Stage
from medmoe_jax.training.setup import Setup

# Of a stage's section: what decides which function its banks compute.
_MODEL_FIELDS = ("after", "merge", "drop", "stack", "banks", "states", "train_base")


def stage_dir(workdir: str | Path, name: str) -> Path:
    """Where a stage lives."""
    return Path(workdir) / "stages" / name


def claim(
    setup: Setup,
    workdir,
    stage: Stage,
    digests: Mapping[str, str],
    imported: Mapping[str, Any] | None = None,
) -> str:
    """Write what the stage is run with, or compare it with what it was; returns its fingerprint.

    Args:
      setup, workdir, stage: whose folder.
      digests: content of the sources it reads.
      imported: what its banks come from where it is not trained: the content of files, or that of
        a task's rows and how it was fitted on them.

    Raises:
      UserError: the directory was made by another recipe; the message lists the fields.
    """
    config = setup.config
    data = config.data.to_dict()
    data.pop("sources")
    data["languages"] = dict(setup.languages.ids) if setup.languages else {}
    if isinstance(setup.template, Jinja):
        data["template"] = json_fingerprint(setup.template.source)
    content = {
        "base": {
            "content": setup.base_fingerprint,
            "dtype": config.base.dtype,
            "quantise": config.base.quantise,
        },
        "data": {**data, "tokenizer": setup.tokenizer.digest, "sources": dict(digests)},
        "stage": stage.config.to_dict(),
    }
    if stage.after:
        content["after"] = parent_fingerprint(workdir, stage)
    if imported is not None:
        content["imported"] = dict(imported)
    fingerprint = json_fingerprint(content)
    path = stage_dir(workdir, stage.name) / "recipe.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": fingerprint, "recipe": content})
        return fingerprint
    before = read_json(path)
    if before["fingerprint"] != fingerprint:
        changed = _differences(before["recipe"], _read_back(content))
        raise UserError(
            f"{path.parent} was made by another recipe; {'; '.join(changed)}. Use another workdir, "
            "or remove that folder to run the stage anew"
        )
    return fingerprint


def is_claimed(workdir, stage: Stage) -> bool:
    """Whether the stage's folder belongs to a recipe already."""
    return (stage_dir(workdir, stage.name) / "recipe.json").exists()


def is_imported(workdir, stage: Stage) -> bool:
    """Whether the stage is finished with banks that were not trained here."""
    directory = stage_dir(workdir, stage.name)
    finished = store.is_finished(directory)
    return finished and "imported" in read_json(directory / "recipe.json")["recipe"]


def _read_back(value: Any) -> Any:
    """A value as JSON gives it back (tuples become lists)."""
    if isinstance(value, Mapping):
        return {key: _read_back(item) for key, item in value.items()}
    return [_read_back(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path.lstrip('.')}: {old!r} then, {new!r} now"]


def check_stage(setup: Setup, workdir, stage: Stage) -> None:
    """Raise UserError unless the stage is finished and was made with this base and these banks."""
    directory = stage_dir(workdir, stage.name)
    if not store.is_finished(directory):
        raise UserError(
            f"stage '{stage.name}' is not finished in {workdir}; run medmoe train first"
        )
    manifest = Manifest.read(directory / store.MANIFEST)
    if manifest.base_fingerprint != setup.base_fingerprint:
        raise UserError(
            f"{directory} was trained on another base (content "
            f"{manifest.base_fingerprint[:12]}, this one is {setup.base_fingerprint[:12]}); set "
            "base.path, base.dtype and base.quantise to what it was trained with"
        )
    recipe = read_json(directory / "recipe.json")["recipe"]
    then = {name: recipe["stage"].get(name) for name in _MODEL_FIELDS}
    now = _read_back({name: stage.config.to_dict()[name] for name in _MODEL_FIELDS})
    changed = _differences(then, now, f"stages.{stage.name}")
    changed += _differences(recipe["data"]["tokenizer"], setup.tokenizer.digest, "tokenizer")
    if changed:
        raise UserError(f"{directory} holds another model; {'; '.join(changed)}")


def parent_fingerprint(workdir, stage: Stage) -> str:
    """The recipe fingerprint of the stage it starts from, or ""."""
    if not stage.after:
        return ""
    return read_json(stage_dir(workdir, stage.after) / "recipe.json")["fingerprint"]


def operations(stage: Stage) -> list[dict[str, Any]]:
    """What happened to the banks before a stage, for its manifest."""
    return [
        *({"op": "merge", "bank": name} for name in stage.merge),
        *({"op": "drop", "bank": name} for name in stage.drop),
        *({"op": "stack", "bank": name, "of": list(of)} for name, (of, _) in stage.stack.items()),
        *({"op": "state", "bank": name, "state": s} for name, s in stage.states.items()),
        *({"op": "add", "bank": spec.name} for spec in stage.added),
    ]
