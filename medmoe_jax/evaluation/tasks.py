"""Tasks: items to answer, how they are scored, and the score of always giving one answer."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmoe_jax.data import medical
from medmoe_jax.data.conversation import check_text
from medmoe_jax.data.demo import corpus
from medmoe_jax.data.medical import Row
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics


@dataclass(frozen=True)
class Item:
    """A user turn and its right answer; `choices` is empty for free text."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    kind: 'choice' (the model's likeliest choice) or 'generate' (greedy text).
    metric, also: the main metric and further ones, by name.
    majority: score of always giving the commonest training answer; None for free text.
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


_LABELS = ("accuracy", ("macro_f1", "weighted_f1"), 16)
_CODES = ("accuracy", ("hit_at_3", "macro_f1"), 16)
_EXAM = ("accuracy", (), 16)
# Set -> main metric, further metrics, most tokens to generate.
_SCORING = {
    "cmedtc": _LABELS,
    "cmedic": _LABELS,
    "cmedqq": _LABELS,
    "rqe": _LABELS,
    "pubmedqa": _LABELS,
    "mts_section": _LABELS,
    "medquad_type": _LABELS,
    "rumed_top3": _CODES,
    "rumed_symptom": _CODES,
    "frenchmedmcqa": ("letters_exact", ("letters_hamming",), 16),
    "cmedqaner": ("entity_f1", (), 256),
    "rumed_ner": ("entity_f1", (), 256),
    "ncbi_disease": ("entity_f1", (), 128),
    "bc5cdr": ("entity_f1", (), 128),
    "bc5cdr_relations": ("relation_f1", (), 256),
    "mts_dialog": ("rouge_l", (), 256),
    "aci_bench": ("rouge_l", (), 1024),
    "meqsum": ("rouge_l", (), 64),
    "vihealth": ("rouge_l", (), 128),
    "medquad": ("rouge_l", (), 512),
    "tico19": ("chrf", (), 512),
}


# Held-out items of the demonstration's corpus: name -> (group, kind, metric, items).
_DEMO = {
    "demo_knowledge": ("knowledge", "choice", "accuracy", corpus.knowledge_items),
    "demo_alignment": ("alignment", "generate", "exact_match", corpus.alignment_items),
}


def list_tasks() -> list[TaskInfo]:
    """All tasks by name; a set in several languages is also had as `name:language`."""
    demo = [
        TaskInfo(
            name, ("en", "zh"), kind, group, metric, ("dev",), "paraphrases and inputs held out"
        )
        for name, (group, kind, metric, _) in _DEMO.items()
    ]
    return demo + [
        TaskInfo(
            s.name,
            s.languages,
            s.kind,
            s.group,
            _SCORING.get(s.name, _EXAM)[0],
            tuple(part for part in s.splits if part != "train"),
            s.split_rule,
        )
        for s in medical.SETS.values()
    ]


def load_task(
    name: str | os.PathLike,
    limit: int | None = None,
    seed: int = 0,
    *,
    split: str = "dev",
    shots: int = 0,
    root: str | os.PathLike | None = None,
    fit: Callable[[Row], Row] | None = None,
) -> Task:
    """A task by its set's name (`cmedtc`, `tico19:fr`), or of a user's JSON Lines file.

    limit: at most so many items, a seeded sample in the set's order.
    shots: so many seeded training examples stand before each prompt.
    fit: applied to each row first, say `partial(shorten, limit=400, measure=count_tokens)`.
    Raises UserError for an unknown name, a bad file or no items; FileNotFoundError without data.
    """
    if str(name).endswith(".jsonl"):
        return _user_task(Path(name), limit, seed)
    if name in _DEMO:
        return _demo_task(str(name), limit, seed)
    entry, language = medical.find(str(name))
    rows = list(medical.rows(str(name), split, root))
    train = list(medical.rows(str(name), "train", root)) if "train" in entry.splits else []
    if shots and len(train) < shots:
        raise UserError(f"{name}: {shots} shots asked for, {len(train)} training rows to take from")
    sample = _sample(rows, limit, seed)
    if fit:
        sample = [fit(row) for row in sample]
    examples = random.Random(f"{seed} shots").sample(train, shots)
    before = "".join(f"{row.prompt}\n{row.response}\n\n" for row in examples)
    items = tuple(Item(before + row.prompt, row.response, row.choices) for row in sample)
    metric, also, most = _SCORING.get(entry.name, _EXAM)
    return Task(
        name=str(name),
        language=language or (entry.languages[0] if len(entry.languages) == 1 else "mul"),
        kind=entry.kind,
        metric=metric,
        items=items,
        majority=_majority(metric, items, [row.response for row in train]),
        group=entry.group,
        max_tokens=most,
        also=also,
    )


def _demo_task(name: str, limit: int | None, seed: int) -> Task:
    group, kind, metric, read = _DEMO[name]
    rows = _sample(read(), limit, seed)
    items = tuple(Item(row["prompt"], row["answer"], tuple(row["choices"])) for row in rows)
    majority = _majority(metric, items, [])
    return Task(name, "mul", kind, metric, items, majority, group, max_tokens=48)


def _majority(metric: str, items: Sequence[Item], training_answers: Sequence[str]) -> float | None:
    """Score on the items of the commonest training answer (of the items', without training)."""
    if metric not in ("accuracy", "letters_exact"):
        return None
    answers = [item.answer for item in items]
    commonest = Counter(training_answers or answers).most_common(1)[0][0]
    return metrics.compute(metric, [commonest] * len(answers), answers)


def _sample(rows: list, limit: int | None, seed: int) -> list:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give a number of items of at least 1")
    if limit is None or limit >= len(rows):
        return rows
    kept = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(kept)]


def _user_task(path: Path, limit: int | None, seed: int) -> Task:
    """A task of lines `{"prompt": …, "answer": …, "choices": […]}`; all with choices or none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such task file")
    items, languages = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            item, language = _user_item(line, f"{path}:{number}")
            items.append(item)
            languages.add(language)
    if not items:
        raise UserError(f"{path}: no items; write one JSON object a line")
    if len({bool(item.choices) for item in items}) > 1:
        raise UserError(f"{path}: some items have choices and some have none; use two files")
    choice = bool(items[0].choices)
    chosen = tuple(_sample(items, limit, seed))
    metric = "accuracy" if choice else "exact_match"
    return Task(
        name=path.stem,
        language=languages.pop() if len(languages) == 1 else "mul",
        kind="choice" if choice else "generate",
        metric=metric,
        items=chosen,
        majority=_majority(metric, chosen, [item.answer for item in items]),
        max_tokens=256,
        also=() if choice else ("rouge_l",),
    )


def _user_item(line: str, where: str) -> tuple[Item, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: write an object such as {{"prompt": "…", "answer": "…"}}')
    check_text(record, where)
    for field in ("prompt", "answer"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise UserError(f"{where}: field {field!r} must be a text")
    choices = record.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: field 'choices' must be a list of texts")
    if choices and record["answer"] not in choices:
        raise UserError(f"{where}: the answer {record['answer']!r} is not among the choices")
    item = Item(record["prompt"], record["answer"], tuple(choices))
    return item, str(record.get("language", "und"))
