"""The whole recipe on a tiny base and a small bilingual corpus, in minutes on two cores.

  medmoe demo --workdir=runs/demo

Trains a tokenizer and a tiny base on everyday text, then medical knowledge and clinical formats in
two stages; prints and writes (report.json, report.html) what each step gained on held-out
paraphrases and inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from medmoe_jax.checkpoints.files import read_metrics, write_json
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.session import open_model, run_tasks
from medmoe_jax.data import tokenizers
from medmoe_jax.data.demo import corpus
from medmoe_jax.evaluation import html
from medmoe_jax.evaluation.report import Report
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.terminal import console, note
from medmoe_jax.training.train import train

TASKS = ("demo_knowledge", "demo_alignment")
COLUMNS = ("model", "knowledge", "format")
# What is compared: (label, stage, banks left out).
MODELS = (
    ("base", "pretrain", ()),
    ("stage 1, with the noise bank", "aggregate", ()),
    ("stage 1, noise bank dropped", "aggregate", ("noise",)),
    ("stage 2", "align", ()),
    ("stage 2 without orthogonality", "align_free", ()),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", default="runs/demo", help="(%(default)s)")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    workdir = Path(arguments.workdir)
    config = load_config(["--config=demo", *rest])
    tokenizer = workdir / "tokenizer.model"
    if not tokenizer.exists():
        note("training the tokenizer")
        size = config.base.decoder.vocab_size
        with only_writer(workdir):
            tokenizers.train(corpus.texts_for_tokenizer(), size, tokenizer)
    config.base.tokenizer = str(tokenizer)
    opened = Run(open_setup(config), workdir)
    train(opened)
    reports = {}
    for label, stage, off in MODELS:
        note(f"evaluating: {label}")
        reports[label] = run_tasks(opened.setup, open_model(opened, stage, off), TASKS)
    cosines = {stage: _cosine(opened.stage(stage)) for stage in ("align", "align_free")}
    _write(opened, workdir, reports, cosines)


def _cosine(stage: StageRun) -> float:
    figures = Manifest.read(stage.folder.manifest).metrics["train"]
    return figures["overlap/alignment-knowledge/cos"]


def _write(opened: Run, workdir: Path, reports: Mapping[str, Report], cosines) -> None:
    """Print the table; write report.json and report.html."""
    table = Table(title="held-out scores, percent", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for label, report in reports.items():
        cells = [
            f"{100 * r.score:.1f}  ({100 * r.low:.1f} – {100 * r.high:.1f})" for r in report.results
        ]
        rows.append([label, *cells])
        table.add_row(label, *cells)
    chance = f"chance is 25% on knowledge ({next(iter(reports.values())).results[0].n} items)"
    free = cosines["align_free"] / max(cosines["align"], 1e-12)
    overlap = (
        f"mean |cos| between alignment and knowledge rows: {cosines['align']:.4f} with the "
        f"orthogonality term, {cosines['align_free']:.4f} without ({free:.1f} times as much)"
    )
    write_json(
        workdir / "report.json",
        {
            "models": {label: report.to_dict()["results"] for label, report in reports.items()},
            "mean_abs_cos": cosines,
        },
    )
    sections = [
        html.TableSection("Held-out scores, percent (95% interval)", COLUMNS, rows, chance),
        html.TextSection("Orthogonality", overlap),
        *_pictures(opened),
    ]
    page = html.report_html(workdir / "report.html", sections, "medmoe_jax demonstration")
    console.print(table)
    note(f"{chance}\n{overlap}\nwritten to {workdir / 'report.json'} and {page}")


def _pictures(opened: Run):
    """Loss curves, and each routed bank's use per layer and expert."""
    logs = {stage.name: read_metrics(stage.folder.metrics) for stage in opened.stages}
    yield html.LinesSection(
        "Training loss",
        [(name, [r["step"] for r in log], [r["loss"] for r in log]) for name, log in logs.items()],
    )
    for name, log in logs.items():
        last = next((r["router"] for r in reversed(log) if "router" in r), {})
        for router, figures in last.items():
            use = figures["use"]
            yield html.HeatMapSection(
                f"Use of the experts, {name}: {router}",
                use,
                [f"layer {i}" for i in range(len(use))],
                [f"expert {e}" for e in range(len(use[0]))],
                note="Share of the picks of a batch's tokens; every row sums to one.",
            )
