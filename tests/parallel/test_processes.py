"""One process: what needs no other."""

import os
import signal

import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes


@pytest.mark.parametrize(
    "several, message",
    [
        (("", 2, 0), "processes: 2 need a coordinator"),
        (("here", 2, 0), "coordinator: 'here' is not HOST:PORT, nor auto"),
        (("host:", 2, 0), "'host:' is not HOST:PORT"),
        (("host:1234", 2, 2), "process: 2 is none of 2, counted from 0"),
        (("host:1234", 2, -1), "process: -1"),
    ],
)
def test_what_does_not_fit_together(several, message):
    with pytest.raises(UserError, match=message):
        processes.Membership(*several)


def test_alone():
    with processes.Membership("", 1, 0):
        assert (processes.count(), processes.index()) == (1, 0)
        assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.end(3) == 3


def test_a_notice_is_a_sigterm_and_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Notice() as notice:
        assert not notice()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice() and notice()
    assert signal.getsignal(signal.SIGTERM) == before
