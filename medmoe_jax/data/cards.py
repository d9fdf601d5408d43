"""Cards of data sets on the hub: which files are of which subset and split.

A card is the set's README.md. Its front matter may list subsets, in the forms of `datasets`:

    configs:
    - config_name: first
      default: true             taken where none is named; so is one called `default`, or a single
      data_dir: data            the folder that its paths begin at
      data_files:               one path, a list of them (of the split train), or paths by split
      - split: train
        path: one/*.csv         or a list of such; `*` stays within a folder, `**/` goes through any
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax.errors import UserError
from medmoe_jax.kinds import fits, shown

_FIELDS = {"default": bool, "data_dir": str}
_ONE_FILE = "add the path of one file to the set's name"


class Subset(NamedTuple):
    """A subset of a data set.

    Attributes:
      start: of its files' names: that of a folder with `/`, or "".
      paths: names of its files and patterns of them, by split; None = their names tell the splits.
      default: whether the card calls it the default.
    """

    start: str
    paths: dict[str, list[str]] | None = None
    default: bool = False


def front_matter(card: Path, name: str, otherwise: str) -> dict[str, Any]:
    """The front matter of a card; empty where it has none.

    Args:
      card: its file.
      name: what messages begin with.
      otherwise: what a person can do who cannot mend the card.

    Raises:
      UserError: it cannot be read.
    """
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{name}: its front matter cannot be read ({' '.join(str(error).split())}); mend it, "
            f"or {otherwise}"
        ) from None


def read_subsets(card: Path, name: str) -> dict[str, Subset]:
    """The subsets of a data set by their names, as its card lists them.

    Args:
      card: its file, which need not be there.
      name: of the data set.

    Raises:
      UserError: the card cannot be read, or what it says of a subset is none of the forms.
    """
    if not card.is_file():
        return {}
    entries = front_matter(card, f"{name}, {card.name}", _ONE_FILE).get("configs") or []
    subsets = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        subset = _subset(entry)
        if subset is None:
            raise UserError(
                f"{name}, {card.name}: `configs` holds {shown(entry)}; a subset has a "
                "`config_name`, and as `data_files` a path, a list of paths, or a list of objects "
                f"with `split` and `path`; mend it, or {_ONE_FILE}"
            )
        subsets[str(entry["config_name"])] = subset
    return subsets


def _subset(entry: Any) -> Subset | None:
    """A subset from its entry in a card, or None for an entry of no known form."""
    if not fits(entry, dict[str, Any]) or "config_name" not in entry:
        return None
    given = {key: value for key, value in entry.items() if value is not None}
    if not all(fits(given[key], kind) for key, kind in _FIELDS.items() if key in given):
        return None
    start = posixpath.normpath(given.get("data_dir", "")) + "/"
    subset = Subset(start.removeprefix("./"), default=given.get("default", False))
    files = given.get("data_files")
    if files is None:
        return subset
    files = [files] if isinstance(files, str) else files
    if fits(files, list[str]):
        return subset._replace(paths={"train": files})
    if not fits(files, list[dict[str, Any]]):
        return None
    if not all("split" in one and fits(one.get("path"), str | list[str]) for one in files):
        return None
    paths = {
        str(one["split"]): [one["path"]] if isinstance(one["path"], str) else one["path"]
        for one in files
    }
    return subset._replace(paths=paths) if len(paths) == len(files) else None


def default_subset(subsets: dict[str, Subset], name: str) -> Subset:
    """The subset that is taken where none is named. Raises UserError where that is not one."""
    chosen = [
        subset
        for key, subset in subsets.items()
        if subset.default or key == "default" or len(subsets) == 1
    ]
    if len(chosen) != 1:
        raise UserError(f"{name}: name one of its subsets: {', '.join(subsets)}")
    return chosen[0]


def matching(start: str, paths: Sequence[str], files: Sequence[str], name: str) -> list[str]:
    """Those of some files that a card's paths name, in their order.

    Args:
      start: of the paths, as of `Subset`.
      paths: names and patterns.
      files: that can be read.
      name: what messages begin with.

    Raises:
      UserError: a name is that of no file, or nothing matches.
    """
    from fsspec.utils import glob_translate  # by which `datasets` matches

    chosen, lost = set(), []
    for path in paths:
        try:
            wanted = re.compile(glob_translate(posixpath.normpath(start + path)))
        except ValueError as error:
            raise UserError(f"{name}: the card's path '{path}' ({error}); {_ONE_FILE}") from None
        found = [file for file in files if wanted.match(file)]
        if not found and not re.search(r"[*?[]", path):
            lost.append(path)
        chosen.update(found)
    if lost or not chosen:
        raise UserError(
            f"{name}: the card names {', '.join(lost or paths) or 'no file'}, and there is no such "
            f"file that can be read; {_ONE_FILE}"
        )
    return [file for file in files if file in chosen]
