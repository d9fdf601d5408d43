"""A GGUF file: its fields, and tensors whose rows are read and dequantised when asked for.

The file is magic, version, counts, fields, tensor descriptions, padding, numbers, all little-endian
(github.com/ggml-org/ggml, docs/gguf.md). The header is parsed here, since whatever it claims must
be held against the file's size first, and since the `gguf` package's reader needs half a minute for
a vocabulary of 262,144; that package knows the quantised blocks.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from medmoe_jax.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
# Type numbers of fields: numbers, truth values, texts and lists.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMENSIONS = 4
# What can be read, the plain floats with their numpy dtype.
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BLOCKS = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
KINDS = (*_PLAIN, *_BLOCKS)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file: `shape` with rows first, `kind` of `KINDS`, and its bytes by row."""

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes_RxN: np.ndarray

    def rows(self, rows: slice | np.ndarray, columns: slice = slice(None)) -> np.ndarray:
        """Some rows and columns in float32.

        Args:
          rows: a slice or an array of numbers; of a vector's elements.
          columns: of a matrix; only the blocks that hold them are read.
        """
        if len(self.shape) == 1:
            return self._values(self.bytes_RxN)[0][rows]
        first, last, _ = columns.indices(self.shape[1])
        numbers, size = _block(self.kind)
        start, stop = first // numbers, -(-last // numbers)
        values = self._values(self.bytes_RxN[rows, start * size : stop * size])
        return values[:, first - start * numbers : last - start * numbers]

    def _values(self, bytes_RxN: np.ndarray) -> np.ndarray:
        data = np.ascontiguousarray(bytes_RxN)
        if self.kind in _PLAIN:
            return data.view(_PLAIN[self.kind]).astype(np.float32)
        return dequantize(data, GGMLQuantizationType[self.kind])


def _block(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(numbers), int(size)


@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself, and its tensors by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def field(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """A field of that type.

        Raises:
          UserError: it is of another type, or is absent and there is no default.
        """
        value = self.fields.get(name, default)
        if value is ...:
            raise UserError(f"{self.path}: lacks the field {name}")
        wrong = isinstance(value, bool) and kind is not bool
        if name in self.fields and (wrong or not isinstance(value, kind)):
            raise UserError(f"{self.path}: {name}: {str(value)[:80]!r} is not of the type expected")
        return value


def open_gguf(path: str | Path) -> GgufFile:
    """Read the header of a file; of its tensors nothing is read yet.

    Raises:
      UserError: no such file, another format or version, a kind of tensor that is not known, or a
        header that the file's bytes do not bear out.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(f"{path}: not a GGUF file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Header(path, data)
    fields, described = reader.read()
    start = -(-reader.at // reader.alignment) * reader.alignment
    whole = np.frombuffer(data, np.uint8)
    _check_places(path, described, start, len(data))
    tensors = {}
    for one in described:
        rows = math.prod(one.shape[:-1])
        at = start + one.offset
        bytes_RxN = whole[at : at + one.size].reshape(rows, -1)
        tensors[one.name] = GgufTensor(one.name, one.shape, one.kind, bytes_RxN)
    return GgufFile(path, fields, tensors)


@dataclass(frozen=True)
class _Description:
    """A tensor as the header describes it: `offset` from where the numbers begin, in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def size(self) -> int:
        numbers, size = _block(self.kind)
        return math.prod(self.shape) // numbers * size


def _check_places(path: Path, described, start: int, length: int) -> None:
    """Raise UserError for tensors that end beyond the file or share bytes."""
    end, before = start, ""
    for one in sorted(described, key=lambda one: one.offset):
        at = start + one.offset
        if at + one.size > length:
            raise UserError(
                f"{path}: truncated or damaged: tensor {one.name} ends at byte {at + one.size} of "
                f"{length}"
            )
        if at < end:
            raise UserError(f"{path}: damaged: tensors {before} and {one.name} share bytes")
        end, before = at + one.size, one.name


class _Header:
    """Reads a header from byte 4 on; whatever the file does not bear out is a UserError."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.alignment = path, data, len(_MAGIC), 32

    def read(self) -> tuple[dict[str, Any], list[_Description]]:
        """The fields and the tensors' descriptions."""
        version = self._number("I")
        if version not in _VERSIONS:
            raise UserError(f"{self.path}: GGUF version {version} is none of {_VERSIONS}")
        tensors, count = self._count(4 + 4 + 8 + 8), self._count(8 + 4 + 1)
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in fields:
                raise self._damaged(f"field {name} is there twice")
            fields[name] = self._value(self._number("I"))
        if _ALIGNMENT in fields:
            self.alignment = fields[_ALIGNMENT]
            if not isinstance(self.alignment, int) or not 8 <= self.alignment <= 2**16:
                raise self._damaged(f"{_ALIGNMENT} is {self.alignment!r}")
        described = [self._tensor() for _ in range(tensors)]
        twice = [n for n, times in Counter(one.name for one in described).items() if times > 1]
        if twice:
            raise self._damaged(f"tensor {twice[0]} is there twice")
        return fields, described

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: truncated or damaged: {what} (byte {self.at})")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self._damaged(f"{size} bytes are announced, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self, code: str):
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._number("Q")
        if count * least > len(self.data) - self.at:
            raise self._damaged(f"{count} entries are announced, more than the file can hold")
        return count

    def _text(self) -> str:
        try:
            return self._take(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text is not UTF-8 ({error.reason})") from None

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _BOOL:
            return bool(self._number("B"))
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("I"))
        raise self._damaged(f"a field of type {kind}, which is none of 0 to 12")

    def _array(self, kind: int) -> list:
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            count = self._count(struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))
        if kind == _BOOL:
            return [bool(one) for one in self._take(self._count(1))]
        if kind == _STRING:
            return [self._text() for _ in range(self._count(8))]
        raise self._damaged(f"a list of type {kind}, which is none of those that lists can have")

    def _tensor(self) -> _Description:
        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number = self._number("I")
        kind = next((k.name for k in GGMLQuantizationType if k.value == number), str(number))
        offset = self._number("Q")
        if kind not in KINDS:
            raise UserError(
                f"{self.path}: tensor {name} is of kind {kind}, which is none of {', '.join(KINDS)}"
            )
        numbers, _ = _block(kind)
        if min(shape) < 1 or shape[-1] % numbers or offset % self.alignment:
            raise self._damaged(f"tensor {name} of kind {kind}: shape {shape}, offset {offset}")
        return _Description(name, shape, kind, offset)
