"""One record an item: what was asked, what was said, and whether it was right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax import json_text
from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics
from medmoe_jax.evaluation.items import Criterion, Item, as_turns
from medmoe_jax.evaluation.tasks import Task
from medmoe_jax.evaluation.ways import Response, Way, asked
from medmoe_jax.kinds import Number, check_fields
from medmoe_jax.storage.places import place

_KINDS: dict[str, Any] = {
    **dict.fromkeys(("task", "split", "language", "part", "id", "metric"), str),
    **dict.fromkeys(("prediction", "answer", "source"), str),
    **dict.fromkeys(("choices", "texts", "allowed", "ranking"), list[str]),
    "prompt": str | list[dict[str, str]],
    "spans": list[list[Any]],
    "right": Number | bool,
}
_NEEDED = ("task", "id", "metric", "prediction", "answer", "right")


def records(task: Task, given: Sequence[Response], rows_N: np.ndarray, way: Way) -> Iterator[dict]:
    """The records of a task that was asked in a way.

    `right` is the item's own score where the metric has one, else whether the answer is the same.
    """
    for n, (item, answer) in enumerate(zip(task.items, given, strict=True)):
        own = metrics.one(rows_N, n)
        yield {
            "task": task.name,
            "split": task.split,
            "language": item.language,
            "part": item.part,
            "id": identity(item),
            "metric": task.metric,
            "prompt": as_turns(asked(task, item, way)),
            "choices": list(item.choices),
            "texts": list(item.texts),
            "allowed": list(item.allowed),
            "source": item.source if item.spans else "",
            "spans": [list(span) for span in item.spans],
            "rubric": [one._asdict() for one in item.rubric],
            "scores": list(answer.scores),
            "ranking": list(answer.ranking),
            "raw": list(answer.raw),
            "prediction": answer.text,
            "answer": item.answer,
            "right": metrics.same(answer.text, item.answer) if own is None else own,
            "parsed": answer.parsed,
            "cut": answer.cut,
        }


def identity(item: Item) -> str:
    """A hash of what an item asks: the same whatever guide and examples stand before its text."""
    whole = item.prompt if isinstance(item.prompt, str) else item.prompt[-1][1]
    after = whole.rpartition(item.source)[2] if item.source else as_turns(item.own or item.prompt)
    asked = json.dumps([item.source, after, item.answer, item.texts], ensure_ascii=False)
    return hashlib.sha256(asked.encode()).hexdigest()[:24]


def item_of(record: dict) -> Item:
    """The item of a record, as far as metrics look at it."""
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        prompt = tuple((turn["role"], turn["content"]) for turn in prompt)
    return Item(
        prompt,
        record["answer"],
        tuple(record.get("choices", ())),
        tuple(record.get("texts", ())),
        record.get("language", ""),
        record.get("part", ""),
        tuple(record.get("allowed", ())),
        record.get("source", ""),
        tuple(tuple(span) for span in record.get("spans", ())),
        tuple(
            Criterion(one["criterion"], one["points"], tuple(one["tags"]))
            for one in record.get("rubric", ())
        ),
    )


def write(path: str | Path, lines: Iterable[dict]) -> None:
    """Writes records as JSON Lines; the file is whole or absent at any time."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines)
    write_text(path, text)


def read(path: str | Path) -> list[dict]:
    """The records of a file. Raises UserError where it is not one, naming the line."""
    path = place(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; medmoe eval writes it beside report.json")
    out = []
    for where, record in json_text.lines(path.read_bytes(), path):
        lacking = [f for f in _NEEDED if not isinstance(record, dict) or f not in record]
        if lacking:
            raise UserError(f"{where}: not a record of medmoe eval: no {lacking[0]!r}")
        check_fields(record, _KINDS, f"{where}: not a record of medmoe eval")
        out.append(record)
    if not out:
        raise UserError(f"{path}: there is no record in it")
    return out
