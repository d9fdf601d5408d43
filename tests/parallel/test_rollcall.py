"""Who came and who is gone, with threads in the place of processes."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from medmoe_jax.parallel import rollcall
from medmoe_jax.parallel.rollcall import ProcessError, RollCall

# The thread that ends in the place of its process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def ends(monkeypatch):
    """`(links of the process, who is gone)` in the place of the end of a process."""
    seen, really = [], RollCall._end

    def end(roll, gone):
        if not roll._over:
            seen.append((sorted(roll._links), gone))
        really(roll, gone)

    def stop(status):
        raise SystemExit(status)

    monkeypatch.setattr(RollCall, "_end", end)
    monkeypatch.setattr(rollcall.os, "_exit", stop)
    yield seen
    settle(lambda: not watching())  # or the next test would hear of this one's


def meet(count, present, stranger=b""):
    """What each present process gets: its roll call, or the error."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    if stranger:
        socket.create_connection(address).sendall(stranger)

    def come(index):
        try:
            if index:
                return rollcall.answer(address, index, count)
            with listener:
                return rollcall.host(listener, count)
        except ProcessError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(come, present))


def settle(done):
    until = time.monotonic() + 10
    while not done() and time.monotonic() < until:
        time.sleep(0.01)
    assert done()


def watching():
    return [t for t in threading.enumerate() if t.name == "rollcall"]


def test_one_that_dies_is_named_by_all_others(ends):
    *_, third = meet(3, (0, 1, 2))
    time.sleep(0.1)
    assert ends == []
    third._links[0].shutdown(socket.SHUT_RDWR)
    # Process 2 sees its own link to process 0 end as well; the others know better.
    settle(lambda: len(ends) == 3)
    assert sorted(ends) == [([0], "0"), ([0], "2"), ([1, 2], "2")]


def test_process_0_is_named_too(ends):
    first, _ = meet(2, (0, 1))
    first._links[1].shutdown(socket.SHUT_RDWR)
    settle(lambda: len(ends) == 2)  # process 0 sees its link end as well
    assert sorted(ends) == [([0], "0"), ([1], "1")]


def test_who_leaves_in_good_order_is_not_missed(ends):
    calls = meet(3, (0, 1, 2))
    for roll in calls:
        roll.leave()
    settle(lambda: not watching())
    for roll in calls:
        for link in roll._links.values():
            link.close()
    assert ends == []


def test_those_that_never_come_are_named_by_all_that_did(monkeypatch):
    monkeypatch.setattr(rollcall, "_COMING", 0.5)
    expected = "process 1, 3 of 4 did not come within 0.5 s"
    assert meet(4, (0, 2)) == [expected, expected]
    (lonely,) = meet(2, (0,))
    assert lonely == "process 1 of 2 did not come within 0.5 s"


def test_process_0_that_never_comes(monkeypatch):
    monkeypatch.setattr(rollcall, "_COMING", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(ProcessError, match=rf"process 0 did not come to 127.*:{address[1]} within"):
        rollcall.answer(address, 1, 2)


@pytest.mark.parametrize(
    "stranger", [b"GET / HTTP/1.1\r\n\r\n", "²".encode(), b"\xff\xfe", b"9" * 200]
)
def test_a_stranger_is_not_counted(ends, stranger):
    first, second = meet(2, (0, 1), stranger=stranger)
    assert sorted(first._links) == [1]
    for roll in (first, second):
        roll.leave()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(rollcall, "_ECHO", 0.3)
    monkeypatch.setattr(rollcall, "_SAME", 0.7)
    monkeypatch.setattr(rollcall, "_PATIENCE", 3)


def fails(roll):
    """A process with an error of its own; returns which of the others it saw fail and not end."""
    roll.fail()
    left = set(roll._failing)
    for link in roll._links.values():
        with contextlib.suppress(OSError):  # closed by both sides
            link.shutdown(socket.SHUT_RDWR)
    return left


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_all_end_by_errors_of_their_own(ends, soon, order):
    """Whoever is first; process 0 goes last."""
    calls = meet(3, (0, 1, 2))
    with ThreadPoolExecutor() as pool:
        running = {}
        for process in order:
            running[process] = pool.submit(fails, calls[process])
            time.sleep(0.1)
        left = {process: one.result() for process, one in running.items()}
    settle(lambda: not watching())
    assert ends == []
    assert left[0] == set()


def test_one_that_fails_alone_is_named_by_those_that_wait(ends, soon):
    calls = meet(3, (0, 1, 2))
    fails(calls[2])
    settle(lambda: sorted(ends) == [([0], "2"), ([1, 2], "2")])


def test_those_that_wait_for_two_that_fail_hear_of_one(ends, soon):
    """Process 0 is one of the two: it is not lost, and tells."""
    first, _, third = meet(3, (0, 1, 2))
    with ThreadPoolExecutor() as pool:
        ended = [pool.submit(fails, one) for one in (first, third)]
        assert 2 not in ended[0].result()  # 1 waits, and would be gone
    settle(lambda: ends == [([0], "2")])


@pytest.mark.parametrize("failing", [0, 1])
def test_the_echo_of_an_end_is_no_error_of_ones_own(ends, soon, monkeypatch, failing):
    """An error comes to the main thread before the thread that watches sees why."""
    hear = RollCall._hear

    def late(roll, process):
        time.sleep(0.15)
        return hear(roll, process)

    monkeypatch.setattr(RollCall, "_hear", late)
    calls = meet(2, (0, 1))
    fails(calls[failing])
    assert ends == []
    calls[1 - failing].fail()
    assert ends == [([failing], str(failing))]


def test_a_death_without_a_word_ends_those_that_fail_too(ends, soon):
    first, second, third = meet(3, (0, 1, 2))
    with ThreadPoolExecutor() as pool:
        pool.submit(first.fail)
        pool.submit(second.fail)
        time.sleep(0.05)
        third._links[0].shutdown(socket.SHUT_RDWR)
        settle(lambda: ([1, 2], "2") in ends and ([0], "2") in ends)


def test_what_is_said_at_once_after_the_call_is_heard(ends, soon, monkeypatch):
    """Two lines may come as one piece."""
    monkeypatch.setattr(rollcall, "_all_came", lambda missing, count: time.sleep(0.2))
    listener = socket.create_server(("127.0.0.1", 0))
    with ThreadPoolExecutor() as pool:
        second = pool.submit(rollcall.answer, listener.getsockname(), 1, 3)
        link, _ = listener.accept()
        link.sendall(b"[]\n2\n")
        second.result()
    settle(lambda: ends == [([0], "2")])
