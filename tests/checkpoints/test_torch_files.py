"""`torch.save` files: views and dtypes to the bit, and nothing that could be run."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from medmoe_jax.checkpoints.torch_files import open_torch, save_torch
from medmoe_jax.errors import UserError
from tests import torch_zip

RNG = np.random.default_rng(0)
DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
          ml_dtypes.float8_e5m2)  # fmt: skip


def read(path):
    with open_torch(path) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.mark.parametrize("root", ["archive", "non_lora_trainables"])
def test_values_and_dtypes(tmp_path, root):
    arrays = {
        f"{dtype.__name__}.{len(shape)}": RNG.normal(size=shape).astype(dtype)
        for dtype in DTYPES
        for shape in ((3, 5), (4,), (2, 3, 4), (), (0, 3))
    }
    path = torch_zip.save(tmp_path / "x.bin", arrays, root=root)
    with open_torch(path) as tensors:
        assert {k: t.shape for k, t in tensors.items()} == {k: x.shape for k, x in arrays.items()}
    got = read(path)
    assert list(got) == list(arrays)
    for name, x in arrays.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x)


def test_views_of_one_storage(tmp_path):
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    views = {"whole": (0, (4, 6), (6, 1)), "turned": (0, (6, 4), (1, 6)),
             "rows": (6, (2, 6), (6, 1)), "part": (8, (2, 2), (6, 2)),
             "repeated": (3, (5,), (0,))}  # fmt: skip
    items = {k: torch_zip.tensor("7", "FloatStorage", *v, x.size) for k, v in views.items()}
    got = read(torch_zip.write(tmp_path / "x.bin", torch_zip.pickled(items), {"7": x.tobytes()}))
    wants = {"whole": x, "turned": x.T, "rows": x[1:3], "part": x[1:3, 2:6:2],
             "repeated": np.repeat(x[0, 3], 5)}  # fmt: skip
    for name, want in wants.items():
        np.testing.assert_array_equal(got[name], want)


class Harmful:
    """What unpickling must not run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    "pickle_, words",
    [
        (pickle.dumps({"a": Harmful()}, 2), "names '__builtin__.exec'"),
        (pickle.dumps({"a": Harmful()}, 4), "names 'builtins.exec'"),
        (torch_zip.pickled({"a": torch_zip.name("torch", "load")}), "names 'torch.load'"),
        (torch_zip.pickled({"a": torch_zip.name("collections", "deque")}), "'collections.deque'"),
        (
            torch_zip.pickled({"a": torch_zip.tensor("0", "LongStorage", 0, (1,), (1,), 1)}),
            "names 'torch.LongStorage'",
        ),
        (pickle.dumps({"a": 3}, 2), "something else than tensors"),
        (pickle.dumps([1.0], 2), "something else than tensors"),
        (torch_zip.pickled({"a": torch_zip.name("torch", "FloatStorage")}), "something else"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02" + b"(" * 9 + b"R.", "damaged"),
        (torch_zip.pickled({"a": torch_zip.tensor("0", "FloatStorage", -4, (1,), (1,), 1)}),
         "impossible view"),
        (torch_zip.pickled({"a": torch_zip.tensor("0", "FloatStorage", 0, (1,), (1, 1), 1)}),
         "impossible view"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, pickle_, words):
    path = torch_zip.write(tmp_path / "x.bin", pickle_, {"0": bytes(8)})
    with pytest.raises(UserError, match=r"x\.bin: ") as caught:
        read(path)
    assert words in str(caught.value)


def test_damaged_archives(tmp_path):
    path = torch_zip.save(tmp_path / "x.bin", {"a": np.arange(6, dtype=np.float32)})
    content = path.read_bytes()
    cases = {"half": content[: len(content) // 2], "empty": b"", "legacy": pickle.dumps({}, 2)}
    middle = content.index(np.arange(6, dtype=np.float32).tobytes())
    cases["flipped"] = content[:middle] + b"\xff" + content[middle + 1 :]
    for name, changed in cases.items():
        path.write_bytes(changed)
        with pytest.raises(
            UserError, match=r"x\.bin: not a whole torch zip file: truncated or damaged"
        ):
            read(path)
            pytest.fail(name)
    short = torch_zip.pickled({"a": torch_zip.tensor("0", "FloatStorage", 1, (2,), (1,), 3)})
    for pickle_, storages, words in (
        (short, {"0": bytes(8)}, "too short for a view"),
        (short, {}, "archive/data/0"),
        (short, {"0": bytes(7)}, "multiple of element size"),
    ):
        torch_zip.write(path, pickle_, storages)
        with pytest.raises(UserError, match=r"x\.bin: ") as caught:
            read(path)
        assert words in str(caught.value)
    for options, words in (
        ({"order": b"big"}, "little-endian"),
        ({"method": zipfile.ZIP_DEFLATED}, "compressed"),
    ):
        torch_zip.save(path, {"a": np.zeros(4, np.float32)}, **options)
        with pytest.raises(UserError, match=words):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.bin")


WRITTEN = {
    f"{dtype.__name__}.{len(shape)}": RNG.normal(size=shape).astype(dtype)
    for dtype in DTYPES[:4]
    for shape in ((3, 5), (), (0, 3))
}


def test_what_is_written_is_read_back(tmp_path):
    save_torch(tmp_path / "x.bin", WRITTEN)
    got = read(tmp_path / "x.bin")
    assert list(got) == list(WRITTEN)
    for name, x in WRITTEN.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x)
    with pytest.raises(UserError, match="bad: NaN or infinity"):
        save_torch(tmp_path / "bad.bin", {"bad": np.float32([np.inf])})
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parity
def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    save_torch(tmp_path / "x.bin", WRITTEN)
    got = torch.load(tmp_path / "x.bin", weights_only=True)
    assert list(got) == list(WRITTEN)
    for name, x in WRITTEN.items():
        assert str(got[name].dtype) == f"torch.{x.dtype}" and got[name].shape == x.shape
        np.testing.assert_array_equal(got[name].double().numpy(), x.astype(np.float64))


@pytest.mark.parity
def test_files_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    tensors = {"a": x.bfloat16(), "b": x.T, "c": x[1:4, ::2].half(), "d": x[2:, 1:3],
               "e": torch.tensor(2.5), "f": torch.zeros(0, 3)}  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    for content in (tensors, {}, module.state_dict()):
        torch.save(content, tmp_path / "x.bin")
        got = read(tmp_path / "x.bin")
        assert list(got) == list(content)
        for name, want in content.items():
            assert str(got[name].dtype) == str(want.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(got[name].astype(np.float32), want.float().numpy())
