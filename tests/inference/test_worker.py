"""Many threads ask one decoder: who is told what, when places are full, late, cancelled or lost."""

import queue
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.inference.requests import Request, Said
from medmoe_jax.inference.worker import Closed, Full, TimeLimit, Worker
from tests.inference.scripted import Scripted

LONG = 3600.0


def counting(request):
    """From the prompt's last id on."""
    return range(request.prompt[-1] + 1, request.prompt[-1] + 1 + request.max_tokens)


def asked(worker, *requests, seconds=LONG):
    """`(asks, what is told of each)`."""
    told = [queue.SimpleQueue() for _ in requests]
    asks = worker.ask([(r, t.put) for r, t in zip(requests, told, strict=True)], seconds)
    return asks, told


def read(told):
    """The ids of an answer up to its end."""
    ids = []
    while True:
        said = told.get(timeout=60)
        if isinstance(said, BaseException):
            raise said
        ids += [token.id for token in said.tokens]
        if said.ended:
            return ids, said.ended


class Gate:
    """Lets the decoder step only as often as it is told to."""

    def __init__(self):
        self._steps = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def __call__(self):
        self.reached.release()
        assert self._steps.acquire(timeout=60)

    def open(self, steps=1000):
        self._steps.release(steps)


def test_many_threads_are_answered_side_by_side():
    decoding = Scripted(counting, rows=4)
    answers = {}

    def one(n):
        answers[n] = read(asked(worker, Request((n,), 5 + n % 3))[1][0])

    with Worker(decoding, 32) as worker:
        threads = [threading.Thread(target=one, args=[n]) for n in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert worker.pending == 0
    want = {n: (list(range(n + 1, n + 6 + n % 3)), "length") for n in range(32)}
    assert answers == want and decoding.most == 4


def test_places_are_counted_and_freed():
    gate = Gate()
    decoding = Scripted(counting, rows=1, before_step=gate)
    with Worker(decoding, 3) as worker:
        (first, second), told = asked(worker, Request((1,), 2), Request((2,), 2))
        with pytest.raises(Full, match="2 of 3 places are taken"):
            asked(worker, Request((3,), 2), Request((4,), 2))  # all or none
        (_,), (third,) = asked(worker, Request((3,), 2))
        worker.cancel(first)
        worker.cancel(first)
        gate.open()
        assert read(told[1]) == ([3, 4], "length") and read(third) == ([4, 5], "length")
        worker.cancel(second)  # it has ended: let be
        assert read(asked(worker, *[Request((n,), 1) for n in range(3)])[1][2]) == ([3], "length")
    assert not decoding.running and not decoding.waiting


def test_a_request_that_is_cancelled_frees_its_row_at_once():
    gate = Gate()
    decoding = Scripted(counting, rows=1, before_step=gate)
    with Worker(decoding, 2) as worker:
        (ask,), _ = asked(worker, Request((1,), 10**6))
        _, (told,) = asked(worker, Request((2,), 1))
        gate.reached.acquire(timeout=60)
        worker.cancel(ask)
        gate.open()
        assert read(told) == ([3], "length") and ask.number not in decoding.running


def test_who_sees_that_a_row_is_free_finds_its_place_free(monkeypatch):
    gate, pending = Gate(), queue.SimpleQueue()
    decoding = Scripted(counting, rows=1, before_step=gate)
    with Worker(decoding, 1) as worker:
        monkeypatch.setattr(decoding, "cancelled", SimpleNamespace(
            put=lambda request: pending.put(worker.pending)))  # fmt: skip
        (ask,), _ = asked(worker, Request((1,), 10**6))
        gate.reached.acquire(timeout=60)
        worker.cancel(ask)
        gate.open()
        assert pending.get(timeout=60) == 0


def test_a_row_that_cannot_be_freed_ends_the_waiting_too(monkeypatch):
    now, gate = [0.0], Gate()
    decoding = Scripted(counting, rows=1, before_step=gate)

    def fail(request):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(decoding, "cancel", fail)
    worker = Worker(decoding, 2, clock=lambda: now[0])
    _, (late,) = asked(worker, Request((1,), 10**6), seconds=5.0)
    _, (other,) = asked(worker, Request((2,), 1), seconds=50.0)
    gate.reached.acquire(timeout=60)
    now[0] = 6.0
    gate.open()
    with pytest.raises(TimeLimit):
        read(late)
    with pytest.raises(RuntimeError, match="the device is gone"):
        read(other)
    with pytest.raises(RuntimeError, match="the device is gone"):
        worker.close()


def test_time_is_limited_while_waiting_and_while_answering():
    now, gate = [0.0], Gate()
    decoding = Scripted(counting, rows=1, before_step=gate)
    with Worker(decoding, 3, clock=lambda: now[0]) as worker:
        _, told = asked(worker, Request((1,), 10**6), Request((2,), 10**6), seconds=5.0)
        _, (later,) = asked(worker, Request((3,), 1), seconds=50.0)
        gate.open(1)
        assert told[0].get(timeout=60).tokens[0].id == 2
        gate.reached.acquire(timeout=60)
        now[0] = 6.0
        gate.open()
        for one in told:
            with pytest.raises(TimeLimit):
                read(one)
        assert read(later) == ([4], "length")


def test_a_request_that_the_decoder_refuses_hurts_nobody_else():
    with Worker(Scripted(counting), 2) as worker:
        _, (bad, good) = asked(worker, Request((), 1), Request((1,), 1))
        with pytest.raises(UserError, match="at least one token"):
            read(bad)
        assert read(good) == ([2], "length") and worker.pending == 0


def test_a_step_that_fails_is_told_to_all_and_never_hidden():
    steps = iter([None, None])

    def fail_at_third():
        if next(steps, 1):
            raise RuntimeError("the device is gone")

    worker = Worker(Scripted(counting, rows=1, before_step=fail_at_third), 4)
    _, told = asked(worker, Request((1,), 9), Request((2,), 9))
    for one in told:
        with pytest.raises(RuntimeError, match="the device is gone"):
            read(one)
    with pytest.raises(Closed, match="the device is gone"):
        asked(worker, Request((1,), 1))
    assert "gone" in str(worker.failure) and worker.pending == 0
    with pytest.raises(RuntimeError, match="the device is gone"):
        worker.close()


def test_closing_answers_what_was_asked_and_takes_no_more():
    gate = Gate()
    worker = Worker(Scripted(counting, rows=1, before_step=gate), 4)
    _, told = asked(worker, Request((1,), 3), Request((5,), 3))
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open()
    assert [read(one)[0] for one in told] == [[2, 3, 4], [6, 7, 8]]
    closing.join(timeout=60)
    assert not closing.is_alive() and worker.failure is None
    with pytest.raises(Closed, match="takes no more requests"):
        asked(worker, Request((1,), 1))


def test_what_is_said_is_told_as_it_was_said():
    with Worker(Scripted(counting), 1) as worker:
        _, (told,) = asked(worker, Request((1,), 3, stops=((3,),), alternatives=2))
        said = [told.get(timeout=60) for _ in range(2)]
    assert all(isinstance(one, Said) for one in said)
    assert [one.ended for one in said] == ["", "stop"]
    assert said[0].tokens[0].alternatives == ((2, -0.5), (3, -1.5))


def test_stopping_ends_at_once_and_tells_all_who_wait():
    gate = Gate()
    worker = Worker(Scripted(counting, rows=1, before_step=gate), 4)
    _, told = asked(worker, Request((1,), 10**6), Request((5,), 3))
    gate.reached.acquire(timeout=60)
    worker.stop()
    gate.open(1)
    for one in told:
        with pytest.raises(Closed, match="was stopped"):
            read(one)
    worker.close()
    assert worker.failure is None and worker.pending == 0
    with pytest.raises(Closed):
        asked(worker, Request((1,), 1))


LEFT_OPEN = """
import queue, time
from medmoe_jax.inference.requests import Request
from medmoe_jax.inference.worker import Worker
from tests.inference.scripted import Scripted

def step():
    stepping.put(None)
    time.sleep(0.1)
    stepping.get()

stepping = queue.SimpleQueue()
worker = Worker(Scripted(lambda request: iter(int, 1), before_step=step), 2)
told = queue.SimpleQueue()
if {asked}:
    worker.ask([(Request((1,), 10**9), told.put)], float("inf"))
    told.get()
import atexit
atexit.register(lambda: print("over", worker.failure))
atexit.register(lambda: print("leaving"))
{last}
"""


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("last", ["", "raise KeyError('mine')"])
def test_python_ends_though_nobody_has_closed_the_worker(asked, last):
    script = LEFT_OPEN.format(asked=asked, last=last)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == bool(last), ended.stderr
    assert ended.stdout == "leaving\nover None\n"
    assert ended.stderr.strip().endswith("KeyError: 'mine'" if last else "")
