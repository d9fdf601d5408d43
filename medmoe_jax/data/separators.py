"""Tables of text whose columns are not parted by what their file's ending promises."""

from __future__ import annotations

from collections.abc import Sequence

from medmoe_jax.errors import UserError

_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_ENDINGS = {",": ".csv", "\t": ".tsv"}


def check_separator(cells: Sequence[str], separator: str, where: str, width: int = 0) -> None:
    """Raise UserError, beginning with `where`, for one cell that other signs part into several.

    Args:
      cells: of a header, or of a row that is too short.
      separator: what they were parted by.
      where: the file and line.
      width: how many there should be; 0 = that is not known.
    """
    others = [sign for sign in _NAMES if sign != separator and len(cells) == 1]
    for sign in others:
        parts = cells[0].count(sign) + 1
        if parts == width or (not width and parts > 1):
            ending = f", or name the file {_ENDINGS[sign]}" if sign in _ENDINGS else ""
            raise UserError(
                f"{where}: its columns seem to have {_NAMES[sign]} between them, where "
                f"{_NAMES[separator]} are expected; save the table with {_NAMES[separator]}{ending}"
            )
