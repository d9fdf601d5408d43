"""Where a base comes from and under what terms, as far as its files tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoints.gguf_file import open_gguf
from medmoe_jax.checkpoints.huggingface import published
from medmoe_jax.data.cards import front_matter

CARD = "README.md"
# Beside the weights in a folder: what has to go with them.
_TERMS = re.compile(r"(licen[cs]e|notice|use_policy)\b", re.IGNORECASE)
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """A base's origin; what is not known is empty.

    Attributes:
      name: the hub's id, or the name of its file or folder.
      hub: its id on the hub.
      revision: of the files on the hub, as asked for or as fetched.
      licence: `license`, `license_name` and `license_link`, as a model card has them.
      languages: codes.
      files: by name, those that go with its weights: its own model card, its licence.
    """

    name: str
    hub: str = ""
    revision: str = ""
    licence: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


def origin_of(path: str, folder: Path | None) -> Origin:
    """The origin of a base.

    Args:
      path: `base.path` of a configuration.
      folder: the Hugging Face folder that it stands for, or None.

    Raises:
      UserError: the model card in the folder cannot be read.
    """
    if folder is None:
        fields = open_gguf(path).fields if path.endswith(".gguf") else {}
        return Origin(
            Path(path).name,
            licence=_chosen({"license": fields.get("general.license")}),
            languages=tuple(fields.get("general.languages") or ()),
        )
    hub, revision = published(path)
    hub = "" if hub == path else hub
    revision = published(str(folder))[1] or revision  # what was fetched, where a branch was named
    files = {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and _TERMS.match(p.name)}
    about = {}
    if (folder / CARD).is_file():
        files[CARD] = folder / CARD
        about = front_matter(folder / CARD, str(folder / CARD), "take the file away")
    languages = about.get("language") or ()
    return Origin(
        hub or folder.resolve().name,
        hub,
        revision,
        _chosen(about),
        (languages,) if isinstance(languages, str) else tuple(languages),
        files,
    )


def _chosen(fields: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(fields[key]) for key in _LICENCE if fields.get(key)}
