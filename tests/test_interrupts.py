"""Ctrl-C where Python lets no exception leave."""

import gc
import os
import signal
import sys
import threading

import pytest

import medmoe_jax
from medmoe_jax.inference.chat import Chat
from medmoe_jax.interrupts import never_lost

pytestmark = pytest.mark.usefixtures("interruptible")


def press():
    os.kill(os.getpid(), signal.SIGINT)


class Pressed:
    """Ctrl-C as it is thrown away."""

    def __del__(self):
        press()


@pytest.fixture
def in_collector():
    """`in_collector(times)`: Ctrl-C in so many of the next collections."""
    added = []

    def begin(times):
        left = [None] * times

        def callback(phase, _):
            if phase == "stop" and left:
                left.pop()
                press()

        added.append(callback)
        gc.callbacks.append(callback)

    yield begin
    for callback in added:
        gc.callbacks.remove(callback)


def waits():
    """What never ends by itself; far longer than any signal takes."""
    threading.Event().wait(60)


def test_one_in_the_collector_is_heard_after_it(in_collector):
    in_collector(1)
    with pytest.raises(KeyboardInterrupt), never_lost():
        gc.collect()
        waits()


def test_one_where_an_object_is_thrown_away_is_heard_after_it():
    with pytest.raises(KeyboardInterrupt), never_lost():
        Pressed()
        waits()


def test_one_that_is_lost_again_is_heard_then(in_collector):
    in_collector(3)
    with pytest.raises(KeyboardInterrupt), never_lost():
        for _ in range(3):
            gc.collect()
        waits()


def test_one_at_the_end_of_the_block_is_heard_in_it(in_collector):
    in_collector(1)
    with pytest.raises(KeyboardInterrupt), never_lost():
        gc.collect()


def test_what_listens_and_what_else_is_ignored_stay_as_they_are(in_collector, monkeypatch):
    """A caller's handler hears it twice, and may do with it what it likes."""
    heard, ignored = [], []

    def listens(*_):
        heard.append(0)
        if len(heard) == 1:
            raise KeyboardInterrupt

    class Fails:
        def __del__(self):
            raise ValueError("in __del__")

    monkeypatch.setattr(sys, "unraisablehook", lambda it: ignored.append(str(it.exc_value)))
    hook = sys.unraisablehook
    in_collector(1)
    before = signal.signal(signal.SIGINT, listens)
    try:
        with never_lost():
            gc.collect()
            Fails()
        assert signal.getsignal(signal.SIGINT) is listens
    finally:
        signal.signal(signal.SIGINT, before)
    assert (len(heard), ignored, sys.unraisablehook) == (2, ["in __del__"], hook)


def test_another_thread_changes_nothing():
    found = []

    @never_lost()
    def look():
        found.append(sys.unraisablehook)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [sys.unraisablehook]


@pytest.mark.parametrize(
    "call, within",
    [
        (lambda: medmoe_jax.load("w"), "medmoe_jax.api.model.open_source"),
        (lambda: medmoe_jax.train(None, "w"), "medmoe_jax.api.configs.config"),
        (lambda: medmoe_jax.plan(None, "v5e:2x4"), "medmoe_jax.api.configs.config"),
        (lambda: Chat.say(Chat.__new__(Chat), "Hello"), "medmoe_jax.inference.chat.Chat.ask"),
    ],
    ids=["load", "train", "plan", "say"],
)
def test_a_notebook_s_calls_hear_it(call, within, monkeypatch, in_collector):
    def long(*_, **__):
        gc.collect()
        waits()

    monkeypatch.setattr(within, long)
    in_collector(1)
    with pytest.raises(KeyboardInterrupt):
        call()
