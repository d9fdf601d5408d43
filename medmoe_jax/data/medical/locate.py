"""Where a set's files lie: in the data folder as upstream publishes them, or on the hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medmoe_jax.data.medical.cards import MedicalSet
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import at_home, check_utf8, is_hidden

HUB = "hf://"


class Found(NamedTuple):
    """A file of a split, and what its places (`{subject}`) stand for in it."""

    path: Path
    values: dict[str, str]


def data_root(root: str | os.PathLike | None = None) -> Path | str:
    """The folder of the sets: `root`, else $MEDMOE_DATA, else ../shared/data; or `hf://`.

    Raises FileNotFoundError where it is no folder, UserError where its name is not UTF-8.
    """
    given = at_home(str(root or os.environ.get("MEDMOE_DATA") or "../shared/data"))
    check_utf8(given, "$MEDMOE_DATA: ")
    if given == HUB:
        return HUB
    if not Path(given).is_dir():
        raise FileNotFoundError(
            f"{given} is no folder: $MEDMOE_DATA must name the folder of the medical sets, or be "
            f"{HUB}; `medmoe eval --list` prints their names, docs/tasks.md says where to get them"
        )
    return Path(given)


def find_files(
    entry: MedicalSet, split: str, root: str | os.PathLike | None, only: str = ""
) -> tuple[list[Found], list[str]]:
    """The files of a split that are there, and the names of those that are not.

    only: a value of one of the set's places, to which the files are narrowed.
    Raises FileNotFoundError where none is there, telling how to get the set.
    """
    folders = _folders(entry, root)
    found, missing = [], []
    for source in entry.files.get(split, ()):
        for values in _values(entry, source, only):
            names = [_fill(entry, part.strip(), values) for part in source.split(" | ")]
            paths = next(filter(None, (_match(f, n) for n in names for f in folders)), [])
            found += [Found(path, values) for path in paths]
            missing += [] if paths else [names[0]]
    if not found:
        raise FileNotFoundError(
            f"{entry.name}: no file of split {split!r} is in {folders[0]} (such as {missing[0]}); "
            f"get it from {entry.get}"
        )
    return found, missing


def has_files(entry: MedicalSet, split: str, root: str | os.PathLike | None) -> bool:
    """Whether any file of a split is there."""
    try:
        return bool(entry.files.get(split)) and bool(find_files(entry, split, root)[0])
    except FileNotFoundError:
        return False


def _folders(entry: MedicalSet, root: str | os.PathLike | None) -> list[Path]:
    place = data_root(root)
    if place == HUB:
        return [_from_hub(entry)]
    folders = [Path(place) / name for name in entry.folder if (Path(place) / name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{Path(place) / entry.folder[0]} is missing: $MEDMOE_DATA must name the folder that "
            f"holds {' or '.join(entry.folder)}; get {entry.name} from {entry.get}"
        )
    return folders


def _from_hub(entry: MedicalSet) -> Path:
    """A copy of the set's files on the hub, in its cache."""
    if not entry.hub:
        raise UserError(f"{entry.name} is not read from the hub; get it from {entry.get}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [
        re.sub(r"\{\w+\}", "*", part.strip())
        for sources in entry.files.values()
        for source in sources
        for part in source.split(" | ")
    ]
    try:
        return Path(snapshot_download(entry.hub, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{entry.name}: {HUB}{entry.hub} cannot be read ({error})") from error


def _values(entry: MedicalSet, source: str, only: str) -> Iterator[dict[str, str]]:
    """All values of a source's places."""
    places = [p for p in entry.expand if f"{{{p}}}" in source]
    for keys in itertools.product(*(entry.expand[p] for p in places)):
        if not only or only in keys or not any(only in entry.expand[p] for p in places):
            yield dict(zip(places, keys, strict=True))


def _fill(entry: MedicalSet, name: str, values: dict[str, str]) -> str:
    for place, key in values.items():
        name = name.replace(f"{{{place}}}", entry.expand[place][key])
    return name


def _match(folder: Path, name: str) -> list[Path]:
    if "*" in name:
        return sorted(path for path in folder.glob(name) if not is_hidden(path.relative_to(folder)))
    return [folder / name] if (folder / name).exists() else []
