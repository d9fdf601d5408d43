"""Rows of training data from files: JSON list or JSON lines, each optionally gzipped.

Two row forms are read. A conversation, in the form of the public medical instruction sets:

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

(`role`/`content` may replace `from`/`value`), or a pair `{"prompt": "...", "response": "..."}`.
Both may carry `"language": "en"`. All come out as a *conversation row*:

    {"conversations": [{"role": "system"|"user"|"assistant", "content": str}, ...], "language": str}
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from medmoe_jax.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def read_files(paths: Iterable[str | Path], language: str = "") -> Iterator[dict]:
    """Yields the conversation rows of several files, in order. See `read_file`."""
    for path in paths:
        yield from read_file(path, language)


def read_file(path: str | Path, language: str = "") -> Iterator[dict]:
    """Yields the conversation rows of one file; `language` is given to rows that name none.

    JSON lines are streamed. A JSON list is read as text and decoded one item at a time.
    Raises UserError, naming the file and the line or item, for anything that is not a row.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path}: unknown file ending; give a file that ends in {_one_of(ENDINGS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with _open(path) as text:
            first = _first_character(text)
            items = _list_items(text.read(), path) if first == "[" else _lines(text, path)
            for where, item in items:
                yield parse_row(item, where, language)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a complete gzip file ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert the file to UTF-8") from error


def parse_row(item: Any, where: str = "row", language: str = "") -> dict:
    """Turns one decoded JSON object into a conversation row.

    A leading assistant turn (one that answers nothing) is dropped. Raises UserError that starts
    with `where`.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected a JSON object, found {_kind(item)}")
    if "conversations" in item:
        turns = _turns(item["conversations"], where)
    elif "prompt" in item and "response" in item:
        turns = [
            {"role": "user", "content": _text(item["prompt"], f"{where}: 'prompt'")},
            {"role": "assistant", "content": _text(item["response"], f"{where}: 'response'")},
        ]
    else:
        found = ", ".join(repr(key) for key in item) or "nothing"
        raise UserError(
            f"{where}: needs either 'conversations' or both 'prompt' and 'response'; found {found}"
        )
    tongue = item.get("language")
    tongue = language if tongue is None else _text(tongue, f"{where}: 'language'")
    return {"conversations": turns, "language": tongue}


def _turns(value: Any, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise UserError(f"{where}: 'conversations' must be a list of turns, found {_kind(value)}")
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value)]
    start = 1 if turns and turns[0]["role"] == "system" else 0
    while len(turns) > start and turns[start]["role"] == "assistant":
        del turns[start]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(
            f"{where}: no assistant turn answers a user turn, so nothing can be learned from it; "
            "add an answer or remove the row"
        )
    return turns


def _turn(turn: Any, where: str) -> dict:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected a JSON object, found {_kind(turn)}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise UserError(f"{where}: needs 'from' and 'value' (or 'role' and 'content')")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; use {_one_of(ROLES)}")
    return {"role": ROLES[role], "content": _text(content, f"{where}: content")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, found {_kind(value)}")
    return value


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _first_character(text: TextIO) -> str:
    """The first character that is not white space; the file is put back to its start."""
    while (character := text.read(1)) and character.isspace():
        pass
    text.seek(0)
    return character


def _lines(text: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}); "
                    "write one JSON object on each line, or one JSON list for the whole file"
                ) from error


def _list_items(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    decoder, number, line, seen = json.JSONDecoder(), 0, 1, 0
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]" or number:
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}, item {number} (line {line})"
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg}, line {error.lineno}); correct this item"
            ) from error
        yield where, item
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise UserError(f"{where}: expected ',' or ']' after this item; is the file cut short?")
        at, number = _skip(text, at + 1), number + 1
    if text[at + 1 :].strip():
        raise UserError(f"{path}: text after the closing ']' of the list; remove it")


def _skip(text: str, at: int) -> int:
    """The position of the next character that is not JSON white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false"}
    return "null" if value is None else names.get(type(value), "a number")


def _one_of(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
