"""Tensors of a `torch.save` file, read and written without torch.

Such a file is a zip archive: `*/data.pkl` pickles a dictionary of tensors, each of which names a
member `*/data/KEY` with its numbers. Nothing in the file is executed: its pickle may name a
dictionary, a strided tensor and the kinds of numbers below, and anything else is refused.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
import numpy as np

from medmoe_jax.checkpoints.files import check_exportable
from medmoe_jax.errors import UserError, within
from medmoe_jax.storage.packed import damage_named, open_zip

# Names, not numpy's own objects: what stands in for them can be changed by nothing in a pickle.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
# Younger kinds have no storage of their own: the tensor names its kind beside one of plain bytes.
_KINDS = ("float8_e4m3fn", "float8_e5m2")
_BYTES = "bytes"
_FILE = "torch zip file"
_ROOT = "archive"
_PICKLE_ERRORS = (
    *(pickle.UnpicklingError, AttributeError, ImportError, IndexError, AssertionError, TypeError),
    *(MemoryError, RecursionError),
)
_FREE = 1 << 24  # numbers that a view may have, however few its storage has


class TorchTensor(NamedTuple):
    """A tensor that lies in an open file: its shape, and what reads it (a numpy array)."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def open_torch(path: str | Path) -> Generator[dict[str, TorchTensor]]:
    """The tensors of a file of float tensors, by name; none is read yet.

    Their kinds are float64, float32, float16, bfloat16, float8_e4m3fn and float8_e5m2.

    Raises:
      UserError: the file is truncated, damaged or of an older format, or holds anything but a
        dictionary of such tensors. Reading a tensor raises it too.
    """
    path = Path(path)
    with open_zip(path, _FILE) as archive:
        with _says_where(path), _pickle_errors():
            root = _root(archive)
            with archive.open(f"{root}/data.pkl") as file:
                content = _Unpickler(file).load()
            wrong = not isinstance(content, dict) or [
                key
                for key, value in content.items()
                if not isinstance(key, str) or not isinstance(value, _Strided)
            ]
            if wrong:
                raise ValueError("it holds something else than tensors by name")
        yield {
            name: TorchTensor(tensor.shape, functools.partial(_read, path, archive, root, tensor))
            for name, tensor in content.items()
        }


@contextlib.contextmanager
def _says_where(path: Path) -> Generator[None]:
    with damage_named(path.name, _FILE), within(f"{path.name}: "):
        yield


@contextlib.contextmanager
def _pickle_errors() -> Generator[None]:
    try:
        yield
    except _PICKLE_ERRORS as error:
        raise ValueError(str(error)) from error


def save_torch(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write contiguous arrays as a file that `torch.load` reads, durably.

    Args:
      path: of the file; what stands there is replaced.
      arrays: by name, of float64, float32, float16 or bfloat16.

    Raises:
      OSError: the disk is full or the folder cannot be written.
      UserError: an array holds NaN or infinity; nothing was written.
    """
    check_exportable(arrays)
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(
        {name: _Saved(str(key), x) for key, (name, x) in enumerate(arrays.items())}
    )
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{_ROOT}/data.pkl", content.getvalue())
            archive.writestr(f"{_ROOT}/byteorder", "little")
            archive.writestr(f"{_ROOT}/version", "3\n")
            for key, x in enumerate(arrays.values()):
                little = x.astype(x.dtype.newbyteorder("<"), copy=False)
                archive.writestr(f"{_ROOT}/data/{key}", little.tobytes())
        file.flush()
        os.fsync(file.fileno())


class _Named(NamedTuple):
    """Something of torch or the standard library, of which a pickle holds the name alone."""

    module: str
    name: str

    def __call__(self) -> None:
        """Never called: the pickler asks that what makes a tensor could be."""


class _Saved(NamedTuple):
    """An array, as the tensor of a file with its numbers in a member."""

    key: str
    x: np.ndarray

    def __reduce__(self) -> tuple:
        (storage,) = (name for name, kind in _STORAGES.items() if kind == self.x.dtype.name)
        stride = tuple(step // self.x.itemsize for step in self.x.strides)
        held = _Held(("storage", _Named("torch", storage), self.key, "cpu", self.x.size))
        made = (held, 0, self.x.shape, stride, False, OrderedDict())
        return _Named("torch._utils", "_rebuild_tensor_v2"), made


class _Held(NamedTuple):
    """A storage: what a pickle says of it."""

    told: tuple


class _Pickler(pickle._Pickler):
    """Writes names of torch without importing it, which the pickler in C would do."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    write: Callable[[bytes], None]  # it makes this itself

    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.told if isinstance(obj, _Held) else None

    def _name(self, obj: _Named) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    dispatch[_Named] = _name


class _Strided(NamedTuple):
    """A view of a storage: element `i, j, …` is number `offset + i·stride_0 + j·stride_1 + …`."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle._Unpickler):
    """Knows the names that a dictionary of tensors needs, and no other.

    It is the one in Python: the one in C makes a list as long as any number in a file asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._strided
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return self._strided_bytes
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._data
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _BYTES
        if module == "torch" and (name in _STORAGES or name in _KINDS):
            return _STORAGES.get(name, name)
        raise UserError(
            f"it names '{module}.{name}', which adapter weights have no use for; nothing was run. "
            "Save the tensors anew as a dictionary of float tensors"
        )

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, _, _ = pid
        known = (*_STORAGES.values(), _BYTES)
        if kind != "storage" or dtype not in known or not isinstance(key, str):
            raise ValueError(f"unknown storage {pid!r}")
        return key, dtype

    def _strided(self, storage, offset, shape, stride, *_) -> _Strided:
        key, dtype = storage
        if dtype == _BYTES:
            raise ValueError(f"storage {key} does not say what its numbers are")
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"impossible view {shape} of storage {key}")
        return _Strided(key, dtype, offset, tuple(shape), tuple(stride))

    def _strided_bytes(self, storage, offset, shape, stride, grad, hooks, dtype, *_) -> _Strided:
        if storage[1] != _BYTES or dtype not in _KINDS:
            raise ValueError(f"unknown kind {dtype!r} of storage {storage[0]}")
        return self._strided((storage[0], dtype), offset, shape, stride)

    def _data(self, data, *_) -> _Strided:
        if not isinstance(data, _Strided):
            raise ValueError("a parameter without a tensor")
        return data


def _root(archive: zipfile.ZipFile) -> str:
    """The folder inside the archive that holds everything."""
    members = archive.infolist()
    roots = [m.filename.removesuffix("/data.pkl") for m in members if "/data.pkl" in m.filename]
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} times data.pkl in it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed")
    root = roots[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are not little-endian")
    return root


def _read(path: Path, archive: zipfile.ZipFile, root: str, tensor: _Strided) -> np.ndarray:
    with _says_where(path):
        flat = np.frombuffer(archive.read(f"{root}/data/{tensor.key}"), np.dtype(tensor.dtype))
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        if 0 in tensor.shape:
            return np.empty(tensor.shape, flat.dtype)
        if tensor.offset + last >= len(flat) or math.prod(tensor.shape) > max(len(flat), _FREE):
            raise ValueError(f"storage {tensor.key} is too short for a view {tensor.shape}")
        steps = [step * flat.itemsize for step in tensor.stride]
        # The library's views know plain numbers only.
        plain = flat[tensor.offset :].view(f"u{flat.itemsize}")
        view = np.lib.stride_tricks.as_strided(plain, tensor.shape, steps)
        return view.copy().view(flat.dtype)
