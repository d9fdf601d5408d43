"""Ranges of numbers: what a parameter may be, checked before anything is computed with it."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, NamedTuple

from medmoe_jax.errors import ParameterError


class Range(NamedTuple):
    """From `low` to `high`; NaN and the infinities are in none, nor is what no float holds.

    Attributes:
      low, high: the ends, which belong to the range unless `above` or `below` leaves them out.
      above, below: whether `low`, or `high`, itself is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise ParameterError, which names the parameter, unless `value` is in the range."""
        number = _number(value)
        if number is None:
            raise ParameterError(f"{name}: {value!r} is not a number")
        try:
            if not math.isfinite(number):
                raise ParameterError(f"{name}: {value} is not a finite number")
        except OverflowError:  # so many digits are not shown
            raise ParameterError(f"{name}: has more digits than any number computed with") from None
        if number < self.low:
            raise ParameterError(f"{name}: {value} is below {self.low}")
        if self.above and number == self.low:
            raise ParameterError(f"{name}: {value} is not above {self.low}")
        if number > self.high:
            raise ParameterError(f"{name}: {value} is above {self.high}")
        if self.below and number == self.high:
            raise ParameterError(f"{name}: {value} is not below {self.high}")

    def check_whole(self, name: str, value: int) -> None:
        """The same of a whole number, of Python or of any library; 2.0 is none."""
        self.check(name, value)
        if not isinstance(_number(value), int):
            raise ParameterError(f"{name}: {value!r} is not a whole number")


def _number(value: Any) -> int | float | None:
    """A scalar of any library as Python's number; None for what is none, such as text or truth."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    for read in (operator.index, float):
        with contextlib.suppress(TypeError):
            return read(value)
    return None


FINITE = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
COUNT = Range(1)
PAIR = Range(2)  # tokens of a row: one is read, the next is learnt
SHARE = Range(0, 1)
DECAY = Range(0, 1, below=True)  # of a running mean
SINGLE = Range(-3.4e38, 3.4e38)  # what a float32 holds
WORD = Range(-(2**31), 2**31 - 1)  # what JAX computes with as a whole number
SEED = Range(-(2**63), 2**63 - 1)  # see `seeds.random_key`
