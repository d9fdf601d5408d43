"""A chat endpoint in OpenAI's form, asked again a few times where a failure may pass."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx

from medmoe_jax import json_text
from medmoe_jax.errors import UserError
from medmoe_jax.ranges import COUNT, POSITIVE

_LONGEST = 120.0  # seconds between two attempts
_PASSING = (408, 409, 425, 429)  # and all from 500 on
_REFUSED = (401, 402, 403, 404)  # the same for every question
_SHOWN = 200  # characters of what a server says of itself


@dataclass(frozen=True)
class JudgeEndpoint:
    """Where a judge is asked.

    Attributes:
      url: of the API, such as https://host/v1; `/chat/completions` is added to it.
      key: sent as a bearer token; "" = none. It is in no message.
      timeout: seconds without a sign from the server.
      attempts: at most, a question.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    attempts: int = 5

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be asked."""
        POSITIVE.check("timeout", self.timeout)
        COUNT.check_whole("attempts", self.attempts)
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise UserError(f"{self.url!r} is no address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"{self.url!r} is no address; give one such as https://host/v1")
        if parts.userinfo:
            raise UserError("a key does not belong in the address; give it in a file")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the key is no line of ASCII text")

    @property
    def place(self) -> str:
        """Where questions are sent to."""
        return self.url.rstrip("/") + "/chat/completions"


class Reply(NamedTuple):
    """What came of a question.

    Attributes:
      value: what was read in the answer; None where none could be had or read.
      problem: why not.
      tokens: read and written, as the server counts them, over all attempts.
    """

    value: Any
    problem: str
    tokens: tuple[int, int]


class _Again(Exception):
    """An attempt failed in a way that may pass; after `wait` seconds, None = as it seems fit."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _Lost(Exception):
    """This question cannot be answered."""


class Client:
    """Asks an endpoint; several threads may at once. A context manager."""

    def __init__(
        self, endpoint: JudgeEndpoint, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """`sleep` waits between attempts."""
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._endpoint, self._sleep = endpoint, sleep
        self._http = httpx.Client(timeout=endpoint.timeout, headers=headers)

    def __enter__(self) -> Client:
        """Ready."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close its connections."""
        self._http.close()

    def ask(self, body: Mapping[str, Any], read: Callable[[str], Any]) -> Reply:
        """The answer to a request, as `read` reads its text; asked again where that gives None.

        Raises:
          UserError: the endpoint refuses all questions: the key, the model or the address is wrong.
        """
        tokens, problem = (0, 0), ""
        for attempt in range(self._endpoint.attempts):
            try:
                answer = self._once(body)
            except _Again as error:
                problem = str(error)
                if attempt + 1 < self._endpoint.attempts:
                    seemly = min(_LONGEST, 2.0**attempt) * random.uniform(0.5, 1)
                    self._sleep(seemly if error.wait is None else error.wait)
                continue
            except _Lost as error:
                return Reply(None, str(error), tokens)
            text, used = _text(answer), _usage(answer)
            tokens = (tokens[0] + used[0], tokens[1] + used[1])
            value = None if text is None else read(text)
            if value is not None:
                return Reply(value, "", tokens)
            # Some servers tell an error, and others why a text ended, with status 200.
            told = "no text in the answer" if text is None else "unreadable"
            problem = f"{told}: {self._shown(json.dumps(answer) if text is None else text)}"
        return Reply(None, problem, tokens)

    def _once(self, body: Mapping[str, Any]) -> Any:
        """What the server answers. Raises _Again, _Lost and UserError."""
        try:
            response = self._http.post(self._endpoint.place, json=dict(body))
        except httpx.TimeoutException:
            raise _Again(f"no answer in {self._endpoint.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _Again(f"no connection: {error}") from None
        except httpx.RequestError as error:
            raise _Again(f"an answer that cannot be read: {error}", 0.0) from None
        status = response.status_code
        told = f"status {status}: {self._shown(response.text)}"
        if status in _REFUSED:
            raise UserError(f"{self._endpoint.place} refuses to judge, {told}")
        if status in _PASSING or status >= 500:
            raise _Again(told, _retry_after(response.headers.get("Retry-After")))
        if status != 200:
            raise _Lost(told)
        try:
            return json_text.loads(response.text)
        except ValueError:
            raise _Again(f"not JSON: {self._shown(response.text)}", 0.0) from None

    def _shown(self, text: str) -> str:
        """The beginning of what a server said, without the key, which some repeat."""
        key = self._endpoint.key
        one_line = " ".join((text.replace(key, "…") if key else text).split())
        return one_line if len(one_line) <= _SHOWN else one_line[:_SHOWN] + " …"


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait, at most `_LONGEST`; None where it says nothing clear."""
    if not value:
        return None
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    if not value.isdigit():
        seconds -= time.time()
    return min(_LONGEST, max(0.0, seconds))


def _text(answer: Any) -> str | None:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _usage(answer: Any) -> tuple[int, int]:
    used = answer.get("usage") if isinstance(answer, dict) else None
    told = used if isinstance(used, dict) else {}
    found = [told.get(name) for name in ("prompt_tokens", "completion_tokens")]
    read, written = (n if isinstance(n, int) and n > 0 else 0 for n in found)
    return read, written
