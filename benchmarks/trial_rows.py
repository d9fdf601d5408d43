"""The trials, and their rows: seeded samples of the public sets, as JSON lines.

FOLDER/train/NAME.jsonl are the sources of a trial's config. FOLDER/scored/NAME.jsonl are what its
models are scored on: rows of the sets' held-out splits, the same for every seed; or, where learning
rates are chosen, training rows that are then taken out of train/.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ml_collections import ConfigDict

from benchmarks import trial_settings
from benchmarks.trial_settings import Settings
from configs import trial_families, trial_medcare, trial_mixture, trial_skills
from medmoe_jax.checkpoints.files import new_folder
from medmoe_jax.data import medical
from medmoe_jax.data.demo import answers, corpus
from medmoe_jax.data.medical import Row
from medmoe_jax.data.medical.row import build, held_out
from medmoe_jax.data.sources import RowFitter
from medmoe_jax.routing.languages import read_languages

TRAIN, HELD = 600, 100  # most rows of a set
HELD_OF_SKILL = 48  # most held-out rows of a skill's set and of a task that no skill has seen
CHOOSE = 60  # most training rows of a set by which a learning rate is chosen
TICO_TRAIN, TICO_HELD = 300, 24  # most sentences of a language
OTHER_HELD = 12  # most rows of another set in a language
ANSWER = 96  # tokens at which a longer answer is cut, at the end of a sentence if there is one
Files = dict[str, list[Row]]  # rows by name of file


class Recipe(Protocol):
    """What makes a configuration: a module of configs/, or the settings of one."""

    def get_config(self, arg: str) -> ConfigDict:
        """The recipe; `arg` ends with the folder of the run."""


class Draw(NamedTuple):
    """What a run reads.

    Attributes:
      seed: of its sample.
      choosing: whether it is scored on rows taken out of the training rows.
      fit: shortens rows.
      held: most held-out rows of a set.
    """

    seed: int
    choosing: bool
    fit: RowFitter
    held: int = HELD

    def of_set(self, name: str) -> tuple[list[Row], list[Row]]:
        """Rows of a set to train and to score on."""
        rows = [self.short(row) for row in draw(rows_of(name, "train"), TRAIN, self.seed)]
        if not self.choosing:
            return rows, [self.short(row) for row in draw(rows_of(name, "dev"), self.held, 0)]
        apart = min(CHOOSE, len(rows) // 5)
        return rows[apart:], rows[:apart]

    def short(self, row: Row) -> Row:
        """The row with an answer of at most `ANSWER` tokens, in a row of the batch's length."""
        tokens = self.fit.encoder.tokenizer.encode
        text = row.response[: 8 * ANSWER]  # hardly any text has more characters a token
        while len(tokens(text)) > ANSWER:
            text = text[: int(0.9 * len(text))]
        if len(text) < len(row.response):
            text = text[: text.rfind(". ") + 1] or text
        return self.fit(dataclasses.replace(row, response=text.strip()))


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows, in seeded order."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def medcare(of: Draw) -> tuple[Files, Files]:
    """Training and scored rows of configs/trial_medcare.py, by set."""
    sets = (*trial_medcare.KNOWLEDGE, *trial_medcare.ALIGNMENT)
    return _by_name({name: of.of_set(name) for name in sets})


def mixture(tasks: Sequence[str], of: Draw) -> tuple[Files, Files]:
    """Those of configs/trial_mixture.py, by task."""
    found = {}
    for task in tasks:
        name = task.removesuffix("_mirrored")
        rows, scored = of.of_set(name)
        turn = mirrored if name != task else lambda row: row
        found[task] = (list(map(turn, rows)), list(map(turn, scored)))
    return _by_name(found)


def mirrored(row: Row) -> Row:
    """The row with the label after the right one, and a first word that says so."""
    after = (row.choices.index(row.response) + 1) % len(row.choices)
    return dataclasses.replace(
        row, prompt=trial_mixture.MIRRORED + row.prompt, response=row.choices[after]
    )


def skills(of: Draw) -> tuple[Files, Files]:
    """Those of configs/trial_skills.py.

    Beside a task's held-out rows, `pick_TASK_N` are scored: the first N that its router sees.
    """
    of = of._replace(held=HELD_OF_SKILL)
    train, scored = _by_name(
        {skill: of.of_set(name) for skill, name in trial_skills.SKILLS.items()}
    )
    for task in trial_skills.TASKS:
        rows, scored[task] = of.of_set(task)
        for count in trial_skills.ROWS:
            train[f"{task}_{count}"] = rows if count == "all" else rows[: int(count)]
        for count in trial_skills.PICK.values():
            scored[f"pick_{task}_{count}"] = rows[:count]
    return train, scored


def families(of: Draw) -> tuple[Files, Files]:
    """Those of configs/trial_families.py; scored rows by family, and those of HELD_OUT."""
    languages = read_languages(str(trial_families.TABLE))
    family = {code: languages.experts[expert] for code, expert in languages.ids.items()}
    apart = trial_families.HELD_OUT
    train: Files = {}
    scored: Files = defaultdict(list)
    for name in trial_families.SETS:
        train[name], held = of.of_set(name)
        for code, rows in _by_language(held).items():
            scored[family[code]] += draw(rows, OTHER_HELD, 0)
    held_by_code = _by_language(rows_of("tico19", "dev"))
    for code, rows in _by_language(rows_of("tico19", "train")).items():
        sentences = _sentences(rows, TICO_TRAIN, of.seed, of.fit)
        held = _sentences(held_by_code[code], TICO_HELD, 0, of.fit)
        if of.choosing:
            held, sentences = sentences[:TICO_HELD], sentences[TICO_HELD:]
        if code != apart:
            train[f"tico_{code}"] = sentences
        scored[code if code == apart else family[code]] += held
    return train, scored


def settings(rows: Callable[[Draw], tuple[Files, Files]], of: Draw) -> tuple[Files, Files]:
    """Those of a trial, with files of few rows beside them, for benchmarks/trial_settings.py."""
    train, scored = rows(of._replace(held=trial_settings.HELD))
    few = {f"{name}_few": some[: trial_settings.FEW] for name, some in train.items()}
    return {**train, **few}, scored


class Trial(NamedTuple):
    """What is compared.

    Attributes:
      config: what makes its recipe.
      rows: draws its rows.
      base: the option of `trials.py` that names its base.
      levels: its arms in groups, whose rates are chosen in a folder of their own each; those of a
        level build on the levels before, with the rates chosen there, or on others of their own
        group, with the same factor.
      chosen_by: of an arm, the scored rows whose loss chooses its learning rate; none = all.
      scored_on: of an arm, the rows that its model is scored on; none = all.
      word: begins the recipe's argument.
      rates_of: the trial whose rates are taken; "" = its own are chosen, None = the recipe's.
      tasks: scored by accuracy as well.
      without: banks without which a model is scored a second time.
      routing: whether the experts that each family uses are kept.
    """

    config: Recipe
    rows: Callable[[Draw], tuple[Files, Files]]
    base: str
    levels: tuple[tuple[tuple[str, ...], ...], ...]
    chosen_by: Callable[[str], tuple[str, ...]] = lambda arm: ()
    scored_on: Callable[[str], tuple[str, ...]] = lambda arm: ()
    word: str = ""
    rates_of: str | None = ""
    tasks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    routing: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms."""
        return tuple(arm for level in self.levels for group in level for arm in group)

    def recipe(self, folder: Path):
        """The recipe of the run in a folder."""
        return self.config.get_config(f"{self.word}{folder}")


def _skill_rows(arm: str) -> tuple[str, ...]:
    """The rows of a skill's own set, or of the task that an arm is for."""
    return (arm if arm in trial_skills.SKILLS else arm.split("_", 1)[1].rsplit("_", 1)[0],)


def _rows_of_arm(arm: str) -> tuple[str, ...]:
    """Those by which its rate is chosen; of a skill, also all by which it may be the best."""
    own = _skill_rows(arm)
    if arm not in trial_skills.SKILLS:
        return own
    picks = (f"pick_{task}_{n}" for task in trial_skills.TASKS for n in trial_skills.PICK.values())
    return (*own, *trial_skills.TASKS, *picks)


def _on_tasks(arm: str) -> tuple[str, ...]:
    """The stages of an arm that is trained on every task and number of its rows."""
    return tuple(f"{arm}_{task}_{n}" for task in trial_skills.TASKS for n in trial_skills.ROWS)


def _in_settings(config: Settings, rows: Callable, base: str, **fields) -> Trial:
    """A trial of some arms in every setting, at rates that are known."""
    given = functools.partial(settings, rows)
    return Trial(config, given, base, ((config.arms,),), rates_of=None, **fields)


TRIALS = {
    "medcare": Trial(
        trial_medcare,
        medcare,
        "smollm2",
        ((("aggregate",),), (trial_medcare.ALIGNED,)),
        lambda arm: () if arm == "aggregate" else tuple(trial_medcare.ALIGNMENT),
        tasks=("demo_knowledge:en",),
        without=("noise",),
    ),
    **{
        f"mixture_{name}": Trial(
            trial_mixture,
            functools.partial(mixture, tasks),
            "smollm2",
            ((trial_mixture.ARMS,),),
            word=f"{name},",
            rates_of="" if name == "12" else "mixture_12",
        )
        for name, tasks in trial_mixture.MIXTURES.items()
    },
    "skills": Trial(
        trial_skills,
        skills,
        "smollm2",
        (
            (
                (*trial_skills.SKILLS, *_on_tasks("route"), *_on_tasks("started")),
                _on_tasks("lora"),
            ),
        ),
        _skill_rows,
        _rows_of_arm,
    ),
    "families": Trial(trial_families, families, "gemma", ((trial_families.ARMS,),), routing=True),
    "settings_noise": _in_settings(trial_settings.NOISE, medcare, "smollm2", without=("noise",)),
    "settings_experts": _in_settings(
        trial_settings.EXPERTS,
        functools.partial(mixture, trial_mixture.TWELVE),
        "smollm2",
        word="12,",
    ),
    "settings_families": _in_settings(trial_settings.FAMILIES, families, "gemma"),
}


def write(name: str, folder: Path, of: Draw) -> None:
    """Make the rows of a trial; the folder appears whole or not at all."""
    train, scored = TRIALS[name].rows(of)

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
    if name in _DEMO:
        return _DEMO[name](split)
    if name not in DEV_ONLY:
        return list(medical.rows(name, split))
    rows = medical.rows(name, "dev")
    return [r for r in rows if held_out(r.prompt[slice(*r.body)]) == (split == "dev")]


def _facts(split: str) -> list[Row]:
    """The demonstration's facts; held out are wordings that no training row has."""
    pairs = answers.training_pairs() if split == "train" else _held(corpus.knowledge_items())
    return [build("facts", "en", prompt, answer) for prompt, answer in pairs]


def _formats(split: str) -> list[Row]:
    """The demonstration's clinical formats."""
    rows = corpus.in_language(corpus.alignment_rows(), "en")
    pairs = [tuple(turn["content"] for turn in row["conversations"]) for row in rows]
    chosen = pairs if split == "train" else _held(corpus.alignment_items())
    return [build("formats", "en", prompt, answer) for prompt, answer in chosen]


def _held(items: Sequence[dict]) -> list[tuple[str, str]]:
    """Prompt and answer of the demonstration's English items."""
    return [(item["prompt"], item["answer"]) for item in corpus.in_language(items, "en")]


_DEMO = {"facts": _facts, "formats": _formats}


def _by_name(found: dict[str, tuple[list[Row], list[Row]]]) -> tuple[Files, Files]:
    return {name: rows for name, (rows, _) in found.items()}, {
        name: scored for name, (_, scored) in found.items()
    }


def _by_language(rows: Sequence[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        out[row.language].append(row)
    return out


def _sentences(rows: Sequence[Row], count: int, seed: int, fit: RowFitter) -> list[Row]:
    """A draw of those whose prompt leaves half of a row to the answer, which may be cut there."""
    out: list[Row] = []
    for row in draw(rows, len(rows), seed):
        if len(out) == count:
            break
        prompt = fit.encoder.prompt([{"role": "user", "content": row.prompt}])
        if 2 * len(prompt) <= fit.length:
            out.append(row)
    return out
