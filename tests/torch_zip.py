"""A writer of `torch.save`'s zip format that needs no torch: its pickle is spelt out here."""

import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def group(*parts):
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    return function + group(*arguments) + b"R"


def tensor(key, storage, offset, shape, stride, count):
    """A view of the storage in the member `data/KEY`."""
    held = group(text("storage"), name("torch", storage), text(key), text("cpu"), number(count))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        *(held + b"Q", number(offset), group(*map(number, shape)), group(*map(number, stride))),
        *(b"\x89", call(name("collections", "OrderedDict"))),
    )


def young_tensor(key, kind, shape, stride, size):
    """A tensor of a kind that has no storage of its own: one of bytes, and the kind's name."""
    untyped = name("torch.storage", "UntypedStorage")
    held = group(text("storage"), untyped, text(key), text("cpu"), number(size))
    return call(
        name("torch._utils", "_rebuild_tensor_v3"),
        *(held + b"Q", number(0), group(*map(number, shape)), group(*map(number, stride))),
        *(b"\x89", call(name("collections", "OrderedDict")), name("torch", kind)),
    )


def pickled(items):
    """The pickle of a dictionary `{name: pickled value}`."""
    return b"\x80\x02}" + b"".join(text(k) + v + b"s" for k, v in items.items()) + b"."


def write(path, pickle, storages, *, order=b"little", root="archive", method=zipfile.ZIP_STORED):
    """The archive of a pickle and `{key: bytes}`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        archive.writestr(f"{root}/byteorder", order)
        for key, content in storages.items():
            archive.writestr(f"{root}/data/{key}", content)
    return path


def save(path, arrays, **options):
    """A file of contiguous arrays by name, as torch writes one."""
    items, storages = {}, {}
    for key, (title, x) in enumerate(arrays.items()):
        stride = [n // x.itemsize for n in x.strides]
        if x.dtype in STORAGES:
            items[title] = tensor(str(key), STORAGES[x.dtype], 0, x.shape, stride, x.size)
        else:
            items[title] = young_tensor(str(key), str(x.dtype), x.shape, stride, x.nbytes)
        storages[str(key)] = x.tobytes()
    return write(path, pickled(items), storages, **options)
