"""One row of a medical set: a question to a model and its right answer."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medmoe_jax.data.conversation import Conversation


@dataclass(frozen=True)
class Row:
    """A training row and an evaluation item at once.

    prompt: the user's turn.
    response: the right answer, one of `choices` where there are any.
    choices: letters or label words to choose among; empty for free text.
    language: of the answer, as a BCP 47 tag.
    name: the set's name.
    kind: 'choice' or 'generate'.
    body: span of `prompt` holding the text that may be shortened (see `shorten`).
    guide: what a model that has not been trained on the set must be told besides: the labels, the
      form of an answer. It is no part of `prompt`.
    texts: what the letters of an exam stand for.
    part: subject or source within the set, where it has such.
    allowed: of a list as the answer, the terms that may stand in it.
    spans: `(type, start, stop)` of entities in the body.
    """

    prompt: str
    response: str
    choices: tuple[str, ...]
    language: str
    name: str
    kind: str
    body: tuple[int, int]
    guide: str = ""
    texts: tuple[str, ...] = ()
    part: str = ""
    allowed: tuple[str, ...] = ()
    spans: tuple[tuple[str, int, int], ...] = ()

    def conversation(self) -> Conversation:
        """The row in the conversation format of the training data."""
        return {
            "conversations": [
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.response},
            ],
            "language": self.language,
        }


def build(
    name: str,
    language: str,
    text: str,
    response: str,
    *,
    before: str = "",
    after: str = "",
    choices: Sequence[str] = (),
    **more: Any,
) -> Row:
    """A row whose prompt is `before + text + after`; its kind follows from `choices`."""
    text = text.strip()
    return Row(
        prompt=before + text + after,
        response=response.strip(),
        choices=tuple(choices),
        language=language,
        name=name,
        kind="choice" if choices else "generate",
        body=(len(before), len(before) + len(text)),
        **more,
    )


def shorten(row: Row, limit: int, measure: Callable[[str], int] = len) -> Row:
    """Cut the end of the row's body so that `measure(prompt) <= limit`.

    The instruction and the options stay whole. `measure` counts, say, the tokens of a prompt and
    must not shrink as text is added. Where even an empty body is too long, the body is empty.
    """
    if measure(row.prompt) <= limit:
        return row
    start, stop = row.body
    low, high = 0, stop - start  # `low` characters fit (or none do), `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        text = row.prompt[: start + middle] + row.prompt[stop:]
        low, high = (middle, high) if measure(text) <= limit else (low, middle)
    prompt = row.prompt[: start + low] + row.prompt[stop:]
    return replace(row, prompt=prompt, body=(start, start + low))


def held_out(key: str, share: float = 0.2) -> bool:
    """Whether the question or document `key` belongs to the hold-out: fixed, whatever the order.

    The same key (up to case and spaces) always falls on the same side.
    """
    plain = " ".join(key.casefold().split())
    digest = hashlib.sha256(f"medmoe hold-out 1:{plain}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Kept(dict):
    """By code point, what `normal` keeps of it: the character, or nothing."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LMNS" and character != "~"
        self[code] = code if kept else None
        return self[code]


_KEPT = _Kept()


def normal(text: str) -> str:
    """Text without differences of width, case, spaces and punctuation: equals are duplicates.

    Signs that change the meaning stay, as in "<5" and ">5", and letters' marks with them.
    """
    return unicodedata.normalize("NFKC", text).casefold().translate(_KEPT)
