"""The types of a row: a conversation, its turns, and rows that know the place they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NotRequired, TypedDict

from medmoe_jax.data.on_demand import OnDemand
from medmoe_jax.errors import ParameterError, UserError

ROLES = ("system", "user", "assistant", "tool")


class Turn(TypedDict):
    """One turn of a conversation.

    Attributes:
      role: one of ROLES.
      content: its text; may be empty beside `tool_calls`.
      reasoning_content: what an assistant thinks before it says the content.
      tool_calls: `[{"type": "function", "function": {"name": str, "arguments": {...}}}, ...]`.
      name, tool_call_id: of a tool's turn.
      train_weight: 0 = the answer is context and no target; absent = 1.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    train_weight: NotRequired[int]


class Conversation(TypedDict):
    """A conversation row.

    Attributes:
      conversations: its turns; some templates have a place for a system's at the beginning alone.
      language: code of its language, "" = not named.
      tools: descriptions of the functions that the assistant may call, as JSON schemas.
    """

    conversations: list[Turn]
    language: str
    tools: NotRequired[list[dict[str, Any]]]


class Rows(OnDemand[Conversation]):
    """Conversation rows by number, each made when it is asked for.

    Attributes:
      place: `place(number)`, the file and line (or the like) of a row, for messages.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        place: Callable[[int], str] = "row {}".format,
        change: Callable[[int, Conversation], Conversation] = lambda number, row: row,
    ) -> None:
        """
        Args:
          rows: random access to rows.
          place: of a row by its number.
          change: applied to each row.
        """
        self._rows, self._change = rows, change
        self.place = place

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Conversation:
        """A row by its number."""
        return self._change(index, self._rows[index])

    def __repr__(self) -> str:
        return f"Rows({self._rows!r})"

    def placed(self) -> Iterator[tuple[str, Conversation]]:
        """Yields `(place, row)`."""
        return ((self.place(number), self[number]) for number in range(len(self)))

    def changed(self, change: Callable[[int, Conversation], Conversation]) -> Rows:
        """These rows with a further change to each."""
        return Rows(self, self.place, change)


def as_rows(rows: Sequence[Conversation]) -> Rows:
    """Rows that know their places; those of a plain sequence are their numbers."""
    return rows if isinstance(rows, Rows) else Rows(rows)


def said(row: Conversation) -> str:
    """The text of all turns but the system's, thoughts and calls of functions with them."""
    parts = []
    for turn in row["conversations"]:
        if turn["role"] != "system":
            calls = turn.get("tool_calls")
            parts += [turn.get("reasoning_content", ""), turn["content"]]
            parts += [json.dumps(calls, ensure_ascii=False, sort_keys=True)] if calls else []
    return "\n".join(parts)


def turns_of(prompt: str | Sequence[Turn]) -> list[Turn]:
    """The turns of a prompt, which may be the text of one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def check_asked(turns: Sequence[Turn], where: str) -> None:
    """Raise UserError, with `where`, for turns after which no answer is due."""
    if not turns:
        raise UserError(f"{where}: there is no turn")
    last = turns[-1]["role"]
    if last not in ("user", "tool"):
        raise UserError(
            f"{where}: the last one is of the role '{last}'; what is to be answered is of a user "
            "or a tool"
        )


def check_json(value: Any, where: str, field: str = "") -> None:
    """Raise UserError, with `where`, for what JSON in Unicode cannot hold, anywhere in a value.

    Tables have numbers, dates and bytes that JSON lacks, and Python reads and writes NaN as if JSON
    had it; cells may hold JSON text of which `check_text` saw only the code.

    Args:
      value: lists and objects of values.
      where: what messages begin with.
      field: the value's own place, such as `tools[0].name`.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_text(key, where)
            check_json(item, where, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_json(item, where, f"{field}[{number}]")
    elif isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{where}: {field} is {value}, which JSON does not have; leave it out, or write null"
        )
    elif not isinstance(value, int | float | None):
        raise UserError(
            f"{where}: {field} is of the type {type(value).__name__}, which JSON does not have; "
            "write it as text or as a plain number"
        )


def check_texts(name: str, values: Any) -> None:
    """Raise ParameterError, which names the parameter, for what is no collection of texts.

    One text alone is none: its characters would be taken for the texts.
    """
    if isinstance(values, str) or not isinstance(values, Collection):
        hint = f"; write [{values!r}]" if isinstance(values, str) else ""
        raise ParameterError(f"{name}: needs a list of texts, found {values!r}{hint}")
    for value in values:
        if not isinstance(value, str):
            raise ParameterError(f"{name}: needs a list of texts, found {value!r} in it")


def check_text(value: Any, where: str) -> None:
    """Raise UserError, with `where`, for text anywhere in a JSON value that is not Unicode.

    JSON can write half of a surrogate pair ("\\ud83d"), which no encoding of text can hold.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise UserError(
                f"{where}: holds '\\u{ord(half):x}', half of a surrogate pair, which is no "
                "character; write the whole character or remove it"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, where)
            check_text(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            check_text(item, where)
