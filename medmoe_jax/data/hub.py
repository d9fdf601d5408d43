"""Data sets with a name: on the Hugging Face hub, or prepared by TensorFlow Datasets."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.data import cards
from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import is_hidden

LOG = logging.getLogger(__name__)

HUB, TFDS = "hf://datasets/", "tfds://"
_SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")


def is_name(path: str) -> bool:
    """Whether a path is the name of a data set and no place on this machine's disk."""
    return path.startswith((HUB, TFDS))


@contextlib.contextmanager
def hub_errors(name: str) -> Generator[None]:
    """Raises UserError with that name and one line, where the hub refuses or cannot be reached."""
    from httpx import HTTPError  # what huggingface_hub asks with: no connection, no answer
    from huggingface_hub import constants, errors

    try:
        yield
    except (HTTPError, errors.HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError):
            said = (  # it says which argument of its own to change
                "is not in the hub's cache, and HF_HUB_OFFLINE is set, so that nothing is fetched; "
                "unset it, or fetch it first"
            )
        raise UserError(f"{name}: {said}") from error


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """(repository, revision, part) of a name on the hub. Raises UserError."""
    found = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", name.removeprefix(HUB))
    if not found:
        raise UserError(f"{name}: write {HUB}ORG/NAME[@REVISION][/PART]")
    repository, revision, part = found.groups()
    return repository, revision, part


def repository_of(name: str) -> str:
    """The id of a data set on the hub, `org/name`. Raises UserError for a name that is none."""
    return _parts(name)[0]


def fetched_licence(name: str) -> str:
    """The licence that a data set's card names, if the card was fetched before; "" otherwise."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision, _ = _parts(name)
    card = try_to_load_from_cache(repository, "README.md", repo_type="dataset", revision=revision)
    if not isinstance(card, str):
        return ""
    licence = cards.front_matter(Path(card), card, "take the file away").get("license") or ""
    return licence if isinstance(licence, str) else ", ".join(licence)


def hub_files(name: str, split: str, endings: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yields `(file on this machine, its name)` of one split of a data set on the hub.

    Args:
      name: `hf://datasets/ORG/NAME[@REVISION][/PART]`; PART is a subset, a folder or a file of it.
      split: whose files; they are those that the data set's card gives it, or that have it in
        their names.
      endings: of files that can be read.

    Raises:
      UserError: the hub cannot provide it, or it has no such part or split.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, revision, part = _parts(name)
    common: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    with hub_errors(name):
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, local_files_only=True, **common))
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        else:
            files = sorted(HfApi().list_repo_files(repository, **common))
            card = snapshot_download(repository, allow_patterns=["README.md"], **common)
            folder = Path(card)
        chosen = _part_files(name, files, folder / "README.md", part or "", split, endings)
        if not constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, allow_patterns=chosen, **common))
    base = name.removesuffix(f"/{part}") if part else name
    for file in chosen:
        yield folder / file, f"{base}/{file}"


def remote_files(
    name: str, split: str, endings: Sequence[str]
) -> Iterator[tuple[str, Callable[[], io.RawIOBase], int, Callable[[], str]]]:
    """Yields `(name, what opens it, bytes, what gives its hash)` of files that stay on the hub.

    Arguments and errors are those of `hub_files`.
    """
    from huggingface_hub import HfFileSystem, snapshot_download

    repository, revision, part = _parts(name)
    with hub_errors(name):
        system = HfFileSystem()
        base = f"datasets/{repository}" + (f"@{revision}" if revision else "")
        listed: Any = system.find(base, detail=True)  # a dict of what is known of each
        found = {path.removeprefix(f"{base}/"): info for path, info in listed.items()}
        card = Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=["README.md"]
            )
        )
        chosen = _part_files(name, sorted(found), card / "README.md", part or "", split, endings)
    shown = name.removesuffix(f"/{part}") if part else name
    for file in chosen:
        info = found[file]
        opens = functools.partial(system.open, info["name"], "rb")
        yield f"{shown}/{file}", opens, info["size"], functools.partial(_content_hash, info)


def _content_hash(info: Mapping[str, Any]) -> str:
    """The hash by which the hub knows a file's content."""
    return str((info.get("lfs") or {}).get("sha256") or info["blob_id"])


def _part_files(
    name: str, files: Sequence[str], card: Path, part: str, split: str, endings: Sequence[str]
) -> list[str]:
    """The files of a part and split, by the card or by their names."""
    if part in files:
        return [part]
    subsets = cards.read_subsets(card, name)
    subset = subsets.get(part) if part or not subsets else cards.default_subset(subsets, name)
    if subset is None:
        within = [f for f in files if not part or f.startswith(f"{part}/")]
        return choose_files(name, within, split, endings)
    if subset.paths is None:  # the name of the folder itself tells no split
        within = [f.removeprefix(subset.start) for f in files if f.startswith(subset.start)]
        return [subset.start + f for f in choose_files(name, within, split, endings)]
    if split not in subset.paths:
        raise UserError(f"{name}: has no split '{split}'; it has {', '.join(subset.paths)}")
    known = _readable(files, endings)
    return cards.matching(subset.start, subset.paths[split], known, f"{name}, split '{split}'")


def _readable(files: Sequence[str], endings: Sequence[str]) -> list[str]:
    return [f for f in files if f.endswith(tuple(endings)) and not is_hidden(f)]


def choose_files(name: str, files: Sequence[str], split: str, endings: Sequence[str]) -> list[str]:
    """The files that hold a split, by their names; all of them where none names a split.

    Hidden files are passed over. So are those that name no split beside some that do, which is
    told, as they may be meant too.

    Raises:
      UserError: no file can be read, or the names tell of other splits only.
    """
    known = _readable(files, endings)
    if not known:
        raise UserError(f"{name}: holds no file that ends in {', '.join(endings)}")

    def of(splits: Sequence[str]) -> list[str]:
        word = re.compile(rf"(?:^|[/._-])(?:{'|'.join(map(re.escape, splits))})(?:[/._-]|$)")
        return [file for file in known if word.search(file)]

    chosen, named = of([split]), of([split, *_SPLITS])
    if chosen:
        if others := [file for file in known if file not in named]:
            some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            told = "%s: %d files are passed over, as they name no split and others name '%s': %s"
            LOG.warning(told, name, len(others), split, some)
        return chosen
    if named or split != "train":
        raise UserError(f"{name}: no file of split '{split}' among {', '.join(known[:8])}")
    return known


def tfds_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `(place, row)` of a data set that TensorFlow Datasets has prepared.

    Args:
      name: `tfds://NAME[/CONFIG][:VERSION]`, looked for in $TFDS_DATA_DIR.
      split: such as `train`.

    Raises:
      UserError: it is not known or not prepared, or has no such split.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name.removeprefix(TFDS))
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits) or "none: prepare it first (tfds build)"
            raise UserError(f"{name}: has no split '{split}'; it has {known}")
        rows = builder.as_data_source(split=split)
    except (tfds.core.registered.DatasetNotFoundError, NotImplementedError) as error:
        text = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: {text}; prepare it with `tfds build --file_format=array_record`"
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", plain(row, builder.info.features)


def plain(value: Any, feature: Any) -> Any:
    """A value of TensorFlow Datasets in plain Python; a sequence of objects as a list of them."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, Mapping) and hasattr(inner, "items"):
        columns = {key: [plain(v, inner[key]) for v in column] for key, column in value.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, Mapping):
        return {key: plain(item, feature[key]) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(item, inner) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
