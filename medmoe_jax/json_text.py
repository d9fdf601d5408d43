"""JSON from files and rows that others wrote: whatever is wrong with it is one kind of error.

No value is nested deeper than `DEPTH`: what walks over one calls itself, and no row or setting
comes near it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

from medmoe_jax.errors import UserError

DEPTH = 100


@contextlib.contextmanager
def one_error(text: str | bytes) -> Generator[None]:
    """Turns what Python's decoder raises beside `JSONDecodeError` into that.

    It gives up on values nested thousands deep with RecursionError, on integers of more than 4,300
    digits with ValueError, and on bytes that are not text with UnicodeDecodeError.
    """
    try:
        yield
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _error("nested too deeply", text) from None
    except UnicodeDecodeError as error:
        raise _error(f"not text: {error.reason}", text) from None
    except ValueError:
        raise _error("a number has too many digits", text) from None


def _error(message: str, text: str | bytes) -> json.JSONDecodeError:
    shown = text if isinstance(text, str) else text.decode(errors="replace")
    return json.JSONDecodeError(message, shown, 0)


def loads(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds.

    Args:
      text: the whole of it.
      pairs: makes an object from its keys and values in order; its own errors pass.

    Raises:
      json.JSONDecodeError: it is not JSON, or more than a row or a setting can be.
    """
    with one_error(text):
        value = json.loads(text, object_pairs_hook=pairs)
    check_depth(value, text)
    return value


def check_depth(value: Any, text: str | bytes) -> None:
    """Raise JSONDecodeError for a decoded value that is nested deeper than `DEPTH`."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > DEPTH:
            raise _error("nested too deeply", text)
        level = [i for one in level for i in (one.values() if isinstance(one, dict) else one)]


def not_text(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, to stand behind their file and line."""
    byte = error.object[error.start]
    return f"not UTF-8 text (byte 0x{byte:02x}); convert the file to UTF-8"


def settings(content: bytes, shown: object) -> dict[str, Any]:
    """The object in a file of settings.

    Args:
      content: of the file, in UTF-8.
      shown: what it is called.

    Raises:
      UserError: it is not JSON or no object, or a text in it is not Unicode; names file and line.
    """
    try:
        value = loads(content.decode("utf-8-sig"))
        _check_unicode(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}, line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{shown}: not UTF-8 text in line {line} ({error.reason})") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise UserError(f"{shown}: holds '{half}', half of a surrogate pair") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown}: expected a JSON object")
    return value


def _check_unicode(value: Any) -> None:
    """Raise UnicodeEncodeError for half of a surrogate pair, which no file can hold."""
    json.dumps(value, ensure_ascii=False).encode()


def lines(content: bytes, shown: object) -> Iterator[tuple[str, Any]]:
    """`(file:line, value)` of each line of JSON Lines that is not blank.

    Args:
      content: of the file.
      shown: what it is called.

    Raises:
      UserError: it is not UTF-8, or a line is not JSON; names file and line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{shown}:{number}: {not_text(error)}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{shown}:{number}"
            try:
                yield where, loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg})") from None
