"""The safetensors files of a model's folder, and whether they hold what a plan asks for."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from medmoe_jax.checkpoints.families import Part, Tensor
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import fits
from medmoe_jax.storage.plain import check_name, check_plain

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Those that the library's numpy side has no name for are mapped from the file by hand.
_BYTE_FLOATS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # a table that old releases saved


def listed(folder: Path) -> tuple[dict[str, str], list[str]]:
    """`(tensor to file as the index says, files)`; without an index only the files.

    A `model.safetensors` comes before an index that does not name it, as in transformers.

    Raises:
      UserError: there is no such file, or it cannot be said which files belong together.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not fits(weight_map, dict[str, str]) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no 'weight_map'")
        for name in set(weight_map.values()):
            check_name(name, folder / INDEX)
        if SINGLE not in files or SINGLE in weight_map.values():
            return weight_map, sorted(set(weight_map.values()))
    if SINGLE in files or len(files) == 1:
        return {}, [SINGLE] if SINGLE in files else files
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files but no {INDEX}")
    raise UserError(f"{folder}: no safetensors file (other formats must be converted first)")


class StoredTensor:
    """A tensor in an open file: its `shape`, its `dtype` as the format calls it, and its rows."""

    def __init__(self, file: Any, path: Path, name: str) -> None:
        view = file.get_slice(name)
        self.shape, self.dtype = tuple(view.get_shape()), view.get_dtype()
        self._view, self._path, self._name = view, path, name

    def rows(self, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Rows and columns `index` of one part of the tensor."""
        rows = slice(*index[0].indices(part.stop - part.start))
        rows = slice(part.start + rows.start, part.start + rows.stop)
        return self[(rows, *index[1:])]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    def read(self) -> np.ndarray:
        """All of it."""
        return self[(slice(None),) * len(self.shape)] if self.shape else self._view[...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.dtype in _BYTE_FLOATS:
            return self._mapped()[index]
        return self._view[index]

    def _mapped(self) -> np.ndarray:
        """The tensor in a file that `safe_open` has checked: header size, JSON header, numbers."""
        with open(self._path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            start, _ = json.loads(file.read(size))[self._name]["data_offsets"]
        flat = np.memmap(self._path, np.uint8, "r", 8 + size + start, (math.prod(self.shape),))
        return flat.view(_BYTE_FLOATS[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class OpenedFiles:
    """The files of a folder, as far as they can be opened.

    Attributes:
      folder: where they lie.
      tensors: by name.
      lost: file to what is wrong with it.
      weight_map: see `listed`.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    lost: Mapping[str, str]
    weight_map: Mapping[str, str]

    def check(
        self, plan: Sequence[Tensor], tied: tuple[str, str] | None = None, beside: str = ""
    ) -> None:
        """Compare the files with a plan.

        Args:
          plan: the tensors that must be there; no other may.
          tied: names of head and embedding where these are one, but the head may be there too.
          beside: regular expression on the names of others that may be there.

        Raises:
          UserError: files or tensors are missing, damaged, unknown or of another shape: all of
            them.
        """
        problems = [f"{name}: {what}" for name, what in self.lost.items()]
        for tensor in plan:
            problems += self._problems_of(tensor)
        for name in sorted(set(self.tensors) - {tensor.name for tensor in plan}):
            if tied and name == tied[0] and tied[1] in self.tensors:
                head, embedding = (self.tensors[one].read() for one in tied)
                if not np.array_equal(head, embedding):
                    problems.append(
                        f"{name}: differs from {tied[1]}, but tie_word_embeddings is true"
                    )
            elif not (_IGNORED.search(name) or (beside and re.search(beside, name))):
                problems.append(f"{name}: unknown to this architecture")
        if problems:
            head = f"{self.folder}: {len(problems)} problems\n  "
            raise UserError(head + "\n  ".join(problems))

    def _problems_of(self, tensor: Tensor) -> list[str]:
        stored, problems = self.tensors.get(tensor.name), []
        if stored is None:
            # One whose file cannot be read is told of by its file.
            known = self.weight_map.get(tensor.name) in self.lost if self.weight_map else self.lost
            return [] if known else [f"{tensor.name}: missing"]
        if stored.shape != tensor.shape:
            problems.append(
                f"{tensor.name}: shape {stored.shape}, config.json asks for {tensor.shape}"
            )
        if stored.dtype not in _BYTES:
            problems.append(f"{tensor.name}: dtype {stored.dtype} is none of {', '.join(_BYTES)}")
        return problems


@contextlib.contextmanager
def open_safetensors(path: Path) -> Generator[dict[str, StoredTensor]]:
    """The tensors of one file, by name; none is read yet.

    Raises:
      UserError: the file is truncated or damaged, or holds numbers that are no floats.
    """
    check_plain(path)
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: StoredTensor(file, path, name) for name in file.keys()}  # noqa: SIM118
            for name, tensor in tensors.items():
                if tensor.dtype not in _BYTES:
                    raise UserError(
                        f"{path.name}: {name}: dtype {tensor.dtype} is none of {', '.join(_BYTES)}"
                    )
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{path.name}: truncated or damaged ({error})") from None


def open_files(folder: Path, stack: contextlib.ExitStack) -> OpenedFiles:
    """Open every safetensors file of a model's folder; `stack` closes them.

    Raises:
      UserError: see `listed`.
    """
    weight_map, names = listed(folder)
    lost, tensors = {}, {}
    for name in names:
        try:
            check_plain(folder / name)
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except FileNotFoundError:
            lost[name] = "missing"
        except SafetensorError as error:
            lost[name] = f"truncated or damaged ({error})"
        else:
            tensors |= {key: StoredTensor(file, folder / name, key) for key in file.keys()}  # noqa: SIM118
    return OpenedFiles(folder, tensors, lost, weight_map)
