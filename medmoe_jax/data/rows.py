"""Rows of training data in the forms that people have, as conversation rows.

A row is a JSON object (or a table's line) in one of these forms:

    {"conversations": [{"from": "human"|"gpt", "value": "..."}, ...]}       ShareGPT
    {"messages": [{"role": "user"|"assistant", "content": "..."}, ...]}     OpenAI
    {"prompt": "...", "response": "..."}, {"question": "...", "answer": "..."}
    {"instruction": "...", "input": "...", "output": "..."}                 Alpaca
    {"prompt": [turn, ...], "completion": [turn, ...]}                      TRL
    ["question", "answer", "question", "answer", ...]                       Apollo

Beside them may stand `system`, `tools` and `language`; beside a question and its answer `history`
(earlier ones) and `reasoning_content` (what the answer was thought from), too.
Every other key is an error that names it, unless it is to be ignored; then it is counted.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax.data.conversation import Conversation, Turn, check_json, check_text
from medmoe_jax.data.files import read_items
from medmoe_jax.data.turns import TURN_KEYS, decoded, kind, quoted, read_tools, read_turn, text
from medmoe_jax.errors import UserError

TALKS = ("conversations", "messages")
QUESTIONS = ("prompt", "instruction", "question")
ANSWERS = ("response", "output", "answer", "completion")
BESIDE = ("input", "history", "reasoning_content", "system", "tools", "language")
KEYS = (*TALKS, *QUESTIONS, *ANSWERS, *BESIDE)
_GREETINGS = "answers before the first question"  # counted beside the ignored keys


class SettingNames(NamedTuple):
    """What a person calls the settings of a `RowReader`, for messages.

    Attributes:
      ignore: the keys that are left out.
      column: stands before a key of `columns`.
    """

    ignore: str = "data.ignore"
    column: str = "columns."


class RowReader:
    """Turns rows of any known form into conversation rows.

    Attributes:
      columns: `{key of a known form: the rows' own name for it}`.
      ignored: how often each key was ignored, and what else was left out.
    """

    def __init__(
        self,
        language: str = "",
        columns: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (),
        named: SettingNames = SettingNames(),
        learned: bool = True,
    ) -> None:
        """
        Args:
          language: given to rows that name none.
          columns: `{key of a known form: the row's own name for it}`. Those of BESIDE may be
            absent from a row.
          ignore: keys that are left out, of rows and turns. A pattern (`*_id`) is for keys that
            would otherwise be errors.
          named: what messages call `ignore` and `columns`.
          learned: whether a model is to learn from the rows, so that an empty answer is an error.

        Raises:
          UserError: `columns` has a key that no form knows.
        """
        self._language, self.columns = language, dict(columns or {})
        self._ignore, self._told, self._learned = tuple(ignore), named, learned
        self.ignored: Counter[str] = Counter()
        # Of a column, by its key: the first row that lacks it, for a message; "" = some row has it.
        self._lacking: dict[str, str] = {}
        for key in self.columns:
            if key not in KEYS:
                raise UserError(
                    f"{named.column}{key}: no row has this key; use one of {', '.join(KEYS)}"
                )

    def again(self) -> RowReader:
        """A reader that does the same and has counted nothing."""
        return RowReader(self._language, self.columns, self._ignore, self._told, self._learned)

    @property
    def changes(self) -> bool:
        """Whether rows in our own form may become others."""
        return bool(self._language or self._ignore)

    def check_columns(self) -> None:
        """Raise UserError for a column that none of the rows so far has; some may lack it."""
        for lacking in filter(None, self._lacking.values()):
            raise UserError(
                f"{lacking}, nor in any other row that was read; correct its name, or leave it out"
            )

    def __call__(self, item: Any, where: str = "row") -> Conversation:
        """The conversation row of one decoded row. Raises UserError that starts with `where`."""
        if isinstance(item, list):
            turns = zip(itertools.cycle(("user", "assistant")), item, strict=False)
            item = {"messages": [{"role": role, "content": said} for role, said in turns]}
        if not isinstance(item, Mapping):
            raise UserError(
                f"{where}: expected a JSON object, or a list of questions and answers in turn; "
                f"found {kind(item)}"
            )
        check_text(item, where)
        row = self._known(self._named(item, where), KEYS, where)
        turns = self._turns(row, where)
        tools = read_tools(row.pop("tools", None), where)
        language = text(row.pop("language", ""), f"{where}: 'language'") or self._language
        if row:
            raise UserError(
                f"{where}: {quoted(row)} cannot stand beside the other keys of this row; remove "
                f"one, or name those that are not to be used in {self._told.ignore}"
            )
        self._check_learnable(turns, where)
        if self._learned:
            _check_said(turns, where)
        out: Conversation = {"conversations": turns, "language": language}
        out = out | {"tools": tools} if tools else out
        check_json(out, where)  # a column that is left out may hold anything
        return out

    def _named(self, item: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row with its own names of columns replaced."""
        row = {key: value for key, value in item.items() if value is not None}
        for key, own in self.columns.items():
            named = f"{own!r} ({self._told.column}{key})"
            if own not in item and key not in BESIDE:
                raise UserError(f"{where}: there is no column {named}; found {quoted(item)}")
            if own in item:
                self._lacking[key] = ""
            else:
                self._lacking.setdefault(key, f"{where}: there is no column {named}")
            if key in row and key != own:
                raise UserError(
                    f"{where}: the row has a key {key!r} beside {own!r}, which "
                    f"{self._told.column}{key} names; remove one, or name it in "
                    f"{self._told.ignore}"
                )
        theirs = {own: key for key, own in self.columns.items()}
        return {theirs.get(key, key): value for key, value in row.items()}

    def _known(self, row: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, Any]:
        """What remains of a row or turn without what is ignored; all its keys are known."""
        out, strange = {}, []
        for key, value in row.items():
            patterns = self._ignore if key not in keys else (p for p in self._ignore if p == key)
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
                self.ignored[key] += 1
            elif key in keys:
                out[key] = value
            else:
                strange.append(key)
        if strange:
            # Turns have no columns.
            mapped = f", say what it is with {self._told.column}KEY=NAME" if keys is KEYS else ""
            raise UserError(
                f"{where}: nothing is known of {quoted(strange)}; rename it to one of "
                f"{', '.join(keys)}{mapped}, or add it to {self._told.ignore} to leave it out"
            )
        return out

    def _turns(self, row: dict[str, Any], where: str) -> list[Turn]:
        """Takes the turns out of a row."""
        talk = [key for key in TALKS if key in row]
        asked, answered = ([k for k in keys if k in row] for keys in (QUESTIONS, ANSWERS))
        if len(talk) == 1 and not asked and not answered:
            turns = self._talk(row.pop(talk[0]), f"{where}: '{talk[0]}'", where)
        elif not talk and len(asked) == len(answered) == 1:
            plain = isinstance(row[asked[0]], str) and isinstance(row[answered[0]], str)
            pair = _pair if plain else self._pair_of_talks
            turns = pair(row, asked[0], answered[0], where)
        else:
            raise UserError(
                f"{where}: needs one conversation ({' or '.join(TALKS)}), or one question "
                f"({', '.join(QUESTIONS)}) and one answer ({', '.join(ANSWERS)}); found "
                f"{quoted(row) or 'nothing'}"
            )
        system = text(row.pop("system", ""), f"{where}: 'system'")
        if system:
            if any(turn["role"] == "system" for turn in turns):
                raise UserError(f"{where}: has a system turn and 'system' beside it; remove one")
            turns.insert(0, {"role": "system", "content": system})
        return turns

    def _talk(self, value: Any, what: str, where: str) -> list[Turn]:
        value = decoded(value, what)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{what} must be a list of turns, found {kind(value)}")
        turns = []
        for number, turn in enumerate(value):
            at = f"{where}, turn {number}"
            if not isinstance(turn, Mapping):
                raise UserError(f"{at}: expected a JSON object, found {kind(turn)}")
            own = {key: value for key, value in turn.items() if value is not None}
            turns.append(read_turn(self._known(own, TURN_KEYS, at), at, self._told.ignore))
        start = 1 if turns and turns[0]["role"] == "system" else 0
        while len(turns) > start and turns[start]["role"] == "assistant":
            del turns[start]
            self.ignored[_GREETINGS] += 1
        return turns

    def _pair_of_talks(
        self, row: dict[str, Any], asked: str, answered: str, where: str
    ) -> list[Turn]:
        """Takes a question and its answer, at least one of which is a list of turns, out of a row.

        As TRL has them: what stands in the question is not learned.
        """
        talks = []
        for key, role in ((asked, "user"), (answered, "assistant")):
            value = row.pop(key)
            if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
                talks.append(value)
            else:
                talks.append([{"role": role, "content": text(value, f"{where}: '{key}'")}])
        question, answer = talks
        turns = self._talk(question + answer, f"{where}: '{asked}'", where)
        for turn in turns[: len(turns) - len(answer)]:
            if turn["role"] == "assistant":
                turn["train_weight"] = 0
        return turns

    @staticmethod
    def _check_learnable(turns: Sequence[Turn], where: str) -> None:
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not answers:
            raise UserError(
                f"{where}: no assistant turn answers a user turn, so nothing can be learned from "
                "it; add an answer or remove the row"
            )
        if not any(turn.get("train_weight", 1) for turn in answers):
            raise UserError(
                f"{where}: every answer has weight 0, so nothing can be learned from it; remove "
                "the row"
            )


def _check_said(turns: Sequence[Turn], where: str) -> None:
    """Raise UserError for an answer that is learned and says nothing."""
    for turn in turns:
        says = turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content")
        if turn["role"] == "assistant" and turn.get("train_weight", 1) and not says:
            raise UserError(
                f"{where}: an answer is empty, which teaches to say nothing; write it, remove the "
                "row, or give the turn the weight 0"
            )


def parse_row(item: Any, where: str = "row", language: str = "") -> Conversation:
    """The conversation row of one decoded JSON object, for programs with rows of their own.

    Args:
      item: a row of any known form.
      where: what messages begin with, such as its file and line.
      language: given to it if it names none.

    Raises:
      UserError: a key is not known, or the row cannot be used.
    """
    return RowReader(language)(item, where)


def read_file(path: str | Path, language: str = "") -> Iterator[Conversation]:
    """Yields the conversation rows of one file; `language` is given to rows that name none.

    Raises UserError, naming the file and the line or item, for anything that is not a row.
    """
    reader = RowReader(language)
    for where, item in read_items(path):
        yield reader(item, where)


def _pair(row: dict[str, Any], asked: str, answered: str, where: str) -> list[Turn]:
    """Takes a question, its answer, its reasoning and what was said before out of a row."""
    question = text(row.pop(asked), f"{where}: '{asked}'")
    answer = text(row.pop(answered), f"{where}: '{answered}'")
    more = text(row.pop("input", ""), f"{where}: 'input'")
    history = decoded(row.pop("history", ()), f"{where}: 'history'")
    history = () if history == "" else history  # a table's empty cell
    turns: list[Turn] = []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise UserError(f"{where}: 'history' must be a list of pairs, found {kind(history)}")
    for number, pair in enumerate(history):
        at = f"{where}: 'history', pair {number}"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"{at}: expected [question, answer], found {kind(pair)}")
        for role, turn in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text(turn, at)})
    turns.append({"role": "user", "content": "\n".join(filter(None, (question, more)))})
    said: Turn = {"role": "assistant", "content": answer}
    if thought := text(row.pop("reasoning_content", ""), f"{where}: 'reasoning_content'"):
        said["reasoning_content"] = thought
    return [*turns, said]
