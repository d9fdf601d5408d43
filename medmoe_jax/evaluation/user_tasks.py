"""A user's own task: a file of JSON Lines.

    {"prompt": "…", "answer": "…"}
    {"prompt": "…", "answer": "yes", "choices": ["yes", "no"]}
    {"messages": [{"role": "user", "content": "…"}, …], "answer": "…", "metric": "rouge_l"}
    {"prompt": "…", "answer": "AC", "choices": ["A", "B", "C"], "metric": "letters_exact"}
    {"messages": […], "rubrics": [{"criterion": "…", "points": 5, "tags": ["…"]}, …]}

The last is for a judge (`judging`); the files of HealthBench, which call the messages a prompt and
tell more of each, are read as they are. All lines have choices or none, and one metric or none.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax import json_text
from medmoe_jax.data.conversation import check_text
from medmoe_jax.data.medical.files import read_bytes
from medmoe_jax.errors import UserError, within
from medmoe_jax.evaluation import metrics
from medmoe_jax.evaluation.items import Criterion, Item, Prompt
from medmoe_jax.kinds import Number, fits, shown

_FIELDS = ("prompt", "messages", "answer", "choices", "texts", "language", "metric", "part")
# With these an item needs no answer; the others stand in HealthBench's files.
_RUBRICS = "rubrics"
_WITH_RUBRICS = (_RUBRICS, "prompt_id", "example_tags", "ideal_completions_data", "canary")
_THEME = "theme:"
_ROLES = ("system", "user", "assistant")


class UserTask(NamedTuple):
    """The items of a file, and how they are scored."""

    items: list[Item]
    kind: str
    metric: str
    also: tuple[str, ...]


def read(path: Path) -> UserTask:
    """The task of a file. Raises UserError naming file and line, FileNotFoundError without one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    items, named = [], set()
    for where, record in json_text.lines(read_bytes(path), path):
        item, metric = _item(record, where)
        items.append(item)
        named.add(metric)
    if not items:
        raise UserError(f"{path}: no items; write one JSON object a line")
    if len({bool(item.choices) for item in items}) > 1:
        raise UserError(f"{path}: some items have choices and some have none; use two files")
    if len(named) > 1:
        raise UserError(f"{path}: its items name several metrics; use a file for each")
    asked = named.pop()
    if asked and metrics.find(asked).ordered and len({item.choices for item in items}) > 1:
        raise UserError(
            f"{path}: metric {asked!r} needs the same choices in the same order in all items"
        )
    choice = bool(items[0].choices)
    standard = "accuracy" if choice else "exact_match"
    also = () if choice or asked else ("rouge_l",)
    return UserTask(items, "choice" if choice else "generate", asked or standard, also)


def _item(record: Any, where: str) -> tuple[Item, str]:
    if not isinstance(record, dict):
        raise UserError(f'{where}: write an object such as {{"prompt": "…", "answer": "…"}}')
    check_text(record, where)
    known = (*_FIELDS, *(_WITH_RUBRICS if _RUBRICS in record else ()))
    for field in record:
        if field not in known:
            raise UserError(f"{where}: field {field!r} is none of {', '.join(known)}")
    if _RUBRICS in record:
        return _judged(record, where)
    prompt = _prompt(record, where)
    if not isinstance(record.get("answer"), str) or not record["answer"]:
        raise UserError(f"{where}: field 'answer' must be a text")
    choices = record.get("choices") or []
    texts = record.get("texts") or []
    for field, value in (("choices", choices), ("texts", texts)):
        if not isinstance(value, list) or not all(isinstance(c, str) and c for c in value):
            raise UserError(f"{where}: field {field!r} must be a list of texts")
    # Those that differ in spaces alone are one answer to the metrics as well.
    if twice := [one for one, count in Counter(map(_plain, choices)).items() if count > 1]:
        raise UserError(f"{where}: field 'choices' has {twice[0]!r} more than once")
    metric = _metric(record, where)
    listed = bool(metric and metric.listed)
    if listed and not all(len(choice) == 1 and "A" <= choice <= "Z" for choice in choices):
        raise UserError(
            f"{where}: the choices of metric {metric.name!r} are one capital letter each"
        )
    if choices and not listed and record["answer"] not in choices:
        raise UserError(f"{where}: the answer {record['answer']!r} is not among the choices")
    if texts and len(texts) != len(choices):
        raise UserError(f"{where}: {len(texts)} texts for {len(choices)} choices")
    item = Item(
        prompt,
        record["answer"],
        () if listed else tuple(choices),
        tuple(texts),
        _word(record, "language", where) or "und",
        _word(record, "part", where),
        allowed=tuple(choices) if listed else (),
    )
    if metric:
        _check_answer(metric, item, where)
    return item, metric.name if metric else ""


def _word(record: dict, field: str, where: str) -> str:
    """A text or number by which items are told apart, as a text; '' where there is none."""
    value = record.get(field)
    if value is None:
        return ""
    if not fits(value, str | Number):
        raise UserError(f"{where}: field {field!r} must be a text")
    return str(value)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _judged(record: dict, where: str) -> tuple[Item, str]:
    """An item that a judge grades by its rubric."""
    if record.get("choices") or record.get("metric"):
        raise UserError(f"{where}: an item with rubrics has no choices and no metric")
    if isinstance(record.get("prompt"), list):
        record = {**record, "messages": record["prompt"]}
        del record["prompt"]
    answer = record.get("answer", "")
    if not isinstance(answer, str):
        raise UserError(f"{where}: field 'answer' must be a text")
    tags = record.get("example_tags") or []
    themes = [tag.removeprefix(_THEME) for tag in tags if str(tag).startswith(_THEME)]
    item = Item(
        _prompt(record, where),
        answer,
        language=_word(record, "language", where) or "und",
        part=_word(record, "part", where) or next(iter(themes), ""),
        rubric=_rubric(record[_RUBRICS], where),
    )
    return item, "answered"


def _rubric(value: Any, where: str) -> tuple[Criterion, ...]:
    rubric = []
    for one in value if isinstance(value, list) else ():
        told = one if isinstance(one, dict) else {}
        text, points, tags = told.get("criterion"), told.get("points"), told.get("tags") or ()
        number = isinstance(points, int | float) and not isinstance(points, bool)
        if not (isinstance(text, str) and text and number and math.isfinite(points)):
            raise UserError(f"{where}: of a rubric, each needs a text 'criterion' and 'points'")
        rubric.append(Criterion(text, points, tuple(map(str, tags))))
    if not any(one.points > 0 for one in rubric):
        raise UserError(f"{where}: field 'rubrics' must be a list with points to be had")
    return tuple(rubric)


def _metric(record: dict, where: str) -> metrics.Metric | None:
    name = str(record.get("metric") or "")
    if not name:
        return None
    with within(f"{where}: "):
        metric = metrics.find(name)
    if (metric.ranked or metric.ordered) and not record.get("choices"):
        raise UserError(f"{where}: metric {name!r} needs choices")
    if metric.placed:
        raise UserError(f"{where}: metric {name!r} needs places in a text, which no item here has")
    return metric


def _check_answer(metric: metrics.Metric, item: Item, where: str) -> None:
    """Raise UserError where a metric cannot read all of an item's answer."""
    if not (metric.readable(item.answer, item) and metric.complete(item)):
        raise UserError(
            f"{where}: metric {metric.name!r} cannot read the answer {shown(item.answer)}; "
            "docs/tasks.md has its form"
        )


def _prompt(record: dict, where: str) -> Prompt:
    """The prompt, or the turns of `messages`."""
    if "messages" not in record:
        if not isinstance(record.get("prompt"), str) or not record["prompt"]:
            raise UserError(f"{where}: field 'prompt' must be a text")
        return record["prompt"]
    turns = record["messages"]
    if "prompt" in record or not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: write 'prompt' or a list of 'messages', one of them")
    for turn in turns:
        told = isinstance(turn, dict) and isinstance(turn.get("content"), str)
        if not told or turn.get("role") not in _ROLES:
            raise UserError(
                f"{where}: a message must have a text 'content' and a role of {', '.join(_ROLES)}"
            )
    if turns[-1]["role"] != "user":
        raise UserError(f"{where}: the last message must be the user's")
    return tuple((turn["role"], turn["content"]) for turn in turns)
