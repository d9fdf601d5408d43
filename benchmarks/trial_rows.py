"""The rows of the trials: seeded samples of the public sets, as JSON lines.

FOLDER/train/NAME.jsonl are the sources of a trial's config. FOLDER/scored/NAME.jsonl are what its
models are scored on: rows of the sets' held-out splits, the same for every seed.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from configs import trial_families, trial_mixture, trial_skills
from medmoe_jax.checkpoints.files import new_folder
from medmoe_jax.data import medical
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.medical import Row
from medmoe_jax.data.sources import RowFitter
from medmoe_jax.data.templates import load_template
from medmoe_jax.data.tokenizers import load
from medmoe_jax.routing.languages import read_languages

TRAIN, HELD = 1500, 100  # most rows of a set
TICO_TRAIN, TICO_HELD = 400, 24  # most sentences of a language
OTHER_HELD = 12  # most rows of another set in a language
PICK = 256  # most rows by which the best single skill is picked
Files = dict[str, list[Row]]  # rows by name of file


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows, in seeded order."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def mixture(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Training and scored rows of configs/trial_mixture.py, by set."""
    train = {name: draw(_rows(name, "train"), TRAIN, seed) for name in trial_mixture.SETS}
    return train, {name: draw(_rows(name, "dev"), HELD, 0) for name in trial_mixture.SETS}


def skills(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Those of configs/trial_skills.py.

    Beside a task's held-out rows, `pick_TASK_ROWS` are scored: those that its router learns from.
    """
    train = {
        name: draw(_rows(of, "train"), TRAIN, seed) for name, of in trial_skills.SKILLS.items()
    }
    scored = {task: draw(_rows(task, "dev"), HELD, 0) for task in trial_skills.TASKS}
    for task in trial_skills.TASKS:
        rows = draw(_rows(task, "train"), TRAIN, seed)
        for count in trial_skills.ROWS:
            few = rows if count == "all" else rows[: int(count)]
            train[f"{task}_{count}"] = few
            scored[f"pick_{task}_{count}"] = few[:PICK]
    return train, scored


def families(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Those of configs/trial_families.py; scored rows by family, and those of HELD_OUT.

    Of TICO's sentences only those count whose whole row fits.
    """
    languages = read_languages(str(trial_families.TABLE))
    family = {code: languages.experts[expert] for code, expert in languages.ids.items()}
    held_out = trial_families.HELD_OUT
    train = {name: draw(_rows(name, "train"), TRAIN, seed) for name in trial_families.SETS}
    for code, rows in _by_language("tico19", "train").items():
        if code != held_out:
            train[f"tico_{code}"] = _whole(rows, TICO_TRAIN, seed, fit)
    scored: Files = defaultdict(list)
    for code, rows in _by_language("tico19", "dev").items():
        name = code if code == held_out else family[code]
        scored[name] += _whole(rows, TICO_HELD, 0, fit)
    for name in trial_families.SETS:
        for code, rows in _by_language(name, "dev").items():
            scored[family[code]] += draw(rows, OTHER_HELD, 0)
    return train, scored


class Trial(NamedTuple):
    """A trial's config, and what draws its rows by seed."""

    config: ModuleType
    rows: Callable[[int, RowFitter], tuple[Files, Files]]


TRIALS = {
    "mixture": Trial(trial_mixture, mixture),
    "families": Trial(trial_families, families),
    "skills": Trial(trial_skills, skills),
}


def write(name: str, folder: Path, seed: int) -> None:
    """Make the rows of a trial; the folder appears whole or not at all."""
    trial = TRIALS[name]
    config = trial.config.get_config()
    tokenizer = load(config.base.tokenizer)
    encoder = Encoder(tokenizer, load_template(config.data.template, tokenizer))
    fit = RowFitter(encoder, config.data.length)
    train, scored = trial.rows(seed, fit)

    def save(partial: Path) -> None:
        for part, files in (("train", train), ("scored", scored)):
            (partial / part).mkdir()
            for name, rows in files.items():
                text = "".join(json.dumps(fit(row).conversation()) + "\n" for row in rows)
                (partial / part / f"{name}.jsonl").write_text(text, encoding="utf-8")

    with new_folder(folder) as put:
        put(save)


def _rows(name: str, split: str) -> list[Row]:
    return list(medical.rows(name, split))


def _by_language(name: str, split: str) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = defaultdict(list)
    for row in medical.rows(name, split):
        out[row.language].append(row)
    return out


def _whole(rows: Sequence[Row], count: int, seed: int, fit: RowFitter) -> list[Row]:
    """At most `count` rows that need no shortening and whose answer is not cut, in seeded order."""
    out: list[Row] = []
    for row in draw(rows, len(rows), seed):
        if len(out) < count and len(fit.encoder(row.conversation()).codes) <= fit.length:
            out.append(row)
    return out
