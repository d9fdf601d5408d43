"""Storage that is lost while several processes wait for each other is found out."""

import errno
import threading
from concurrent import futures

import jax.numpy as jnp
import pytest

from medmoe_jax.checkpoints import stages, waiting
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.parallel import processes


@pytest.fixture
def two(monkeypatch):
    """Two processes, as far as waiting knows, which looks at the storage at once."""
    monkeypatch.setattr(waiting.processes, "count", lambda: 2)
    monkeypatch.setattr(waiting, "_EVERY", 0.01)


@pytest.fixture
def full(monkeypatch):
    """A disk that takes no file."""

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(waiting.os, "fsync", write)


def test_a_work_that_ends_is_what_it_was_and_leaves_nothing(two, tmp_path):
    held = threading.Timer(0.05, lambda: None)
    held.start()
    assert waiting.done(held.join, tmp_path) is None
    with pytest.raises(ZeroDivisionError):
        waiting.done(lambda: 1 // 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_work_that_never_ends_is_left_when_the_disk_is_full(two, full, tmp_path):
    ended = threading.Event()
    with pytest.raises(waiting.StorageLost, match=f"No space left on device.*{tmp_path}") as caught:
        waiting.done(ended.wait, tmp_path)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    ended.set()


def test_a_folder_that_is_gone_is_found_out(two, tmp_path):
    ended = threading.Event()
    with pytest.raises(waiting.StorageLost, match="No such file"):
        waiting.done(ended.wait, tmp_path / "gone")
    ended.set()


def test_one_process_waits_for_its_work_alone(full, monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "_EVERY", 0.01)
    assert processes.count() == 1
    held = threading.Timer(0.05, lambda: None)
    held.start()
    waiting.done(held.join, tmp_path)


@pytest.mark.parametrize("copied", [True, False], ids=["written", "begun"])
def test_a_save_whose_storage_is_lost_is_given_up(two, full, monkeypatch, tmp_path, copied):
    never = futures.Future()

    class Stuck:
        """Orbax, as it waits for another process: before or after the copy to the host."""

        def save_checkpointables_async(self, *_, **__):
            return never if copied else never.result()

        def close(self):
            never.result()

    with (
        pytest.raises(stages.WriteError, match=r"step 4 .*No space left on device.*steps \[\]"),
        stages.StageCheckpoints(StageFolder(tmp_path)) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints, "_orbax", Stuck())
        checkpoints.save(4, {"a": jnp.zeros(3)}, {})
        checkpoints.wait()
    never.set_exception(OSError("the end of this test"))
