"""Trials on real medical text: arms of a recipe, several seeds, and the loss on held-out rows.

  python benchmarks/trials.py base                              # what all trials stand on
  python benchmarks/trials.py rows mixture --seeds 0            # what a config reads
  python benchmarks/trials.py run mixture --seeds 0 1 2         # every arm that is not finished
  python benchmarks/trials.py run mixture --seeds 0 --arms lora # one arm and what it builds on
  python benchmarks/trials.py table mixture                     # of all that is finished

An arm is a stage of configs/trial_NAME.py. `--workdir` (default runs/trials) holds a run a seed;
`run` and `table` write benchmarks/results/trial_NAME.json, print the tables made of it and put them
into docs/trials.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
from ml_collections import ConfigDict

from benchmarks import trial_rows, trial_tables
from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import count, split_gate
from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.cli.main import main as medmoe
from medmoe_jax.data.batches import epoch_batches
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.data.rows import read_file
from medmoe_jax.storage.places import local
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.step import nll
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import Trained

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "trials.md"
BATCH = 32  # rows scored at once
BASE = "base.json"
BASE_SEED = 100  # of its rows; the trials draw theirs with their own


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


def trained_parameters(trained: Trained) -> int:
    """How many parameters of its banks a stage has trained."""
    states = {name: state for name, (_, state) in trained.roster.items()}
    whole = sum(count(p) for name, p in trained.banks.items() if states[name] == "train")
    gates = (split_gate(p)[0] for name, p in trained.banks.items() if states[name] == "gate")
    return whole + sum(count(gate) for gate in gates)


def scored_rows(folder: Path) -> dict[str, list[dict]]:
    """What the models of a run are scored on, by name."""
    return {path.stem: list(read_file(path)) for path in sorted(folder.glob("scored/*.jsonl"))}


def seeded(config: ConfigDict, seed: int, arms: Sequence[str]) -> ConfigDict:
    """The recipe with a seed, cut down to some arms and the stages that they build on."""
    needed: set[str] = set()
    for arm in arms or config.stages.order:
        while arm and arm not in needed:
            needed.add(arm)
            arm = config.stages[arm].after
    config.stages.order = tuple(name for name in config.stages.order if name in needed)
    config.data.seed = seed
    for name in config.stages.order:
        config.stages[name].seed = seed
    return config


def run(config: ConfigDict, workdir: Path, rows: Mapping[str, Sequence[dict]]) -> None:
    """Train what is not finished, and score the base and every stage's end."""
    setup = open_setup(config)
    if not (workdir / BASE).exists():
        base = Trained("", {}, {}, setup.load_base())
        write_json(workdir / BASE, losses(setup, base, rows))
    clock = [time.monotonic()]

    def evaluate(trained: Trained) -> dict[str, Any]:
        seconds = time.monotonic() - clock[0]
        figures = {
            "loss": losses(setup, trained, rows),
            "parameters": trained_parameters(trained),
            "seconds": seconds,
        }
        clock[0] = time.monotonic()
        return figures

    train(Run(setup, workdir), evaluate)


def mixing_weights(metrics: Mapping[str, float]) -> list[float]:
    """Weights `mix/BANK/NUMBER` by their number, the skill's; a file has them by their text."""
    numbered = {int(k.rsplit("/", 1)[1]): v for k, v in metrics.items() if k.startswith("mix/")}
    return [numbered[number] for number in sorted(numbered)]


def collect(name: str, workdir: Path) -> dict[str, Any]:
    """What the finished arms of a trial have reached: `{"base", "arms", "versions"}` by seed."""
    out: dict[str, Any] = {"base": {}, "arms": {}, "versions": {}}
    for folder in sorted(workdir.glob("seed*")):
        seed = folder.name.removeprefix("seed")
        if (folder / BASE).exists():
            out["base"][seed] = {"loss": read_json(folder / BASE)}
        for arm in trial_rows.TRIALS[name].config.get_config().stages.order:
            stage = StageFolder.of(folder, arm)
            if stage.is_finished():
                manifest = Manifest.read(stage.manifest)
                figures = {**manifest.metrics["evaluation"], "steps": manifest.steps}
                mixed = mixing_weights(manifest.metrics["train"])
                if mixed:
                    figures["mix"] = mixed
                out["arms"].setdefault(arm, {})[seed] = figures
                out["versions"] = manifest.versions
    return out


def show(name: str, workdir: Path) -> None:
    """Write what is finished as JSON, print its tables, and put them into the page."""
    path = RESULTS / f"trial_{name}.json"
    write_json(path, collect(name, workdir))
    text = trial_tables.TABLES[name](read_json(path))
    print(text)
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def make_base(workdir: Path) -> None:
    """Train and export the base of all trials, unless it is there."""
    if (workdir / "base").exists():
        return
    folder = workdir / "embedding"
    make_rows("families", folder, BASE_SEED)
    recipe = [f"--config={ROOT / 'configs' / 'trial_base.py'}:{folder}", f"--workdir={folder}"]
    for command in (["train"], ["export", "--format=hf", f"--output={workdir / 'base'}"]):
        if status := medmoe([*command, *recipe]):
            raise SystemExit(status)


def make_rows(name: str, folder: Path, seed: int) -> None:
    """Draw the rows of a run, unless they are there."""
    if not (folder / "rows").exists():
        trial_rows.write(name, folder / "rows", seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are the process's own if not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("base", "rows", "run", "table"))
    parser.add_argument("trial", nargs="?", choices=trial_rows.TRIALS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[], help="stages (default: all)")
    parser.add_argument("--workdir", type=local, default=Path("runs/trials"))
    args = parser.parse_args(arguments)
    if args.what == "base":
        return make_base(args.workdir)
    if args.trial is None:
        parser.error(f"name a trial: {', '.join(trial_rows.TRIALS)}")
    for seed in args.seeds if args.what != "table" else ():
        folder = args.workdir / args.trial / f"seed{seed}"
        make_rows(args.trial, folder, seed)
        if args.what == "run":
            config = trial_rows.TRIALS[args.trial].config.get_config(str(folder))
            run(seeded(config, seed, args.arms), folder, scored_rows(folder / "rows"))
    if args.what != "rows":
        show(args.trial, args.workdir / args.trial)


if __name__ == "__main__":
    main()
