"""Files from others, read with an end in sight: ordinary ones of a size that can be meant.

A pipe or a device in the place of a file would be read for ever.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import is_remote

SETTINGS = 1 << 28  # bytes of a file of settings; the largest tokenizer.json known has 2**25


def check_plain(path: Path, shown: object = "", most: float = float("inf")) -> None:
    """Raise UserError unless a file on this machine's disk is an ordinary one, not too large.

    Args:
      path: of the file, or of a link to it; FileNotFoundError where there is none.
      shown: what it is called in messages; its path if that is not given.
      most: bytes.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{shown or path}: is no ordinary file; nothing is read from a {_kind(found)}"
        )
    if found.st_size > most:
        raise UserError(
            f"{shown or path}: has {found.st_size:,} bytes, and such a file has at most {most:,}"
        )


def read_settings(path: Path, shown: object = "") -> bytes:
    """The content of a file of settings; see `check_plain`."""
    if not is_remote(path):
        check_plain(path, shown, SETTINGS)
    return path.read_bytes()


def read_text(path: Path, shown: object = "") -> str:
    """The text in a file of settings, in UTF-8; see `check_plain`."""
    try:
        return read_settings(path, shown).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown or path}: not UTF-8 text ({error.reason})") from None


def check_name(name: str, where: object) -> None:
    """Raise UserError, beginning with `where`, unless a file of a folder can have this name."""
    bad = name in ("", ".", "..") or "\0" in name or len(os.fsencode(name)) > 255
    if bad or name != Path(name).name:
        raise UserError(f"{where}: {name[:80]!r} is no name of a file beside it")


def _kind(found: os.stat_result) -> str:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, fits in kinds.items() if fits(found.st_mode)), "device")
