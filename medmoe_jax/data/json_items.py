"""Items of JSON files, each with its line: one list, or one object a line."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from medmoe_jax import json_text
from medmoe_jax.errors import UserError

Items = Iterator[tuple[str, Any]]


def json_items(text: TextIO, shown: str) -> Items:
    """Yields `(file and line, decoded item)`.

    Lines are streamed. A list is read as text and decoded one item at a time. Lines may be lists,
    too. Raises UserError, naming the line or item, for what cannot be decoded.
    """
    head: list[str] = []
    for line in text:
        head.append(line)
        if line.strip():
            break
    if head and head[-1].lstrip().startswith("["):
        more = text.read()
        if not (head[-1].rstrip().endswith("]") and more.lstrip().startswith("[")):
            return _list_items("".join(head) + more, shown)
        text = io.StringIO(more)
    return _lines(itertools.chain(head, text), shown)


def _lines(lines: Iterable[str], shown: str) -> Items:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{shown}, line {number}"
            yield where, decode_line(line, lambda where=where: where)


def decode_line(line: str, where: Callable[[], str]) -> Any:
    """The item of one line. Raises UserError that begins with what `where` gives."""
    try:
        return json_text.loads(line, unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where()}: not valid JSON ({error.msg}, column {error.colno}); "
            "write one JSON object on each line, or one JSON list for the whole file"
        ) from error
    except TwiceError as error:
        raise UserError(f"{where()}: {error}") from None


def _list_items(text: str, shown: str) -> Items:
    decoder, number, line, seen = json.JSONDecoder(object_pairs_hook=unique_keys), 0, 1, 0
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]" or number:
        line, seen = line + text.count("\n", seen, at), at
        where = f"{shown}, item {number} (line {line})"
        try:
            with json_text.one_error(text):
                item, at = decoder.raw_decode(text, at)
                json_text.check_depth(item, text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg}, line {error.lineno}); correct this item"
            ) from error
        except TwiceError as error:
            raise UserError(f"{where}: {error}") from None
        yield where, item
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise UserError(f"{where}: expected ',' or ']' after this item; is the file cut short?")
        at, number = _skip(text, at + 1), number + 1
    if text[at + 1 :].strip():
        raise UserError(f"{shown}: text after the closing ']' of the list; remove it")


class TwiceError(Exception):
    """A key stands twice in one object; JSON readers would drop the first."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values. Raises TwiceError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TwiceError(f"the key {twice!r} stands twice in one object; remove one")
    return found


def _skip(text: str, at: int) -> int:
    """The position of the next character that is not JSON white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
