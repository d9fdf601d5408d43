"""One writer in a folder: however many start at once, and whatever the one before has left."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from medmoe_jax.checkpoints import lease as lib
from medmoe_jax.checkpoints.lease import LeaseError, only_writer, take
from medmoe_jax.errors import StorageError, UserError


class Clock:
    """A clock that only `sleep` moves; `meanwhile` happens in every sleep."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 1000.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


def leases(folder):
    """The names in the folder of leases."""
    place = folder / "lease"
    return sorted(os.listdir(place)) if place.exists() else []


def left(folder, number=1, text=None, **fields):
    """A lease whose holder ended without a word; by default one of another machine."""
    path = folder / "lease" / f"{number}.json"
    path.parent.mkdir(exist_ok=True)
    holder = lib._own()._replace(**{"host": "far", "system": "another", "token": "theirs"} | fields)
    path.write_text(json.dumps(holder._asdict()) if text is None else text)
    os.utime(path, ns=(1, 1))
    return path


def beaten(path):
    """For a clock: the holder gives signs of life."""
    return lambda: os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


# Each round: the one that is dead is taken over, four start at once, and one gets the folder. It
# keeps it until the others were refused, and is killed then, or gives it back, in turn.
CONTEND = """
import json, multiprocessing, os, signal, sys
from medmoe_jax.checkpoints import lease
from medmoe_jax.checkpoints.lease import LeaseError, only_writer
lease._LOOK = 0.01
fork, folder, rounds, count = multiprocessing.get_context("fork"), sys.argv[1], 20, 4

def start(number, started, refused, told):
    started.wait()
    try:
        with only_writer(folder):
            told.put("held")
            for _ in range(count - 1):
                refused.acquire()
            if number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
    except LeaseError as error:
        told.put(str(error))
        refused.release()

for number in range(rounds):
    started, refused, told = fork.Barrier(count), fork.Semaphore(0), fork.SimpleQueue()
    arguments = (number, started, refused, told)
    running = [fork.Process(target=start, args=arguments) for _ in range(count)]
    for process in running:
        process.start()
    words = [told.get() for _ in running]
    for process in running:
        process.join()
    print(json.dumps([words, [process.exitcode for process in running]]))
"""


def test_of_many_that_start_at_once_one_writes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", CONTEND, str(tmp_path / "w")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    rounds = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rounds) == 20
    for number, (words, codes) in enumerate(rounds):
        assert words.count("held") == 1
        refused = [word for word in words if word != "held"]
        assert len(refused) == 3 and all("writes into" in word for word in refused)
        assert sorted(codes) == ([-signal.SIGKILL, 0, 0, 0] if number % 2 else [0, 0, 0, 0])


def test_a_second_start_is_told_who_writes(tmp_path):
    with only_writer(tmp_path) as check:
        with pytest.raises(LeaseError) as caught:
            take(tmp_path)
        check()
        written = json.loads((tmp_path / "lease" / "1.json").read_text())
        said = f"process {os.getpid()} on {os.uname().nodename} writes into {tmp_path} since 20"
        assert said in str(caught.value) and "last sign of life 20" in str(caught.value)
        assert "use another work directory" in str(caught.value)
        assert written["process"] == os.getpid() and written["process_start"] > 0
    assert not leases(tmp_path) and tmp_path.exists()


def test_it_is_given_back_however_the_block_ends(tmp_path):
    for error in (KeyboardInterrupt, UserError, StorageError):
        with pytest.raises(error), only_writer(tmp_path / "new"):
            raise error
        assert not (tmp_path / "new").exists()  # as nothing was written into it
    with only_writer(tmp_path / "new"):
        (tmp_path / "new" / "a").touch()
    assert os.listdir(tmp_path / "new") == ["a"]


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    """Gone, killed but not yet waited for, or its number another process's by now."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        here = {"system": lib.system(), "process": child.pid}
        start = lib.start_of(child.pid)
        left(tmp_path, **here, process_start=start)
        with pytest.raises(LeaseError, match=f"process {child.pid} on far"):
            take(tmp_path, sleep=pytest.fail)
        left(tmp_path, **here, process_start=start - 1)
        take(tmp_path, sleep=pytest.fail).release()
        left(tmp_path, **here, process_start=start)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
        take(tmp_path, sleep=pytest.fail).release()
    left(tmp_path, **here, process_start=start)
    held = take(tmp_path, sleep=pytest.fail)
    assert leases(tmp_path) == ["2.json"]
    held.release()
    assert not leases(tmp_path)


def test_a_process_of_someone_else_lives_though_proc_hides_it(tmp_path, monkeypatch):
    def forbidden(process, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    monkeypatch.setattr(lib, "start_of", lambda process: None)
    left(tmp_path, system=lib.system(), process=77)
    with pytest.raises(LeaseError, match="process 77"):
        take(tmp_path, sleep=pytest.fail)


@pytest.mark.parametrize("fields", [{}, {"host": os.uname().nodename}, {"system": ""}])
def test_a_holder_elsewhere_is_judged_by_its_heartbeat(tmp_path, fields, caplog):
    """Whatever the clocks say; a machine of the same name may be another one."""
    path = left(tmp_path, **fields)
    clock = Clock(beaten(path))
    with pytest.raises(LeaseError, match="wait for its end"):
        take(tmp_path, clock, clock.sleep)
    assert clock.now < 1000 + 2 * lib._LOOK
    clock = Clock()
    os.utime(path, (2e9, 2e9))  # from the future: it stands still all the same
    take(tmp_path, clock, clock.sleep)
    assert lib._DEAD < clock.now - 1000 < lib._DEAD + 3 * lib._LOOK
    assert leases(tmp_path) == ["2.json"]
    assert caplog.text.count("is waited for, 120 s at most") == 1


def test_a_holder_elsewhere_that_gives_it_back_is_followed_at_once(tmp_path):
    path = left(tmp_path)
    clock = Clock(lambda: path.unlink(missing_ok=True))
    take(tmp_path, clock, clock.sleep)
    assert clock.now < 1000 + 2 * lib._LOOK


@pytest.mark.parametrize(
    "text",
    ["", '{"host": "a", "pro', "[]", "\x00\xff", "[" * 9000, "null", '{"host": 1}',
     json.dumps({**lib._own()._asdict(), "process": -1}),
     json.dumps({**lib._own()._asdict(), "process": "1"}),
     json.dumps({**lib._own()._asdict(), "host": "a\x1b[2J"})],
    ids=range(10),
)  # fmt: skip
def test_a_torn_or_foreign_file_is_waited_out(tmp_path, text, caplog):
    left(tmp_path, text=text)
    (tmp_path / "lease" / "notes.txt").touch()
    clock = Clock()
    take(tmp_path, clock, clock.sleep)
    assert clock.now - 1000 > lib._DEAD
    assert f"{tmp_path}/lease/1.json does not say who writes into {tmp_path}" in caplog.text
    assert leases(tmp_path) == ["2.json", "notes.txt"]


def test_a_file_that_is_still_being_written_is_read_again(tmp_path):
    left(tmp_path, text="")
    here = {"system": lib.system(), "process": os.getppid()}
    started = lib.start_of(os.getppid())
    clock = Clock(lambda: left(tmp_path, **here, process_start=started))
    with pytest.raises(LeaseError, match=f"process {os.getppid()}"):
        take(tmp_path, clock, clock.sleep)


def test_who_judged_too_long_ago_takes_nothing(tmp_path):
    """Between its look and its claim another one took over, gave back, or the dead one awoke."""
    place = tmp_path / "lease"
    nobody = lib._NONE
    path = left(tmp_path)
    dead = max(lib._entries(place))
    beaten(path)()
    assert lib._claim(place, dead) is None and leases(tmp_path) == ["1.json"]
    dead = max(lib._entries(place))
    clock = Clock()
    second = take(tmp_path, clock, clock.sleep)
    assert lib._claim(place, dead) is None and leases(tmp_path) == ["2.json"]
    assert lib._claim(place, nobody) is None and leases(tmp_path) == ["2.json"]
    second.release()
    third = take(tmp_path)
    assert leases(tmp_path) == ["1.json"]
    assert lib._claim(place, dead) is None and leases(tmp_path) == ["1.json"]
    third.beat()


def test_a_lease_that_was_taken_over_is_lost(tmp_path):
    """A process that stood still for two minutes sees it before it writes."""
    clock = Clock()
    held = take(tmp_path, clock)
    clock.now += lib._DEAD / 2 - 1
    held.check()
    left(tmp_path, 2)
    held.check()  # nobody can have it yet: the disk is not asked
    clock.now += 2
    with pytest.raises(LeaseError, match=r"process \d+ on far writes into .*; it took over"):
        held.check()
    clock.now -= lib._DEAD
    with pytest.raises(LeaseError):
        held.check()
    held.release()
    assert leases(tmp_path) == ["1.json", "2.json"]
    assert json.loads((tmp_path / "lease" / "2.json").read_text())["token"] == "theirs"


def test_a_lease_that_is_gone_is_a_fault_of_storage(tmp_path):
    """Removed, or the disk is; it is held again if that comes back as it was."""
    clock = Clock()
    held = take(tmp_path / "w", clock)
    (tmp_path / "w").rename(tmp_path / "away")
    held.check()
    clock.now += lib._DEAD
    for _ in range(2):
        with pytest.raises(StorageError, match="is gone or damaged"):
            held.check()
    (tmp_path / "away").rename(tmp_path / "w")
    held.check()
    held.release()
    stranger = take(tmp_path / "w")
    with pytest.raises(LeaseError, match="took over"):
        held.beat()
    held.release()
    stranger.beat()


def test_signs_of_life_come_by_themselves(tmp_path, monkeypatch):
    beats, real = [], lib.Lease.beat
    enough = threading.Event()

    def beat(lease):
        real(lease)
        beats.append((tmp_path / "lease" / "1.json").stat().st_mtime_ns)
        if len(beats) == 2:
            raise StorageError("gone for a moment")
        if len(beats) == 4:
            enough.set()

    monkeypatch.setattr(lib.Lease, "beat", beat)
    monkeypatch.setattr(lib, "_BEAT", 1e-3)
    with only_writer(tmp_path):
        assert enough.wait(60)
    assert len(set(beats[:4])) > 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing_is_a_fault_of_storage(tmp_path, monkeypatch, number):
    """When the file is made, or when it is filled: then it does not stay."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    for module, name in ((Path, "mkdir"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(StorageError, match=f"cannot be written: .*{os.strerror(number)}"):
                take(tmp_path)
        assert not leases(tmp_path)


def test_object_storage_that_says_late_who_was_faster(tmp_path, monkeypatch):
    """Making the file succeeds there for both; keeping it for one, whose file then stays."""
    here = {"system": lib.system(), "process": os.getpid()}

    def stale(_):
        left(tmp_path, **here, process_start=lib.start_of(os.getpid()))
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "fsync", stale)
    with pytest.raises(LeaseError, match=f"process {os.getpid()}"):
        take(tmp_path)
    assert leases(tmp_path) == ["1.json"]


@pytest.mark.parametrize("below", ["", "mine", "mine/first"])
def test_a_link_to_nothing_on_the_way(tmp_path, below):
    """A disk that is not mounted: an error at once, and not a try without end."""
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with pytest.raises(StorageError, match=r"cannot be made: .*runs is a link to .*disk, which"):
        take(tmp_path / "runs" / below)
    (tmp_path / "disk").mkdir()
    take(tmp_path / "runs" / below).release()


def test_where_no_folder_can_be_made():
    with pytest.raises(StorageError, match=r"cannot be (made|written)"):
        take("/proc/run")


def test_a_file_on_the_way(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"runs: is not a folder"):
        take(tmp_path / "runs" / "mine")


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "w").touch()
    with pytest.raises(UserError, match="is not a folder") as caught:
        take(tmp_path / "w")
    assert not isinstance(caught.value, StorageError)
