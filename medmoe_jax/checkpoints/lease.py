"""The right to write into a folder: one program at a time, and the next one once that is dead.

    FOLDER/lease/1.json    who has it, from its start to its end; 2.json after a takeover, and so on

The file with the highest number is the lease. To take it is to make the file of the next number,
which one program alone can do on local, network and object storage; on gs:// and s3:// by a write
that is refused where the object exists. It stays only where all else in the folder is as it was
when it was judged: so whoever was slow, and comes after a takeover and a release, takes nothing.

A holder under the same running system is dead once its process is gone. Any other is judged by its
heartbeat, the time of change of its file or a mark on its object: dead once that has stood still
while the newcomer looked on for `_DEAD` seconds. Clocks of two machines are never compared, nor
their names, which may be equal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from medmoe_jax import json_text
from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.staging import check_signs
from medmoe_jax.errors import ParameterError, StorageError, UserError
from medmoe_jax.storage import objects
from medmoe_jax.storage.partials import start_of, system
from medmoe_jax.storage.places import check_makeable, is_remote
from medmoe_jax.storage.places import place as storage_place

FOLDER = "lease"
_BEAT = 10  # seconds between two heartbeats
_DEAD = 120  # of silence; network and object storage show others what they knew up to 60 s ago
_LOOK = 1  # seconds between two looks at a heartbeat
_LONGEST = 1 << 16  # bytes that are read of a file
_TRIES = 100  # in a row in which somebody else was faster, or removed the folder
# What a file that another machine has removed answers with.
_REMOVED = (errno.ENOENT, errno.ESTALE)

log = logging.getLogger(__name__)


class LeaseError(UserError):
    """Another program writes into the folder; the message says which one."""


class Holder(NamedTuple):
    """Who has a lease.

    Attributes:
      host: its machine's name, for people.
      system: the running system and the process numbers that count there; "" = not known.
      process: its number.
      process_start: ticks from the start of the system to that of the process.
      started: when it took the lease, for people.
      token: of this lease alone.
    """

    host: str
    system: str
    process: int
    process_start: int
    started: str
    token: str


class _Entry(NamedTuple):
    """A file in the folder of leases: its number, what it holds, and its time of change in ns."""

    number: int
    text: str
    beat: int

    @property
    def holder(self) -> Holder | None:
        """Who wrote it; None where it is torn or damaged."""
        try:
            holder = Holder(**json_text.loads(self.text))
        except (TypeError, json.JSONDecodeError):
            return None
        kinds = (str, str, int, int, str, str)
        fits = all(type(value) is kind for value, kind in zip(holder, kinds, strict=True))
        return holder if fits and holder.process > 0 and holder.host.isprintable() else None


_NONE = _Entry(0, "", 0)


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Generator[Callable[[], None]]:
    """The lease of a folder for the time of the block; all processes enter it alike.

    The first process holds it. It is given back however the block ends; of a process that is
    killed the next one takes it over.

    Yields:
      A function to be called before anything is written: raises LeaseError, or StorageError, where
      the lease was lost. It costs nothing while the heartbeat is fresh.

    Raises:
      LeaseError: another program has it and lives; it is waited for where that is not known yet.
      StorageError: the folder cannot be written.
    """
    taken: list[Lease] = []
    from_first_process(lambda: taken.append(take(folder)))
    if not taken:
        yield lambda: None
        return
    ended = threading.Event()
    threading.Thread(target=taken[0].keep, args=(ended,), name="lease", daemon=True).start()
    try:
        yield taken[0].check
    finally:
        ended.set()
        taken[0].release()


def writer(folder: str | Path) -> str:
    """Who may be writing into a folder, in words; "" where it is known that nobody does."""
    place = storage_place(folder) / FOLDER
    entries = _entries(place)
    latest = max(entries, key=lambda entry: entry.number, default=None)
    return "" if latest is None or _lives(latest.holder) is False else _words(place, latest)


def check_folder(folder: str | Path) -> None:
    """Whether a work directory is there or may be made, and checkpoints written there.

    Raises what `check_signs` and `check_makeable` do.
    """
    if not str(folder):
        raise ParameterError("workdir: is empty; give the path of a folder")
    folder = storage_place(folder)
    check_signs(folder)
    check_makeable(folder)


def _now() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def take(
    folder: str | Path,
    clock: Callable[[], float] = _now,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """The lease of a folder, which is made if absent; see `only_writer`."""
    try:
        check_folder(folder)
        folder = storage_place(folder)
        place, made = folder / FOLDER, not folder.exists()
        for _ in range(_TRIES):
            before = _wait_until_free(place, clock, sleep)
            asked = clock()
            if path := _claim(place, before):
                return Lease(path, asked, clock, made)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    raise StorageError(f"{folder}: cannot be made, or other programs begin there all the time")


def _wait_until_free(
    place: Path, clock: Callable[[], float], sleep: Callable[[float], None]
) -> _Entry:
    """The newest file once nobody has the lease. Raises LeaseError where its holder lives."""
    seen, since, said = _NONE, clock(), False
    while True:
        found = max(_entries(place), default=_NONE)
        lives = found != _NONE and _lives(found.holder)
        moved = found.text == seen.text and found.beat != seen.beat
        if lives or (found.holder and moved):
            raise LeaseError(_refusal(place, found))
        if lives is False:
            return found
        if found != seen:  # a file that is being written is whole at the next look
            seen, since = found, clock()
        elif clock() - since > _DEAD:
            return found
        elif not said:
            said = True
            log.warning(
                "%s; whether it lives cannot be seen from here: its next sign of life is waited "
                "for, %d s at most",
                _words(place, found),
                _DEAD,
            )
        sleep(_LOOK)


def _claim(place: Path, before: _Entry) -> Path | None:
    """The file of the next number, made by this process; None where another one was faster."""
    path = place / f"{before.number + 1}.json"
    if not _make(path, json.dumps(_own()._asdict(), indent=2)):
        return None
    try:
        others = [entry for entry in _entries(place) if entry.number != before.number + 1]
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        _remove(path)
        raise
    if max(others, default=_NONE) != before:
        _remove(path)
        return None
    for entry in others:
        _remove(place / f"{entry.number}.json")
    return path


def _make(path: Path, text: str) -> bool:
    """Whether this call made the file, which was not there."""
    if is_remote(path):
        return objects.create(path, text.encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # a release removed the folder
        return False
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115
    except (FileExistsError, FileNotFoundError):
        return False
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno == errno.ESTALE:  # mounted storage may say only now that one was faster
            return False
        path.unlink(missing_ok=True)
        raise
    return True


def _remove(path: Path) -> None:
    if is_remote(path):
        objects.remove(path)
    else:
        path.unlink(missing_ok=True)


class Lease:
    """A lease that this process has taken."""

    def __init__(self, path: Path, asked: float, clock: Callable[[], float], made: bool) -> None:
        """Hold a lease.

        Args:
          path: its file.
          asked: the clock's time before that was written.
          clock: gives seconds.
          made: whether the folder that it is for was made with it.
        """
        self._path, self._fresh, self._clock, self._made = path, asked, clock, made
        self._text = path.read_text(encoding="utf-8")
        self._lost: LeaseError | None = None

    def keep(self, ended: threading.Event) -> None:
        """Give a sign of life every few seconds until `ended`, or until the lease is lost."""
        while not ended.wait(_BEAT) and not self._lost:
            # What lasts, `check` says; storage may be back at the next one.
            with contextlib.suppress(LeaseError, StorageError):
                self.beat()

    def beat(self) -> None:
        """Give a sign of life, and see whether the lease is still held.

        Raises:
          LeaseError: another program has taken it.
          StorageError: the disk cannot be reached, or the file is gone from it.
        """
        place, asked, gone = self._path.parent, self._clock(), False
        try:
            _touch(self._path)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and error.errno not in _REMOVED:
                raise StorageError(f"{self._path} cannot be renewed: {error}") from error
            gone = True
        try:  # after the sign: a newcomer sees that, or is seen here
            newest = max(_entries(place), default=_NONE)
        except OSError as error:
            raise StorageError(f"{place} cannot be read: {error}") from error
        held, number = newest.text == self._text, int(self._path.stem)
        if held and not gone:
            self._fresh = asked
            return
        if held or (newest.number <= number and newest.holder is None):
            raise StorageError(
                f"{self._path} is gone or damaged: someone removed it, or the disk is not there"
            )
        self._lost = LeaseError(
            f"{_words(place, newest)}; it took over from this process, of which it had seen no "
            f"sign of life for {_DEAD} s, and which ends here without writing more"
        )
        raise self._lost

    def check(self) -> None:
        """Raise what `beat` raises where the lease is lost, or may be as no sign of life is fresh.

        Nobody takes it over before twice as much time.
        """
        if self._lost:
            raise self._lost
        if self._clock() - self._fresh > _DEAD / 2:
            self.beat()

    def release(self) -> None:
        """Give the lease back, and remove the folder where nothing was written into it."""
        if self._lost:
            return
        # Whoever comes next finds no file, or one whose process is gone.
        with contextlib.suppress(OSError, StorageError):
            if max(_entries(self._path.parent), default=_NONE).text != self._text:
                return
            _remove(self._path)
            if is_remote(self._path):  # where there are no folders
                return
            self._path.parent.rmdir()
            if self._made:
                self._path.parents[1].rmdir()


def _entries(place: Path) -> list[_Entry]:
    """The files in the folder of leases; one that has just gone is empty."""
    try:
        remote = is_remote(place)
        names = [one.name for one in objects.listing(place)] if remote else os.listdir(place)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(r"([1-9][0-9]{0,8})\.json", name) for name in names)
    return [_read(place, int(match[1])) for match in found if match]


def _read(place: Path, number: int) -> _Entry:
    if is_remote(place):
        path = place / f"{number}.json"
        text = (objects.read(path) or b"").decode(errors="replace")
        return _Entry(number, text, objects.beat_of(path))
    try:
        # Opened: NFS asks the server then, and may answer from its memory otherwise.
        with open(place / f"{number}.json", "rb") as file:
            text = file.read(_LONGEST).decode(errors="replace")
            return _Entry(number, text, os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return _Entry(number, "", 0)


def _touch(path: Path) -> None:
    """Give a sign of life. Raises OSError; FileNotFoundError where the file is gone."""
    if is_remote(path):
        objects.touch(path)
    else:
        os.utime(path)


def _own() -> Holder:
    """This process, as the holder of a new lease."""
    return Holder(
        host=socket.gethostname(),
        system=system(),
        process=os.getpid(),
        process_start=start_of(os.getpid()) or 0,
        started=_time(time.time()),
        token=uuid.uuid4().hex,
    )


def _lives(holder: Holder | None) -> bool | None:
    """Whether a holder lives; None where that cannot be seen from here."""
    if holder is None or not holder.system or holder.system != system():
        return None
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another person's, which /proc may hide
        return start_of(holder.process) in (None, holder.process_start)
    return start_of(holder.process) == holder.process_start


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _words(place: Path, entry: _Entry) -> str:
    holder = entry.holder
    if holder is None:
        return f"{place}/{entry.number}.json does not say who writes into {place.parent}"
    return (
        f"process {holder.process} on {holder.host} writes into {place.parent} since "
        f"{holder.started} (last sign of life {_time(entry.beat / 1e9)})"
    )


def _refusal(place: Path, entry: _Entry) -> str:
    return (
        f"{_words(place, entry)}; wait for its end, stop it there, or use another work directory. "
        f"Where that process writes elsewhere, as this folder is a copy, remove {place}"
    )
