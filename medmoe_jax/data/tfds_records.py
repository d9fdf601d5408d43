"""Conversations as records that TensorFlow Datasets writes and reads.

Apart from `data.builder`, which needs it only where a data set is built or opened.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from medmoe_jax.data.conversation import Conversation
from medmoe_jax.errors import STORAGE_LOST


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    def __init__(
        self, name: str, version: str, split: str, rows: Iterable[Conversation], data_dir: str
    ):
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._split, self._rows = split, rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations for supervised training.",
            features=tfds.features.FeaturesDict({"conversation": text(), "language": text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for number, row in enumerate(self._rows):
            tools = row.get("tools")
            talk = {**row, "language": ""} if tools else row["conversations"]
            text = json.dumps(talk, ensure_ascii=False)
            yield number, {"conversation": text, "language": row["language"]}


def write(rows: Iterable[Conversation], folder: Path, name: str, version: str, split: str) -> Path:
    """Writes rows as a data set into the folder; returns where it lies in there.

    Raises:
      OSError: the disk is full or failed.
    """
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder = _Builder(name, version, split, rows, str(folder))
        try:
            builder.download_and_prepare()
        except RuntimeError as error:
            # The writer, in C++, says what failed in the system's words alone.
            for number in STORAGE_LOST:
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number)) from error
            raise
    return Path(builder.data_dir)


def read(folder: str | Path, split: str) -> Any:
    """The records of a data set's folder, by number."""
    return tfds.builder_from_directory(folder).as_data_source(split=split)
