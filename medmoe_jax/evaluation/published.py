"""The datasets of lm-evaluation-harness's tasks from a folder, in the place of the hub.

What a task asks of the hub as OWNER/NAME lies in `FOLDER/OWNER/NAME`, as a clone from there has it;
of a set with several configurations, each in a folder of its name. A split is the files whose names
begin with its name: `test.jsonl`, `test-00000-of-00002.parquet`. Prompts and metrics stay those of
the task.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from medmoe_jax.errors import UserError
from medmoe_jax.storage.places import is_hidden

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@contextlib.contextmanager
def from_folder(root: Path) -> Generator[None]:
    """Tasks that are opened in here read their datasets from `root`, and never from the hub.

    Those that name files of their own, or make their items themselves, do so as ever. A task
    raises UserError where its dataset, or a split that it names, is not there.
    """
    from_hub = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict | None = None, **more: Any) -> None:
        own = {"data_files", "data_dir"} & set(dataset_kwargs or ())
        if own or callable(task.config.custom_dataset) or Path(str(task.DATASET_PATH)).exists():
            from_hub(task, dataset_kwargs, **more)
        else:
            task.dataset = _read(root, task)

    # The method that lm-evaluation-harness has for other sources. A subclass would have to be named
    # in every task's file.
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = from_hub


def _read(root: Path, task: ConfigurableTask) -> datasets.DatasetDict:
    name, place = task.DATASET_PATH, root / str(task.DATASET_PATH)
    whose = f"{task.config.task} reads {name}"
    if not place.is_dir():
        command = ["hf", "download", name, "--repo-type=dataset", f"--local-dir={place}"]
        raise UserError(
            f"{whose}: no folder {place}; where there is a network, get it by "
            f"`{shlex.join(command)}`"
        )
    if task.DATASET_NAME and (place / task.DATASET_NAME).is_dir():
        place = place / task.DATASET_NAME
    files = {split: _files(place, split) for split in _asked(task)}
    for split, paths in files.items():
        if not paths:
            raise UserError(
                f"{whose}: no file of its split '{split}' in {place}, such as {split}.jsonl; "
                f"{', '.join(_READERS)} are read"
            )
    kinds = {_READERS[path.suffix] for paths in files.values() for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{whose}: {place} has {' and '.join(sorted(kinds))} files; leave one kind")
    named = {split: list(map(str, paths)) for split, paths in files.items()}
    return datasets.load_dataset(kinds.pop(), data_files=named)


def _files(place: Path, split: str) -> list[Path]:
    found = (p for p in place.rglob("*") if p.suffix in _READERS and p.is_file())
    found = (path for path in found if not is_hidden(path.relative_to(place)))
    return sorted(path for path in found if re.split("[-.]", path.name)[0] == split)


def _asked(task: ConfigurableTask) -> list[str]:
    """The splits that a task reads: that of its items, and that of its examples."""
    config = task.config
    items = config.test_split or config.validation_split
    examples = task.fewshot_cfg.split or config.training_split or config.validation_split
    return [split for split in (items, examples) if split]
