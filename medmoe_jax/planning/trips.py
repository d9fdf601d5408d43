"""How often a compiled loop runs: given by the compiler, or found by running its counter."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence

from medmoe_jax.planning.hlo_text import Computation, Instruction, matched

_LIMIT = 10**5  # turns of a counter that are tried
_ALIKE = {"copy", "bitcast", "convert", "reshape", "copy-done"}
_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}

Computations = Mapping[str, Computation]


class _Unknown(ValueError):
    """A value that depends on the program's data."""


def _constant(text: str) -> int:
    if text in ("true", "false"):
        return int(text == "true")
    if not re.fullmatch(r"-?\d+", text):
        raise _Unknown(text)
    return int(text)


def _value(computations: Computations, here: Computation, name: str, arguments: Sequence[Callable]):
    """An instruction's integer, or for a tuple one function an element that gives it.

    Args:
      arguments: a function a parameter of the computation, that gives its value.
    """
    one = here.instructions[name]
    values = [
        lambda operand=operand: _value(computations, here, operand, arguments)
        for operand in one.operands
    ]
    if one.opcode == "constant":
        return _constant(one.inside)
    if one.opcode == "parameter" and arguments:
        return arguments[int(one.inside)]()
    if one.opcode == "tuple":
        return values
    if one.opcode == "get-tuple-element":
        return values[0]()[int(matched(r"index=(\d+)", one.attributes)[1])]()
    if one.opcode in _ALIKE:
        return values[0]()
    if one.opcode in _ARITHMETIC:
        return _ARITHMETIC[one.opcode](*(value() for value in values))
    if one.opcode == "compare":
        direction = matched(r"direction=(\w+)", one.attributes)[1]
        return int(_COMPARE[direction](*(value() for value in values)))
    if one.opcode in ("fusion", "call"):
        inner = computations[one.called("calls") or one.called("to_apply")]
        return _value(computations, inner, inner.root, values)
    raise _Unknown(f"{one.opcode} {name}")


def _integer(computations: Computations, here: Computation, name: str, state) -> int | None:
    """An integer inside a loop whose state is `state` (None where unknown), or None."""

    def element(value):
        if value is None:
            raise _Unknown("the loop's data")
        return value

    def elements():
        return [lambda value=value: element(value) for value in state]

    try:
        value = _value(computations, here, name, [elements] if state else [])
    except _Unknown:
        return None
    return value if isinstance(value, int) else None


def trip_count(computations: Computations, here: Computation, loop: Instruction) -> int | None:
    """Turns of a `while` in the computation `here`, or None where they depend on the data."""
    given = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if given:
        return int(given[1])
    body, condition = (computations[loop.called(key)] for key in ("body", "condition"))
    (start,) = here.operands(loop)
    if start.opcode != "tuple" or body.instructions[body.root].opcode != "tuple":
        return None
    state = [_integer(computations, here, operand, ()) for operand in start.operands]
    after = body.instructions[body.root].operands
    for turn in range(_LIMIT):
        more = _integer(computations, condition, condition.root, state)
        if more is None:
            return None
        if not more:
            return turn
        state = [
            None if value is None else _integer(computations, body, after[i], state)
            for i, value in enumerate(state)
        ]
    return None
