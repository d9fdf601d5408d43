"""The model card of an export: what the run has recorded, and what is not known said to be so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

import medmoe_jax
from medmoe_jax.adapters import lifecycle
from medmoe_jax.base import decoder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.origins import CARD, Origin, origin_of
from medmoe_jax.checkpoints.stage_records import read_recipe
from medmoe_jax.data import origins
from medmoe_jax.errors import UserError, is_storage
from medmoe_jax.evaluation.report import Report, percent
from medmoe_jax.storage.places import place
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.trained import Trained, content_of

BASE_CARD = "BASE_README.md"
_TEMPLATE = resources.files("medmoe_jax.cli") / "model_card.jinja"


def card_files(run: Run, trained: Trained, off: Sequence[str], library: str) -> dict[str, Any]:
    """`{name in the exported folder: content}` of a model card and what goes with it.

    The base's own card becomes BASE_README.md, and its licence is copied beside.

    Args:
      run: where the model was trained.
      trained: the model.
      off: the banks that are left out of it.
      library: that loads the export, as the Hugging Face hub names it.

    Raises:
      UserError: the stage's own report, or the base's own card, cannot be read.
    """
    config = run.setup.config
    base = origin_of(config.base.path, run.setup.base.folder)
    if not config.base.path:
        base = Origin(f"random weights (seed {config.base.seed})")
    stages = [_stage(stage, config.data.sources) for stage in run.chain(trained.stage)]
    reports, others = _reports(run, trained, off)
    text = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text.filters |= {"percent": percent, "pairs": _pairs}
    content = text.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=_front_matter(run, base, stages, library),
        base=base,
        base_files=sorted(base.files),
        base_card=BASE_CARD,
        setup=run.setup,
        content=stages[-1]["manifest"].base_fingerprint if stages else content_of(run, trained),
        parameters=sum(map(math.prod, decoder.shapes(run.setup.base.config).values())),
        stages=stages,
        states={name: state for name, (_, state) in trained.roster.items()},
        active=lifecycle.ACTIVE,
        off=off,
        reports=reports,
        others=others,
        version=medmoe_jax.__version__,
    )
    files: dict[str, Any] = dict(base.files)
    if CARD in files:
        files[BASE_CARD] = files[CARD]
    return {**files, CARD: content.encode()}


def _front_matter(run: Run, base: Origin, stages: Sequence[dict], library: str) -> str:
    """The YAML that the hub reads; a licence that is not known is `unknown`."""
    from huggingface_hub import ModelCardData

    languages = run.setup.languages.ids if run.setup.languages else base.languages
    sources = [source for stage in stages for source in stage["sources"]]
    fields: dict[str, Any] = {
        "base_model": base.hub or None,
        "datasets": sorted({s["origin"].dataset for s in sources if s["origin"].dataset}) or None,
        "language": list(languages) or None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["medmoe_jax", "medical"],
        **(base.licence or {"license": "unknown"}),
    }
    return ModelCardData(**fields).to_yaml()


def _stage(stage: StageRun, sections: Any) -> dict[str, Any]:
    """What a finished stage has recorded of itself."""
    recipe, _ = read_recipe(stage.folder, stage.name)
    manifest = Manifest.read(stage.folder.manifest)
    mixture = recipe["stage"]["mixture"]
    return {
        "name": stage.name,
        "recipe": recipe,
        "manifest": manifest,
        "parameters": {
            name: sum(map(math.prod, bank.shapes.values())) for name, bank in manifest.banks.items()
        },
        "sources": [
            {
                "name": name,
                "weight": mixture[name],
                "digest": digest,
                "origin": origins.origin_of(sections[name])
                if name in sections
                else origins.SourceOrigin(""),
            }
            for name, digest in sorted(recipe["data"]["sources"].items())
        ],
    }


def _reports(
    run: Run, trained: Trained, off: Sequence[str]
) -> tuple[list[tuple[str, Report]], list[str]]:
    """The evaluations of this very model in the work directory by place, and those of others."""
    if not run.workdir:
        return [], []
    workdir = place(run.workdir)
    content, found, others = content_of(run, trained), [], []
    own = _own_report(run.stage(trained.stage)) if trained.stage else None
    places = [*sorted(workdir.glob("report.json")), *sorted(workdir.glob("*/report.json"))]
    for path in [own, *places] if own else places:
        name = path.relative_to(workdir).as_posix()
        try:
            report = Report.load(path)
        except UserError as error:
            if path == own or is_storage(error):
                raise
            others.append(name)  # such as the demo's, another tool's or an earlier version's
            continue
        told = report.about
        same = told.get("fingerprint") == content and sorted(told.get("off", ())) == sorted(off)
        if same or (path == own and not off):
            found.append((name, report))
        else:
            others.append(name)
    return found, others


def _own_report(stage: StageRun) -> Path | None:
    """The evaluation at a stage's end, where its manifest names one."""
    path = stage.folder.report
    return path if path.name in Manifest.read(stage.folder.manifest).files else None


def _pairs(fields: dict[str, Any]) -> str:
    """`name value` of all fields that have one, with commas between."""
    return ", ".join(f"{k} {v}" for k, v in fields.items() if v not in (None, "", [], ()))
