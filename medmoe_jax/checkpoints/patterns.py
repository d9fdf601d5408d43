"""Regular expressions that others wrote, matched in a time that grows with the text alone.

Python's own engine can need longer than the universe lasts for a pattern of ten characters. RE2
cannot, as it knows neither look-around nor back-references.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import re2

from medmoe_jax.errors import UserError
from medmoe_jax.kinds import shown

_LONGEST = 20_000
_AROUND = re.compile(r"\(\?<?[=!]")


def looks_around(pattern: str) -> bool:
    """Whether a pattern asks what stands beside a match, which is not read."""
    return _AROUND.search(pattern) is not None


@functools.lru_cache(1000)
def compiled(pattern: str) -> Any:
    """The pattern, with `re`'s methods. Raises UserError for one that is not read."""
    options = re2.Options()
    options.log_errors = False
    try:
        if len(pattern) > _LONGEST:
            raise UserError(f"{shown(pattern)} has {len(pattern):,} characters")
        return re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        why = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise UserError(
            f"{shown(pattern)} is not a regular expression that is read ({why})"
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{shown(pattern)} is not Unicode") from None
