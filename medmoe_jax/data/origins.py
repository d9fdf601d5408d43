"""Where the rows of a source come from and under what licence, as far as is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax.data import hub, medical


class SourceOrigin(NamedTuple):
    """A source's origin; what is not known is empty.

    Attributes:
      name: of the set or file, never with the folders it lies in.
      dataset: its id on the hub.
      licence: in words.
    """

    name: str
    dataset: str = ""
    licence: str = ""


def origin_of(fields: Mapping[str, Any]) -> SourceOrigin:
    """The origin of a source from its section of a configuration; nothing is fetched."""
    path, reader = fields["path"], fields["reader"]
    if reader.partition(":")[0] in medical.SETS:
        entry, _ = medical.find(reader)
        return SourceOrigin(f"{entry.title} ({reader}, split {fields['split']})", "", entry.licence)
    if not path:
        return SourceOrigin(f"made-up text of medmoe_jax ({reader})", "", "Apache-2.0")
    if path.startswith(hub.HUB):
        return SourceOrigin(path, hub.repository_of(path), hub.fetched_licence(path))
    return SourceOrigin(path if hub.is_name(path) else Path(path).name)
