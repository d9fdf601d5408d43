"""Storage that is full or fails is told apart from bad input, wherever something is written."""

import errno
import json
import os
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints import files, lease
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.gguf_export import save_gguf_adapter
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.stages import StageCheckpoints
from medmoe_jax.data import builder, gguf_tokenizer, tokenizers
from medmoe_jax.data.rows import parse_row
from medmoe_jax.errors import StorageError, UserError, bad_or_lost, is_storage
from medmoe_jax.evaluation import records
from medmoe_jax.evaluation.html import LinesSection, report_html, save_png
from medmoe_jax.evaluation.report import Report
from medmoe_jax.storage import partials
from medmoe_jax.training.hooks.faults import keep_batch
from medmoe_jax.training.hooks.protocol import Progress
from medmoe_jax.training.hooks.writers import TensorBoard
from tests import naive
from tests.full_disk import failing, room_for

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def export(folder):
    with files.new_folder(folder / "out") as write:
        write(lambda there: files.write_json(there / "config.json", {}))
        write(lambda there: files.save_tensors(there / "x.safetensors", {"a": np.ones(3)}))


def metrics(folder):
    with files.MetricsLog(folder / "s" / "metrics.jsonl") as log:
        log.write(1, {"loss": 1.0})


def checkpoint(folder):
    with StageCheckpoints(StageFolder(folder / "stage")) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, {})


def tensorboard(folder):
    hook = TensorBoard(folder / "tensorboard", 1)
    progress = Progress("learn", 1, 1, None)
    hook.on_start(progress)
    hook.on_end(progress)


def vocabulary(folder):
    tokenizers.train(["ab cd ef gh"] * 50, 274, folder / "t" / "t.model")


def build(folder):
    builder.build([parse_row({"prompt": "Q", "response": "A"})], folder / "data", "demo")


def gguf_adapter(folder):
    spec = BankSpec("b", ("mlp.up", "mlp.down"), 0, 3, rank=2)
    banks = naive.random_banks((spec,), naive.TINY)
    save_gguf_adapter(folder / "g", naive.TINY, "llama", [(spec, banks["b"])])


LINES = LinesSection("t", [("a", [1, 2], [0.5, 0.1])])
MANIFEST = Manifest("a", "", "f", "b", "", [], {}, 1, {}, {})
WRITERS = {
    "a text": lambda folder: files.write_text(folder / "sub" / "a.txt", "x"),
    "a manifest": lambda folder: MANIFEST.write(folder / "manifest.json"),
    "metrics": metrics,
    "an export": export,
    "a GGUF file": gguf_adapter,
    "a checkpoint": checkpoint,
    "the lease": lambda folder: lease.take(folder / "w").release(),
    "a report": lambda folder: Report([]).save(folder / "r" / "report.json"),
    "records": lambda folder: records.write(folder / "r" / "records.jsonl", [{}]),
    "a page": lambda folder: report_html(folder / "r" / "report.html", [LINES]),
    "a picture": lambda folder: save_png(folder / "r" / "x.png", LINES),
    "a bad batch": lambda folder: keep_batch(folder / "s" / "b.npz", {"tokens": jnp.ones(2)}),
    "a tokenizer": vocabulary,
    "a data set": build,
    "the tokenizer of a GGUF file": lambda folder: gguf_tokenizer._write(
        folder / "c" / "x", {"tokenizer.json": b"{}"}
    ),
    "events for TensorBoard": tensorboard,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_write_that_fails_is_a_fault_of_storage(tmp_path, name):
    """Each write in turn fails; with it, as on a full disk, all that follow."""
    at, done = 1, False
    while not done:
        number, folder = NUMBERS[at % len(NUMBERS)], tmp_path / str(at)
        folder.mkdir()
        try:
            with failing(folder, at, number):
                WRITERS[name](folder)
            done = True
        except (OSError, UserError) as error:
            assert is_storage(error), (at, error)
            assert str(error)
        left = [path for path in folder.rglob("*.partial*") if path.is_file()]
        assert not left, (at, left)
        at += 1
        assert at < 60
    assert at > 2, "nothing was written"


# All but the lease, a folder of empty files.
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "the lease"])
def test_a_write_that_is_cut_is_a_fault_of_storage(tmp_path, name):
    """No file can have more than some bytes: the system takes a part of what is written to it."""
    WRITERS[name](tmp_path)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    for most in {0, largest // 3, largest // 2, largest * 3 // 4, largest - 1}:
        folder = tmp_path / f"cut{most}"
        folder.mkdir()
        with room_for(most), pytest.raises((OSError, UserError)) as error:
            WRITERS[name](folder)
        assert is_storage(error.value), (most, error.value)
        left = [path for path in folder.rglob("*.partial*") if path.is_file()]
        assert not left, (most, left)


def test_a_fault_is_known_by_its_number_or_by_its_text():
    said = "Failed to write 46431 bytes: No space left on device [os_error_code='28']"
    assert is_storage(ValueError(said))
    assert is_storage(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not is_storage(OSError(errno.EACCES, "no")) and not is_storage(UserError("os error"))
    assert isinstance(bad_or_lost("x", OSError(errno.EROFS, "no")), StorageError)
    assert not isinstance(bad_or_lost("x", OSError(errno.EACCES, "no")), StorageError)


def test_a_line_of_metrics_is_whole_or_absent(tmp_path, monkeypatch):
    """A disk that is nearly full takes a part of a line, and the rest may fit later."""
    log = files.MetricsLog(tmp_path / "m.jsonl")
    log.write(1, {"loss": 1.0})

    class Nearly:
        """The file, on a disk with room for five bytes."""

        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, line):
            return self._file.write(line[:5])

    whole = log._file._file
    log._file._file = Nearly(whole)
    with pytest.raises(OSError, match="No space left"):
        log.write(2, {"loss": 2.0})
    log._file._file = whole
    log.write(3, {"loss": 3.0})
    log.close()
    assert [row["step"] for row in files.read_metrics(tmp_path / "m.jsonl")] == [1, 3]


def test_what_dead_processes_left_is_swept(tmp_path):
    """Ours, of processes of this system that are gone; nothing else."""
    path = tmp_path / "out"
    child = subprocess.Popen(["sleep", "60"])
    start = partials.start_of(child.pid)
    mark = partials.partial_of(path).name.split(".")[2].split("-")[0]

    def left(name, process, started, system=mark):
        folder = tmp_path / f".{name}.{system}-{process}-{started}.partial"
        folder.mkdir()
        (folder / "x").write_text("x")
        return folder

    kept = [
        left("out", child.pid, start),
        left("other", 1, 1),
        left("out", 1, 1, system="0" * 8),
        left("out.json", child.pid, start + 1),
    ]
    (tmp_path / ".out.99.partial").mkdir()
    gone = [left("out", child.pid, start + 1), left("out", 2**22 + 1, 5)]
    with files.new_folder(path) as write:
        write(lambda folder: files.write_text(folder / "a", "a"))
    assert (path / "a").read_text() == "a"
    assert all(folder.exists() for folder in kept) and not any(f.exists() for f in gone)
    child.kill()
    child.wait()
    files.write_json(path / "b.json", {})
    with files.new_folder(tmp_path / "out.json") as write:
        write(lambda folder: files.write_text(folder / "a", "a"))
    assert not kept[3].exists()
    assert sorted(p.name for p in path.iterdir()) == ["a", "b.json"]
    assert json.loads((path / "b.json").read_text()) == {} and os.listdir(kept[1]) == ["x"]
