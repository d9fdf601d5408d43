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
from medmoe_jax.data.medical.row import held_out
from medmoe_jax.data.sources import RowFitter
from medmoe_jax.data.templates import load_template
from medmoe_jax.data.tokenizers import load
from medmoe_jax.routing.languages import read_languages

TRAIN, HELD = 1500, 100  # most rows of a set
TICO_TRAIN, TICO_HELD = 400, 24  # most sentences of a language
OTHER_HELD = 12  # most rows of another set in a language
PICK = 128  # most rows by which the best single skill is picked
Files = dict[str, list[Row]]  # rows by name of file


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows, in seeded order."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def mixture(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Training and scored rows of configs/trial_mixture.py, by set."""
    sets = trial_mixture.SETS
    train = {name: _of_set(name, "train", TRAIN, seed, fit) for name in sets}
    return train, {name: _of_set(name, "dev", HELD, 0, fit) for name in sets}


def skills(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Those of configs/trial_skills.py.

    Beside a task's held-out rows, `pick_TASK_ROWS` are scored: those that its router learns from.
    """
    sets = trial_skills.SKILLS.items()
    train = {name: _of_set(of, "train", TRAIN, seed, fit) for name, of in sets}
    scored = {}
    for task in trial_skills.TASKS:
        rows = _of_set(task, "train", TRAIN, seed, fit)
        scored[task] = _of_set(task, "dev", HELD, 0, fit)
        for count in trial_skills.ROWS:
            few = rows if count == "all" else rows[: int(count)]
            train[f"{task}_{count}"] = few
            scored[f"pick_{task}_{count}"] = few[:PICK]
    return train, scored


def families(seed: int, fit: RowFitter) -> tuple[Files, Files]:
    """Those of configs/trial_families.py; scored rows by family, and those of HELD_OUT."""
    languages = read_languages(str(trial_families.TABLE))
    family = {code: languages.experts[expert] for code, expert in languages.ids.items()}
    held_out = trial_families.HELD_OUT
    train = {name: _of_set(name, "train", TRAIN, seed, fit) for name in trial_families.SETS}
    for code, rows in _by_language("tico19", "train").items():
        if code != held_out:
            train[f"tico_{code}"] = _sentences(rows, TICO_TRAIN, seed, fit)
    scored: Files = defaultdict(list)
    for code, rows in _by_language("tico19", "dev").items():
        name = code if code == held_out else family[code]
        scored[name] += _sentences(rows, TICO_HELD, 0, fit)
    for name in trial_families.SETS:
        for code, rows in _by_language(name, "dev").items():
            scored[family[code]] += map(fit, draw(rows, OTHER_HELD, 0))
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
    data = trial.config.get_config().data
    tokenizer = load(medical.data_root() / "tiny_lm_stories260K" / "tok512.model")
    encoder = Encoder(tokenizer, load_template(data.template, tokenizer))
    train, scored = trial.rows(seed, RowFitter(encoder, data.length))

    def save(partial: Path) -> None:
        for part, files in (("train", train), ("scored", scored)):
            (partial / part).mkdir()
            for name, rows in files.items():
                text = "".join(json.dumps(row.conversation()) + "\n" for row in rows)
                (partial / part / f"{name}.jsonl").write_text(text, encoding="utf-8")

    with new_folder(folder) as put:
        put(save)


DEV_ONLY = ("medmcqa", "vihealth")  # of these the data folder holds official dev rows alone


def rows_of(name: str, split: str) -> list[Row]:
    """The rows of a set's split; of DEV_ONLY, those of dev, a fifth of which is held out here."""
    if name not in DEV_ONLY:
        return list(medical.rows(name, split))
    rows = medical.rows(name, "dev")
    return [r for r in rows if held_out(r.prompt[slice(*r.body)]) == (split == "dev")]


def _of_set(name: str, split: str, count: int, seed: int, fit: RowFitter) -> list[Row]:
    """A draw of a set, with what is too long for a row of a batch shortened in its body."""
    return [fit(row) for row in draw(rows_of(name, split), count, seed)]


def _by_language(name: str, split: str) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = defaultdict(list)
    for row in rows_of(name, split):
        out[row.language].append(row)
    return out


def _sentences(rows: Sequence[Row], count: int, seed: int, fit: RowFitter) -> list[Row]:
    """A draw of those whose prompt leaves half of a row to the answer, which may be cut there."""
    out: list[Row] = []
    for row in draw(rows, len(rows), seed):
        prompt = fit.encoder.prompt([{"role": "user", "content": row.prompt}])
        if len(out) < count and 2 * len(prompt) <= fit.length:
            out.append(row)
    return out
