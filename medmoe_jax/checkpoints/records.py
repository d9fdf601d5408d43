"""Records: JSON files that hold a fingerprint of themselves, so that a change of one is seen.

A record that stands on another names that one's fingerprint. It guards against accidents and
mixtures, not against somebody who computes the fingerprints anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.checkpoints.fingerprint import json_fingerprint
from medmoe_jax.errors import UserError

# Of all records of a work directory; another number is another program's.
FORMAT = 2
_OWN = ("format", "fingerprint")


class RecordError(UserError):
    """A record is gone, damaged or changed, or does not belong where it lies; names the file."""


def write_record(path: str | Path, value: Mapping[str, Any]) -> str:
    """Replace a record by a JSON-able mapping, atomically; gives its fingerprint."""
    plain = json.loads(json.dumps(value))
    fingerprint = json_fingerprint(plain)
    write_json(path, {**plain, "format": FORMAT, "fingerprint": fingerprint})
    return fingerprint


def read_record(path: str | Path, *fields: str) -> tuple[dict[str, Any], str]:
    """A record's content, with these fields at least, and its fingerprint.

    Raises:
      RecordError: it is gone, is not JSON, is another program's, was changed, or lacks a field.
    """
    try:
        value = read_json(path)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise RecordError(f"{path}: not a file: {error.strerror}") from None
    except UserError as error:
        raise RecordError(str(error)) from None
    if value.get("format") != FORMAT:
        raise RecordError(
            f"{path}: its format is {value.get('format')!r} and not {FORMAT}: another version of "
            "medmoe_jax made it, with which its work directory can be used on"
        )
    content = {key: item for key, item in value.items() if key not in _OWN}
    if value.get("fingerprint") != (fingerprint := json_fingerprint(content)):
        raise RecordError(f"{path}: was changed after it was written")
    if missing := [name for name in fields if name not in content]:
        raise RecordError(f"{path}: field {missing[0]} is missing")
    return content, fingerprint


def remedy(folder: Path) -> str:
    """What to do about a record of a stage that is in `folder`."""
    return f"put back what was written there, or remove {folder} to run the stage anew"
