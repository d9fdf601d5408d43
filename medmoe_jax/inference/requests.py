"""What is asked of an engine, and what it says, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from medmoe_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: ids.
      max_tokens: at most so many new ones.
      stops: what ends the answer: ids that follow each other, each of them.
      sampling: how tokens are drawn; `sampling.first` is the number of this request's stream.
      language: the expert of its language, for gates that always force it; -1 = unknown.
      alternatives: so many of the most probable tokens are told with each token.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[tuple[int, ...], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    language: int = -1
    alternatives: int = 0


class Token(NamedTuple):
    """One token of a text.

    Attributes:
      id: its id.
      log_prob: natural logarithm of its probability by the model itself, before temperature,
        penalty and what keeps the likely tokens only.
      alternatives: `(id, log_prob)` of the most probable tokens in its place, best first.
    """

    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Said(NamedTuple):
    """What has become of a request since the last step.

    Attributes:
      request: its number.
      tokens: the new ones, what stopped it included.
      ended: "" while it goes on, "stop" after one of its stops, "length" after `max_tokens`.
    """

    request: int
    tokens: tuple[Token, ...]
    ended: str = ""


class Decoding(Protocol):
    """Requests that are answered side by side; one thread alone may call it.

    A request takes a row of the batch when one is free, whatever the others are at.
    """

    def submit(self, request: Request) -> int:
        """Let a request wait for a row, and return its number.

        Raises:
          UserError: an empty prompt, or one that leaves no room for `max_tokens` in the context.
        """
        ...

    def cancel(self, request: int) -> None:
        """Free the row of a request that nobody waits for; one that has ended is let be."""
        ...

    def step(self) -> list[Said]:
        """Read what waits where a row is free, go some tokens on, and say what is new.

        Empty when nothing waits and nothing runs.
        """
        ...
