"""What a recipe's file gives. It is Python of the user's: what goes wrong in it is told by line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from medmoe_jax.errors import UserError, bad_or_lost

_OURS = Path(__file__).resolve().parents[1] / "configs"  # what they say needs no line
_MODULE = "config_config"  # a name for all of them: at a time there is one


def run_file(file: Path, arguments: Sequence[str]) -> Any:
    """What `get_config(*arguments)` of a file returns.

    Raises:
      UserError: the file has no `get_config`, or raises; names the file and its line.
    """
    loader = SourceFileLoader(_MODULE, str(file))
    spec = spec_from_file_location(_MODULE, file, loader=loader)
    assert spec is not None  # it is made of the loader
    module = module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses in the file look for it there
    try:
        loader.exec_module(module)
        make = getattr(module, "get_config", None)
        if make is None:
            raise UserError("has no get_config()")
        return make(*arguments)
    except (Exception, SystemExit) as error:  # whatever the user's file raises is theirs to mend
        place, kind = ":".join((str(file), *arguments)), ""
        if not isinstance(error, UserError) and _OURS not in file.resolve().parents:
            place, kind = place + _line(error, str(file)), f"{type(error).__name__}: "
        raise bad_or_lost(f"{place}: {kind}{one_line(error)}", error) from error


def _line(error: BaseException, file: str) -> str:
    """The line of the file that an error came from or through, if one did."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f", line {f.lineno}" for f in reversed(frames) if f.filename == file), "")


def one_line(error: BaseException) -> str:
    """An error's text in one line.

    The text of a KeyError, and of the AttributeError that ml-collections makes of it, would be one
    as Python writes it, in quotation marks.
    """
    first = error.args[0] if len(error.args) == 1 else None
    if isinstance(first, BaseException):
        return one_line(first)
    text = first if isinstance(first, str) else str(error)
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "no message"
