"""Where tokens begin in the text that is told with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from medmoe_jax.data.tokens import Added, Tokenizer
from medmoe_jax.inference.streaming import Detokenizer


class TextOffsets:
    """Where each token of an answer begins in its text, as the tokens come.

    A character that is split over tokens begins with the first of them, and so do the others; a
    mark that has no text stands where it was written.
    """

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], text: str, written: bool, echo: bool
    ) -> None:
        """
        Args:
          tokenizer: of the ids.
          ids: the prompt.
          text: that it is told with.
          written: whether the marks of the prompt stand in its text; those of ids vanish.
          echo: whether the text of the answer, and its tokens, begin with the prompt.
        """
        marks = _marks(tokenizer, text) if echo and written else ()
        self._prompt = deque(_begins(tokenizer, ids, text, deque(marks)) if echo else ())
        self._walk = _Walk(tokenizer, tokenizer.begins_after(ids), len(text) if echo else 0)

    def add(self, ids: Sequence[int]) -> list[int]:
        """The places of these tokens, which follow those before."""
        return [self._prompt.popleft() if self._prompt else self._walk.step(i) for i in ids]


class _Walk:
    """Goes along a text, token by token."""

    def __init__(self, tokenizer: Tokenizer, start: bool, at: int) -> None:
        self._detokenizer, self._at = Detokenizer(tokenizer, start), at

    def step(self, token: int) -> int:
        """The place where a token begins."""
        at = self._at + len(self._detokenizer.held)
        self._at += len(self._detokenizer.add([token]))
        return at


class _Mark(NamedTuple):
    """A token of its own that is written in a text; `end`: where the text goes on after it."""

    id: int
    at: int
    end: int


def _marks(tokenizer: Tokenizer, text: str) -> list[_Mark]:
    out, at = [], 0
    for part in tokenizer.parts(text):
        written = tokenizer.text_of(part.id) if isinstance(part, Added) else part
        if isinstance(part, Added):
            rest = text[at + len(written) :] if part.rstrip else ""
            out.append(_Mark(part.id, at, at + len(written) + len(rest) - len(rest.lstrip())))
        at += len(written)
    return out


def _begins(tokenizer: Tokenizer, ids: Sequence[int], text: str, marks: deque[_Mark]) -> list[int]:
    """The places of a prompt's ids in its text, found anew after each mark."""
    out, walk = [], _Walk(tokenizer, True, 0)
    for token in ids:
        if marks and token == marks[0].id:
            mark = marks.popleft()
            out.append(mark.at)
            walk = _Walk(tokenizer, tokenizer.begins_after([token]), mark.end)
        else:
            out.append(min(walk.step(token), len(text)))
    return out
