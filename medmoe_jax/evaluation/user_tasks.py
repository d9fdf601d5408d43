"""A user's own task: a file of JSON Lines.

    {"prompt": "…", "answer": "…"}
    {"prompt": "…", "answer": "yes", "choices": ["yes", "no"]}
    {"messages": [{"role": "user", "content": "…"}, …], "answer": "…", "metric": "rouge_l"}

All lines have choices or none, and one metric or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax import json_text
from medmoe_jax.data.conversation import check_text
from medmoe_jax.data.medical.files import read_bytes
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics
from medmoe_jax.evaluation.items import Item, Prompt

_FIELDS = ("prompt", "messages", "answer", "choices", "texts", "language", "metric", "part")
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
        raise FileNotFoundError(f"{path}: no such task file")
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
    choice = bool(items[0].choices)
    asked = named.pop()
    standard = "accuracy" if choice else "exact_match"
    also = () if choice or asked else ("rouge_l",)
    return UserTask(items, "choice" if choice else "generate", asked or standard, also)


def _item(record: Any, where: str) -> tuple[Item, str]:
    if not isinstance(record, dict):
        raise UserError(f'{where}: write an object such as {{"prompt": "…", "answer": "…"}}')
    check_text(record, where)
    for field in record:
        if field not in _FIELDS:
            raise UserError(f"{where}: field {field!r} is none of {', '.join(_FIELDS)}")
    prompt = _prompt(record, where)
    if not isinstance(record.get("answer"), str) or not record["answer"]:
        raise UserError(f"{where}: field 'answer' must be a text")
    choices = record.get("choices") or []
    texts = record.get("texts") or []
    for field, value in (("choices", choices), ("texts", texts)):
        if not isinstance(value, list) or not all(isinstance(c, str) and c for c in value):
            raise UserError(f"{where}: field {field!r} must be a list of texts")
    if choices and record["answer"] not in choices:
        raise UserError(f"{where}: the answer {record['answer']!r} is not among the choices")
    if texts and len(texts) != len(choices):
        raise UserError(f"{where}: {len(texts)} texts for {len(choices)} choices")
    item = Item(
        prompt,
        record["answer"],
        tuple(choices),
        tuple(texts),
        str(record.get("language", "und")),
        str(record.get("part", "")),
    )
    return item, _metric(record, where)


def _metric(record: dict, where: str) -> str:
    name = str(record.get("metric") or "")
    if name and metrics.find(name).ranked and not record.get("choices"):
        raise UserError(f"{where}: metric {name!r} needs choices")
    return name


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
