"""Trials on real models and medical text: arms of a recipe, several seeds, held-out scores.

  python benchmarks/trials.py run medcare --smollm2=MODEL      # all that is not finished
  python benchmarks/trials.py run --smollm2=MODEL --gemma=MODEL --jobs=16    # every trial
  python benchmarks/trials.py show medcare                     # tables, figure, page from results

An arm is a stage of configs/trial_*.py. Its learning rate is chosen first, among FACTORS times the
recipe's, by the loss on training rows that were kept apart, with a sample of their own; then every
seed is trained. Each run has a folder in `--workdir` (default runs/trials) and goes on where it
stopped. `run` writes benchmarks/results/trial_NAME.json as runs end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import pages, trial_figures, trial_rows, trial_tables
from benchmarks.trial_rows import TRIALS, Trial
from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import count, split_gate
from medmoe_jax.api.opening import language_model
from medmoe_jax.api.tasks import open_tasks, run_tasks
from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.batches import epoch_batches
from medmoe_jax.data.conversation import Rows
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.data.rows import read_file
from medmoe_jax.data.sources import RowFitter
from medmoe_jax.evaluation import routing
from medmoe_jax.evaluation.routing import Texts
from medmoe_jax.storage.places import local
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.step import nll
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import Trained

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "trials.md"
BATCH = 16  # rows scored at once
ITEMS = 200  # of a task scored by accuracy
BASE = "base.json"
SEEDS = (0, 1, 2)
FACTORS = (0.3, 1.0, 3.0)  # times the recipe's learning rate
CHOOSING = 100  # the seed with which rates are chosen


class Job(NamedTuple):
    """One run: arms of a trial in a folder of their own.

    Attributes:
      trial: its name.
      folder: of the run, in the trial's own.
      seed: of rows and banks.
      arms: those wanted; what they build on is trained as well.
      factors: of the learning rates, by arm; 1 for others.
      choosing: whether it is scored on training rows kept apart.
    """

    trial: str
    folder: str
    seed: int
    arms: tuple[str, ...]
    factors: Mapping[str, float]
    choosing: bool


def losses(setup: Setup, trained: Trained, rows: Mapping[str, Sequence[dict]]) -> dict[str, float]:
    """Nats a target token, by name of the rows; a router chooses without being told a language."""
    model = setup.model(lifecycle.active_banks(trained.roster))
    trainable = {"banks": trained.banks, "base": trained.leaves}
    frozen = {"base": trained.base, "banks": {}}
    out = {}
    for name, some in rows.items():
        encoded = EncodedRows(name, some, setup.encoder, setup.config.data.length)
        batches = epoch_batches(encoded, BATCH)
        parts = [jax.device_get(_sums(model, trainable, frozen, batch)) for batch in batches]
        total, weight = (float(sum(column)) for column in zip(*parts, strict=True))
        out[name] = total / weight
    return out


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, trainable, frozen, batch):
    """Σ −log p and the number of targets."""
    total, (weight, _) = nll(model, trainable, frozen, batch)
    return total, weight


def scores(
    setup: Setup,
    trained: Trained,
    rows: Mapping[str, Sequence[dict]],
    tasks: Sequence[str] = (),
    off: Sequence[str] = (),
) -> dict[str, Any]:
    """`{"loss": by rows, "accuracy": by task}` of a model with some banks left out."""
    roster = trained.roster
    for bank in off:
        roster = lifecycle.set_state(roster, bank, "off")
    active = [spec.name for spec in lifecycle.active_banks(roster)]
    banks = {name: trained.banks[name] for name in active}
    model = dataclasses.replace(trained, roster=roster, banks=banks)
    found = losses(setup, model, rows)
    if not tasks:
        return {"loss": found}
    asked = open_tasks(setup, tasks, ITEMS).values()
    report = run_tasks(language_model(setup, model), asked, ITEMS)
    return {"loss": found, "accuracy": {one.task: one.score for one in report.results}}


def use_of_experts(
    setup: Setup, trained: Trained, rows: Mapping[str, Sequence[dict]]
) -> dict[str, Any]:
    """How the groups of rows use the routers' experts, by layer; {} of a model without a router."""
    model = setup.model(lifecycle.active_banks(trained.roster))
    if not any(bank.routed for bank in model.banks):
        return {}
    texts = [Texts(name, Rows(list(some), str)) for name, some in rows.items()]
    length = setup.config.data.length
    args = (model, trained.base, trained.banks, setup.mesh, texts, setup.encoder, length, BATCH)
    gates = routing.measure(*args)
    return {
        "groups": [one.code for one in texts],
        "first_layer": gates[0].first_layer,
        "divergence": np.mean([gate.divergence_N for gate in gates], axis=0).tolist(),
        "effective": np.mean([gate.effective_GxN.mean(axis=0) for gate in gates], axis=0).tolist(),
    }


def trained_parameters(trained: Trained) -> int:
    """How many parameters of its banks a stage has trained."""
    states = {name: state for name, (_, state) in trained.roster.items()}
    whole = sum(count(p) for name, p in trained.banks.items() if states[name] == "train")
    gates = (split_gate(p)[0] for name, p in trained.banks.items() if states[name] == "gate")
    return whole + sum(count(gate) for gate in gates)


def scored_rows(folder: Path) -> dict[str, list[dict]]:
    """What the models of a run are scored on, by name."""
    return {path.stem: list(read_file(path)) for path in sorted(folder.glob("scored/*.jsonl"))}


def seeded(
    config: ConfigDict, seed: int, arms: Sequence[str], factors: Mapping[str, float]
) -> ConfigDict:
    """The recipe with a seed and scaled rates, cut down to arms and what they build on."""
    needed: set[str] = set()
    for arm in arms or config.stages.order:
        while arm and arm not in needed:
            needed.add(arm)
            arm = config.stages[arm].after
    config.stages.order = tuple(name for name in config.stages.order if name in needed)
    config.data.seed = seed
    for name in config.stages.order:
        config.stages[name].seed = seed
        config.stages[name].learning_rate *= factors.get(name, 1.0)
    return config


def run(job: Job, workdir: Path, base: str) -> None:
    """Train what is not finished of a job, and score the base and every stage's end."""
    trial, folder = TRIALS[job.trial], workdir / job.trial / job.folder
    config = trial.recipe(folder)
    if base:
        config.base.path = base
    setup = open_setup(seeded(config, job.seed, job.arms, job.factors))
    if not (folder / "rows").exists():
        fit = RowFitter(setup.encoder, config.data.length)
        trial_rows.write(job.trial, folder / "rows", trial_rows.Draw(job.seed, job.choosing, fit))
    held = scored_rows(folder / "rows")
    tasks = () if job.choosing else trial.tasks
    if not job.choosing and not (folder / BASE).exists():
        bare = Trained("", {}, {}, setup.load_base())
        write_json(folder / BASE, scores(setup, bare, held, tasks))
    clock = [time.monotonic()]

    def evaluate(trained: Trained) -> dict[str, Any]:
        seconds = time.monotonic() - clock[0]
        wanted = (trial.chosen_by if job.choosing else trial.scored_on)(trained.stage)
        rows = {name: some for name, some in held.items() if not wanted or name in wanted}
        figures = scores(setup, trained, rows, tasks)
        for bank in () if job.choosing else trial.without:
            if any(spec.name == bank for spec in lifecycle.active_banks(trained.roster)):
                figures[f"without_{bank}"] = scores(setup, trained, rows, tasks, (bank,))
        if trial.routing and not job.choosing:
            figures["routing"] = use_of_experts(setup, trained, rows)
        clock[0] = time.monotonic()
        return {**figures, "parameters": trained_parameters(trained), "seconds": seconds}

    train(Run(setup, folder), evaluate)


def mixing_weights(metrics: Mapping[str, float]) -> list[float]:
    """Weights `mix/BANK/NUMBER` by their number, the skill's; a file has them by their text."""
    numbered = {int(k.rsplit("/", 1)[1]): v for k, v in metrics.items() if k.startswith("mix/")}
    return [numbered[number] for number in sorted(numbered)]


def finished(name: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The finished arms of a run, with what they have reached."""
    for arm in TRIALS[name].arms:
        stage = StageFolder.of(folder, arm)
        if stage.is_finished():
            manifest = Manifest.read(stage.manifest)
            figures = {**manifest.metrics["evaluation"], "steps": manifest.steps}
            mixed = mixing_weights(manifest.metrics["train"])
            yield arm, {**figures, "mix": mixed} if mixed else figures


def collect(name: str, workdir: Path) -> dict[str, Any]:
    """What a trial has reached: `{"base", "arms"}` by seed, and how its rates were chosen."""
    out: dict[str, Any] = {
        "base": {},
        "arms": {},
        "choice": {},
        "device": jax.devices()[0].device_kind,
    }
    for folder in sorted((workdir / name).glob("seed*")):
        seed = folder.name.removeprefix("seed")
        if (folder / BASE).exists():
            out["base"][seed] = read_json(folder / BASE)
        for arm, figures in finished(name, folder):
            out["arms"].setdefault(arm, {})[seed] = figures
            out["versions"] = Manifest.read(StageFolder.of(folder, arm).manifest).versions
    out["choice"] = {
        arm: {str(factor): loss for factor, loss in found.items()}
        for arm, found in choices(name, workdir).items()
    }
    return out


def choices(name: str, workdir: Path) -> dict[str, dict[float, float]]:
    """By arm and factor, the mean loss by which the factor is chosen; of what is trained so far."""
    trial = TRIALS[name]
    if trial.rates_of is None:
        return {}
    if trial.rates_of:
        return choices(trial.rates_of, workdir)
    out: dict[str, dict[float, float]] = {arm: {} for arm in trial.arms}
    for folder, group, factor in _choosing(trial):
        for arm, figures in finished(name, workdir / name / folder):
            if arm in group:
                rows = trial.chosen_by(arm) or tuple(figures["loss"])
                out[arm][factor] = float(np.mean([figures["loss"][one] for one in rows]))
    return out


def _choosing(
    trial: Trial, level: int | None = None
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Folder, arms and factor of every run that chooses rates, of all levels or one."""
    for number, groups in enumerate(trial.levels):
        if level in (None, number):
            for place, group in enumerate(groups):
                yield from ((f"choosing{number}.{place}_{f}", group, f) for f in FACTORS)


def rounds(name: str, workdir: Path) -> Iterator[list[Job]]:
    """The jobs of a trial: those of a round need the rounds before, and not one another."""

    def chosen() -> dict[str, float]:
        found = choices(name, workdir)
        return {arm: min(losses, key=losses.__getitem__) for arm, losses in found.items() if losses}

    trial = TRIALS[name]
    for level in range(len(trial.levels) if trial.rates_of == "" else 0):
        before = chosen() if level else {}
        yield [
            Job(name, folder, CHOOSING, group, before | dict.fromkeys(group, factor), True)
            for folder, group, factor in _choosing(trial, level)
        ]
    yield [Job(name, f"seed{seed}", seed, (), chosen(), False) for seed in SEEDS]


def run_all(names: Sequence[str], workdir: Path, bases: Mapping[str, str], jobs: int) -> None:
    """Run trials with so many processes at a time; results are written as rounds end."""
    rated = {name: Event() for name in names}  # set when its rates are chosen
    with ThreadPoolExecutor(jobs) as processes, ThreadPoolExecutor(len(names)) as trials:

        def start(job: Job) -> None:
            folder = workdir / job.trial / job.folder
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "job", json.dumps(job), f"--workdir={workdir}"]
            command += [f"--{option}={path}" for option, path in bases.items()]
            with (folder / "log").open("a") as log:
                status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            if status:
                raise SystemExit(f"{job.trial}, {job.folder}: status {status}; see {folder}/log")

        def one(name: str) -> None:
            if TRIALS[name].rates_of in names:
                rated[TRIALS[name].rates_of].wait()
            try:
                for wave in rounds(name, workdir):
                    if not wave[0].choosing:
                        rated[name].set()
                    list(processes.map(start, wave))
                    write_json(RESULTS / f"trial_{name}.json", collect(name, workdir))
            finally:
                rated[name].set()

        for _ in trials.map(one, names):
            pass


def show(names: Sequence[str]) -> None:
    """Print the tables of finished results, draw their figures, and put both into the page."""
    for question, make in trial_tables.TABLES.items():
        files = {name: RESULTS / f"trial_{name}.json" for name in make.trials}
        wanted = not names or set(names) & set(files)
        if wanted and all(path.exists() for path in files.values()):
            results = {name: read_json(path) for name, path in files.items()}
            text = make.table(results)
            print(text)
            trial_figures.draw(question, results)
            pages.put(PAGE, question, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are the process's own if not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "show", "job"))
    parser.add_argument("names", nargs="*", help="trials (default: all); of `job`, a job as JSON")
    parser.add_argument("--smollm2", default="", help="SmolLM2-135M-Instruct, a file or folder")
    parser.add_argument("--gemma", default="", help="Gemma 3 270M, a file or folder")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--workdir", type=local, default=Path("runs/trials"))
    args = parser.parse_args(arguments)
    bases = {"smollm2": args.smollm2, "gemma": args.gemma}
    if args.what == "job":
        job = Job(*json.loads(args.names[0]))
        return run(job, args.workdir, bases[TRIALS[job.trial].base])
    for name in args.names:
        if name not in TRIALS:
            parser.error(f"'{name}': trials are {', '.join(TRIALS)}")
    if args.what == "run":
        run_all(args.names or list(TRIALS), args.workdir, bases, args.jobs)
    show(args.names)


if __name__ == "__main__":
    main()
