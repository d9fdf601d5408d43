"""What is not done, as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID = "invalid_request_error"


class Refused(Exception):
    """A request that gets an error for an answer.

    Attributes:
      status: of HTTP.
      content: the JSON answer.
      headers: beside it.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
          message: what is wrong and what to do.
          status: of HTTP.
          param: the field that is wrong.
          code: a word for programs.
          kind: OpenAI's `type` of the error.
          headers: beside the answer.
        """
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.content: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def too_long(prompt: int, room: int, context: int, param: str) -> Refused:
    """The refusal of a prompt that does not fit the context with the tokens asked for.

    Args:
      prompt, room: tokens of the prompt and of its answer.
      context: the most tokens of both.
      param: the field with the prompt.
    """
    return Refused(
        f"the context of this model is {context} tokens; the prompt has {prompt} and its answer "
        f"asks for {room}; shorten one of them",
        param=param,
        code="context_length_exceeded",
    )


def busy(places: int) -> Refused:
    """The refusal of a request for which there is no place."""
    return Refused(
        f"all of the {places} places for requests are taken; try again later",
        429,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers={"Retry-After": "1"},
    )


def late(seconds: float) -> Refused:
    """The end of a request that takes too long; asking again would take as long."""
    return Refused(
        f"the answer took longer than the {seconds:g} seconds that a request may take; ask for "
        "fewer tokens (max_tokens)",
        504,
        code="timeout",
        kind="timeout_error",
        headers={"x-should-retry": "false"},
    )


def broken() -> Refused:
    """What is said of a fault of the server; the fault itself stands in its log."""
    return Refused(
        "the server has failed; its log says why",
        500,
        code="internal_error",
        kind="server_error",
        headers={"x-should-retry": "false"},
    )


def closing() -> Refused:
    """What is said while the server ends."""
    return Refused("the server ends and takes no more requests", 503, kind="server_error")
