"""JSON from files and rows that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator
from typing import Any


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
