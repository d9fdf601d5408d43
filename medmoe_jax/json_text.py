"""JSON from files and rows that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

from medmoe_jax.errors import UserError


@contextlib.contextmanager
def one_error(text: str | bytes) -> Generator[None]:
    """Turns what Python's decoder raises beside `JSONDecodeError` into that.

    It gives up on values nested a thousand deep with RecursionError, on integers of more than 4,300
    digits with ValueError, and on bytes that are not text with UnicodeDecodeError.
    """
    try:
        yield
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", _shown(text), 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"not text: {error.reason}", _shown(text), 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", _shown(text), 0) from None


def _shown(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode(errors="replace")


def loads(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds.

    Args:
      text: the whole of it.
      pairs: makes an object from its keys and values in order; its own errors pass.

    Raises:
      json.JSONDecodeError: it is not JSON, or more than a row or a setting can be.
    """
    with one_error(text):
        return json.loads(text, object_pairs_hook=pairs)


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
        raise UserError(f"{shown}:{number}: not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{shown}:{number}"
            try:
                yield where, loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg})") from None
