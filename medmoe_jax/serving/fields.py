"""The fields of a JSON request, each of its kind; none is parsed and ignored."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from medmoe_jax import json_text
from medmoe_jax.data.conversation import check_text
from medmoe_jax.data.turns import kind
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.ranges import Range
from medmoe_jax.serving.refusals import Refused


class Fields:
    """Takes the fields of a request, one by one. `null` is as good as absent.

    Every method raises Refused, with the field's name, for a value that will not do.
    """

    def __init__(self, body: bytes) -> None:
        """`body`: the request."""
        try:
            value = json_text.loads(body)
            check_text(value, "the request")
        except json.JSONDecodeError as error:
            raise Refused(f"the request is not JSON: {error.msg}") from None
        except UserError as error:
            raise Refused(str(error)) from None
        if not isinstance(value, Mapping):
            raise Refused(f"the request must be a JSON object, found {kind(value)}")
        self._left = {name: one for name, one in value.items() if one is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._left.pop(name, default)

    def need(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self._left:
            raise Refused(f"{name}: is missing", param=name)
        return self._left.pop(name)

    def whole(self, name: str, default: int | None, limits: Range = Range()) -> int | None:
        """A whole number."""
        value = self._number(name, default, limits)
        if isinstance(value, float) and not value.is_integer():
            raise Refused(f"{name}: must be a whole number, not {value}", param=name)
        return None if value is None else int(value)

    def real(self, name: str, default: float, limits: Range = Range()) -> float:
        """A number."""
        value = self._number(name, default, limits)
        return default if value is None else float(value)

    def _number(self, name: str, default: float | None, limits: Range) -> float | None:
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{name}: must be a number, found {kind(value)}", param=name)
        try:
            limits.check(name, value)
        except ParameterError as error:
            raise Refused(str(error), param=name) from None
        return value

    def truth(self, name: str) -> bool:
        """True or false; false where it is absent."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name}: must be true or false, found {kind(value)}", param=name)
        return value

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.need(name)
        if not isinstance(value, str):
            raise Refused(f"{name}: must be text, found {kind(value)}", param=name)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """One text or a list of texts, none of them empty; nothing where it is absent."""
        value = self.take(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise Refused(f"{name}: must be text or a list of texts, none empty", param=name)
        return tuple(value)

    def neutral(self, values: Mapping[str, Collection[Any]]) -> None:
        """Fields of which only values that change nothing are taken; the others are refused."""
        for name, allowed in values.items():
            value = self.take(name)
            if value is not None and value not in allowed:
                shown = " or ".join(json.dumps(one) for one in allowed) or "null"
                raise Refused(f"{name}: only {shown} can be served", param=name, code="unsupported")

    def ignore(self, names: Collection[str]) -> None:
        """Fields that by OpenAI's own description never change an answer."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Refuse what is left."""
        for name in self._left:
            raise Refused(f"{name}: there is no such parameter here", param=name)
