"""Who is there: a connection from every process to process 0, held while the run lasts.

JAX itself ends the processes of a run that has lost one, but late and without saying which. Here a
process that dies closes its connection, process 0 tells the others, and each says so and ends.

Lines on a connection: to process 0 the number of the process, then LEFT when it leaves in good
order; from process 0 the numbers that did not come, as JSON, then one that is gone, or LEFT. Either
side says FAILED when it has an error of its own, and ends some seconds later: the same error, such
as a wrong setting, may be about to be found by the others, and each is to end by what it found.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Collection

from medmoe_jax.kinds import whole_number

LEFT = "left"
FAILED = "failed"
GONE = 69  # exit status: EX_UNAVAILABLE
_COMING = 90  # seconds within which every process comes
_PATIENCE = 10  # seconds more for what process 0 then has to say
_ECHO = 0.5  # seconds within which an end is known whose echo is another error
_SAME = 2  # seconds within which all find the same error
# A machine that lost its power closes nothing: after 20 + 3 · 10 seconds of silence it is gone.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class ProcessError(RuntimeError):
    """Another process of the run never came, died or does not answer; the message says which."""


class RollCall:
    """The connections of one process, watched by a thread of their own."""

    def __init__(self, links: dict[int, socket.socket], count: int) -> None:
        """Watch the links to these processes: to all others on process 0, to process 0 on them."""
        self._links, self._count = links, count
        self._fails = False  # whether this process has an error that is surely its own
        self._over = False  # whether it has told all that it had to
        self._failing: set[int] = set()  # who else has an error, and is still there
        for link in links.values():
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._watch, name="rollcall", daemon=True).start()

    def leave(self) -> None:
        """Leave in good order: nobody will miss this process."""
        self._tell(LEFT)

    def fail(self) -> None:
        """Tell the others of an error of one's own, and give them time to find it too.

        Where it is the echo of another's end, which the roll call knows a moment later, this
        process ends here, as by that end. Process 0 goes last: JAX ends those that are left.
        """
        self._tell(FAILED)
        time.sleep(_ECHO)
        self._fails = True
        time.sleep(_SAME)
        until = time.monotonic() + _PATIENCE
        while self._failing - {0} and time.monotonic() < until:
            time.sleep(0.05)
        # Not by the end of the process, which may wait for the others (JAX does, at Python's end).
        self._over = True
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)

    def _tell(self, word: str, but: Collection[int] = ()) -> None:
        for process, link in self._links.items():
            if process not in but:
                with contextlib.suppress(OSError):  # who is gone need not be told
                    link.sendall(f"{word}\n".encode())

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._hear(key.data):
                        selector.unregister(self._links[key.data])

    def _hear(self, process: int) -> bool:
        """Whether there will be more to hear from this process."""
        words = _read(self._links[process]).split()
        for word in words:
            if word == LEFT:
                return False
            if word != FAILED:
                self._end(word)
            self._failing.add(process)
        if not words:
            if not (self._fails and process in self._failing):
                self._end(str(process))
            self._failing.discard(process)
            if process:
                self._tell(str(process), but=self._failing)  # they wait for one that is gone
        return bool(words)

    def _end(self, gone: str) -> None:
        if self._over:
            return
        # Process 0 tells who it is; to it, the others' end is a consequence.
        self._tell(FAILED if 0 in self._links else gone)
        line = (
            f"medmoe: error: process {gone} of {self._count} is gone; what was saved is intact, "
            "the same command continues\n"
        )
        os.write(2, line.encode())
        os._exit(GONE)  # the main thread may wait for ever for the one that is gone


def _read(link: socket.socket) -> str:
    """What came on a connection, "" if it was closed or broke."""
    try:
        return link.recv(256).decode(errors="replace")
    except OSError:
        return ""


def _line(link: socket.socket) -> str:
    """The first line on a connection, and no byte of the next; "" where it is closed before."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            return ""
        line += byte
    return line.decode()


def host(listener: socket.socket, count: int) -> RollCall:
    """The roll call of process 0, once all others have come to `listener`.

    Raises:
      ProcessError: some did not come.
    """
    links: dict[int, socket.socket] = {}
    until = time.monotonic() + _COMING
    while len(links) < count - 1 and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(TimeoutError):
            link, _ = listener.accept()
            link.settimeout(_PATIENCE)
            number = whole_number(_read(link).strip())
            if number is not None:  # not some stranger's
                links[number] = link
    missing = sorted(set(range(1, count)) - links.keys())
    for link in links.values():
        link.sendall(f"{json.dumps(missing)}\n".encode())
    _all_came(missing, count)
    return RollCall(links, count)


def answer(address: tuple[str, int], index: int, count: int) -> RollCall:
    """The roll call of another process, once process 0 at `address` says that all have come.

    Raises:
      ProcessError: process 0 or another did not come.
    """
    until = time.monotonic() + _COMING
    while True:
        try:
            link = socket.create_connection(address, timeout=_PATIENCE)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise ProcessError(
                    f"process 0 did not come to {address[0]}:{address[1]} within {_COMING} s: "
                    f"{error}"
                ) from None
            time.sleep(0.2)
    link.sendall(f"{index}\n".encode())
    link.settimeout(_COMING + _PATIENCE)
    try:
        said = _line(link)
    except OSError:
        said = ""
    if not said:
        raise ProcessError("process 0 went away while it waited for the others")
    _all_came(json.loads(said), count)
    return RollCall({0: link}, count)


def _all_came(missing: list[int], count: int) -> None:
    if missing:
        names = ", ".join(map(str, missing))
        raise ProcessError(f"process {names} of {count} did not come within {_COMING} s")
