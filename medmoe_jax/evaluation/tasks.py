"""Tasks: items to answer, how they are scored, and what chance and the commonest answer score."""

from __future__ import annotations

import difflib
import logging
import os
import random
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medmoe_jax.data import medical
from medmoe_jax.data.demo import corpus
from medmoe_jax.data.medical import MedicalSet, Row
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics, shots, user_tasks
from medmoe_jax.evaluation.items import Item, Prompt
from medmoe_jax.evaluation.report import titled
from medmoe_jax.evaluation.shots import Fitter, Shots
from medmoe_jax.storage.fetched import fetched

LOG = logging.getLogger(__name__)
_SUITES = Path(__file__).with_name("tables") / "suites.toml"
SUITE = "suite:"  # before a suite among names of tasks
_MOST_BYTES = 256 * 2**20  # of training files that are read for the commonest answer alone
_GUESSED = ("accuracy", "weighted_f1", "macro_f1", "letters_exact")


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    kind: 'choice' (the model's choice) or 'generate' (its text).
    metric, also: the main metric and further ones, by name.
    majority: score of always giving the commonest training answer; None where it means nothing.
    chance: expected score of choosing blindly; None where there is nothing to choose.
    split, duplicates: of the set's rows; how many prompts an earlier item has too.
    missing: files of the split that were not there.
    shortened: items whose text was cut to fit the model's context.
    shots: examples before each item. until: what ends a written answer, besides its own end.
    """

    name: str
    language: str
    kind: str
    metric: str
    items: tuple[Item, ...]
    majority: float | None = None
    group: str = "knowledge"
    max_tokens: int = 16
    also: tuple[str, ...] = ()
    split: str = ""
    duplicates: int = 0
    missing: tuple[str, ...] = ()
    shortened: int = 0
    shots: int = 0
    until: tuple[str, ...] = ()
    chance: float | None = field(init=False)

    def __post_init__(self) -> None:
        guessed = self.kind == "choice" and self.metric == "accuracy" and self.items
        shares = [1 / len(item.choices) for item in self.items] if guessed else []
        chance = sum(shares) / len(shares) if shares else None
        object.__setattr__(self, "chance", chance)

    @property
    def title(self) -> str:
        """The name with the split, by which reports and records tell tasks apart."""
        return titled(self.name, self.split)


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task before its data are read."""

    name: str
    languages: tuple[str, ...]
    kind: str
    group: str
    metric: str
    splits: tuple[str, ...]
    split_rule: str
    title: str = ""


# Held-out items of the demonstration's corpus: name -> (group, kind, metric, items).
_DEMO = {
    "demo_knowledge": ("knowledge", "choice", "accuracy", corpus.knowledge_items),
    "demo_alignment": ("alignment", "generate", "exact_match", corpus.alignment_items),
}


def list_tasks() -> list[TaskInfo]:
    """All tasks by name; a set in several languages is also had as `name:language`."""
    demo = [
        TaskInfo(
            name,
            ("en", "zh"),
            kind,
            group,
            metric,
            ("dev",),
            "paraphrases and inputs held out",
            "held-out items of the demonstration",
        )
        for name, (group, kind, metric, _) in _DEMO.items()
    ]
    return demo + [
        TaskInfo(
            s.name,
            s.languages,
            s.kind,
            s.group,
            s.metric,
            tuple(part for part in s.splits if part != "train"),
            s.split_rule,
            s.title,
        )
        for s in medical.SETS.values()
    ]


def suites() -> dict[str, dict]:
    """Suite -> `about` and `tasks`."""
    return tomllib.loads(_SUITES.read_text(encoding="utf-8"))


def expand(names: Sequence[str]) -> list[str]:
    """Task names with suites (`suite:cblue`) and files of cards in their places, each name once.

    Raises UserError for a name that there is not, with the closest one.
    """
    known = suites()
    out: list[str] = []
    for name in names:
        if name.startswith(SUITE):
            suite = name.removeprefix(SUITE)
            if suite not in known:
                near = difflib.get_close_matches(suite, known, n=1, cutoff=0.3)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(f"there is no suite {suite!r}; {hint}known are {', '.join(known)}")
            out += known[suite]["tasks"]
        elif name.endswith(".toml"):
            out += medical.add_cards(name)
        else:
            out.append(name)
    out = list(dict.fromkeys(out))
    for name in out:
        _check_name(name)
    return out


def check_titles(tasks: Mapping[str, Task]) -> None:
    """Raise UserError where two tasks, given by the names that were asked for, have one title."""
    asked: dict[str, str] = {}
    for name, task in tasks.items():
        if task.title in asked:
            raise UserError(
                f"'{asked[task.title]}' and '{name}' would both be called '{task.title}'; rename a "
                "file of tasks, or leave one out"
            )
        asked[task.title] = name


def load_items(names: Sequence[str], split: str | None = None) -> dict[str, tuple[Item, ...]]:
    """All items of some tasks, by their titles. Raises what `load_task` and `check_titles` do."""
    tasks = {name: load_task(name, split=split) for name in names}
    check_titles(tasks)
    return {task.title: task.items for task in tasks.values()}


def _check_name(name: str) -> None:
    base, _, split = name.partition("@")
    if not name.endswith((".jsonl", ".jsonl.gz")) and base.partition(":")[0] not in _DEMO:
        try:
            entry, _ = medical.find(base)
        except UserError:
            if Path(name).is_file():
                raise UserError(
                    f"{name}: a file with a task ends in .jsonl, .jsonl.gz or .toml"
                ) from None
            raise
        if split and split not in entry.splits:
            raise UserError(f"{base} has no split {split!r}; it has {', '.join(entry.splits)}")


def load_task(
    name: str | os.PathLike,
    limit: int | None = None,
    seed: int = 0,
    *,
    split: str | None = None,
    few: Shots = Shots(),
    root: str | os.PathLike | None = None,
    guided: bool = False,
    fit: Fitter | None = None,
) -> Task:
    """A task by its set's name (`cmedtc`, `tico19:fr`, `mmlu@test`), or of a user's JSON Lines.

    limit: at most so many items, a seeded sample in the set's order.
    split: of the rows, unless the name has one; by default dev, or test where no dev is there.
    few: examples before each item.
    guided: prompts begin with what a model that has not been trained on the set must be told.
    fit: shortens what does not fit the model's context.
    Raises UserError for an unknown name, a bad file or no items; FileNotFoundError without data.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give a number of items of at least 1")
    if str(name).endswith((".jsonl", ".jsonl.gz")):
        if split:
            raise UserError(f"{name} has no splits, of which {split!r} was asked for")
        return _of_user(fetched(name), limit, seed, few)
    base, _, asked = str(name).partition("@")
    split = asked or split
    if base.partition(":")[0] in _DEMO:
        if split not in (None, "dev"):
            raise UserError(f"{base} has no split {split!r}; it has dev")
        return _demo_task(base, limit, seed, few)
    entry, _ = medical.find(base)
    for metric in (entry.metric, *entry.also):
        metrics.find(metric)
    split = split or medical.default_split(entry, root)
    found = medical.read_split(base, split, root)
    _check_metrics(entry, found.rows)
    guessed = entry.metric in _GUESSED
    train = _train(base, entry, root, few.count > 0) if few.count or guessed else []
    rows, pool = found.rows, [] if split == "train" else train
    if few.count and not pool:
        rows, pool = shots.part(base, rows, few.count, seed)
        if "train" in entry.splits and split != "train":
            LOG.warning(
                "%s: no training rows are there, so its %d examples are rows of %s, and those are "
                "not asked",
                *(base, len(pool), split),
            )
    examples = shots.draw(base, pool, few.count, seed)
    sample = _sample(rows, limit, seed)
    before = fit.shortened if fit else 0
    items = tuple(_item(row, examples, few, entry.max_tokens, guided, fit) for row in sample)
    return Task(
        name=base,
        language=_language(items),
        kind=entry.kind,
        metric=entry.metric,
        items=items,
        majority=_majority(entry.metric, items, [row.response for row in train]),
        group=entry.group,
        max_tokens=entry.max_tokens,
        also=entry.also,
        split=split,
        duplicates=found.duplicates,
        missing=tuple(found.missing),
        shortened=fit.shortened - before if fit else 0,
        shots=len(examples),
        until=shots.until(base, few, examples, [row.response for row in (*examples, *sample)]),
    )


def _check_metrics(entry: MedicalSet, rows: Sequence[Row]) -> None:
    """Raise UserError where a metric looks at places in the text or choices, and there are none."""
    none = entry.read.get("none", "none")
    for name in (entry.metric, *entry.also):
        if metrics.find(name).ordered and not all(row.choices for row in rows):
            raise UserError(f"{entry.name}: metric {name!r} needs choices, which its rows have not")
        if metrics.find(name).placed and any(r.response != none and not r.spans for r in rows):
            raise UserError(
                f"{entry.name}: metric {name!r} needs places in a text, which its entities have "
                "not; give its card the metric 'entity_f1'"
            )


def _train(base: str, entry: MedicalSet, root, needed: bool) -> list[Row]:
    """The training rows, as far as they are there.

    needed: also where the files are so large that the commonest answer is not worth reading them.
    """
    if "train" not in entry.splits:
        return []
    try:
        if not needed and medical.size(entry, "train", root) > _MOST_BYTES:
            return []
        return medical.read_split(base, "train", root).rows
    except FileNotFoundError:
        return []


def _item(row: Row, examples, few: Shots, max_tokens: int, guided: bool, fit) -> Item:
    """The item of a row, with examples before it, cut where it does not fit."""
    guide = row.guide if guided else ""

    def whole(prompt: str) -> Prompt:
        return shots.prompt(prompt, examples, few.form, guide)

    if fit:
        row = fit(row, whole, max_tokens)
    return Item(
        prompt=whole(row.prompt),
        answer=row.response,
        choices=row.choices,
        texts=row.texts,
        language=row.language,
        part=row.part,
        allowed=row.allowed,
        source=row.prompt[slice(*row.body)],
        spans=row.spans,
    )


def _demo_task(name: str, limit: int | None, seed: int, few: Shots) -> Task:
    part, _, language = name.partition(":")
    group, kind, metric, read = _DEMO[part]
    items = [
        Item(row["prompt"], row["answer"], tuple(row["choices"]), language=row.get("language", ""))
        for row in corpus.in_language(read(), language)
    ]
    return _of_items(
        name, items, kind, metric, limit, seed, few, group=group, split="dev", max_tokens=48
    )


def _of_user(path: Path, limit: int | None, seed: int, few: Shots) -> Task:
    read = user_tasks.read(path)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return _of_items(
        name, read.items, read.kind, read.metric, limit, seed, few, max_tokens=256, also=read.also
    )


def _of_items(
    name: str,
    items: Sequence[Item],
    kind: str,
    metric: str,
    limit: int | None,
    seed: int,
    few: Shots,
    **rest,
) -> Task:
    """A task of given items; examples are drawn from among them, which are then not asked."""
    asked, examples = items, []
    if few.count:
        asked, examples = shots.part(name, items, few.count, seed)
    chosen = tuple(_sample(list(asked), limit, seed))
    chosen = tuple(shots.before_item(item, examples, few.form) for item in chosen)
    prompts = [str(item.prompt) for item in items]
    return Task(
        name=name,
        language=_language(chosen),
        kind=kind,
        metric=metric,
        items=chosen,
        majority=_majority(metric, chosen, [item.answer for item in items]),
        duplicates=len(prompts) - len(set(prompts)),
        shots=len(examples),
        until=shots.until(name, few, examples, [item.answer for item in items]),
        **rest,
    )


def _language(items: Sequence[Item]) -> str:
    """The language of all items, or `mul`."""
    languages = {item.language for item in items}
    return languages.pop() if len(languages) == 1 else "mul"


def _majority(metric: str, items: Sequence[Item], training_answers: Sequence[str]) -> float | None:
    """Score on the items of the commonest training answer (of the items', without training)."""
    if metric not in _GUESSED:
        return None
    answers = [item.answer for item in items]
    commonest = Counter(training_answers or answers).most_common(1)[0][0]
    right = items if metrics.find(metric).whole else answers
    return metrics.compute(metric, [commonest] * len(answers), right)


def _sample(rows: list, limit: int | None, seed: int) -> list:
    if limit is None or limit >= len(rows):
        return rows
    kept = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(kept)]
