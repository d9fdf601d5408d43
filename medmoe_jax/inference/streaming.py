"""Ids become text as they come: whole characters, up to what ends the answer, thoughts apart.

Text is given once and never taken back. So whatever may still turn out to be something else is held
for a while: bytes of a character that is not whole, the beginning of a stop, the beginning of what
the template writes around an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from medmoe_jax.data.encode import Frame
from medmoe_jax.data.tokens import BYTE_TOKEN, Tokenizer

_UNKNOWN = "\ufffd"  # what stands for bytes that are no character, or not yet
# Some decoders look at a run of tokens that are bytes as a whole: none of it is sure before its
# end. In a longer run whole characters are taken for sure, or scripts without spaces would never be
# told.
_RUN = 32


class NewText(NamedTuple):
    """New text of an answer, either part of it possibly empty."""

    content: str = ""
    reasoning: str = ""


class Detokenizer:
    """The text of ids, piece by piece; the pieces joined are what the tokenizer decodes."""

    def __init__(self, tokenizer: Tokenizer, start: bool = False) -> None:
        """`start`: they begin a text (`Tokenizer.decode`)."""
        self._tokenizer, self._start = tokenizer, start
        self._held: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """The text that is sure now."""
        decode = self._tokenizer.decode
        self._held += (token for token in ids if decode([token]))  # others leave no trace
        if not self._held or (len(self._held) < _RUN and self._ends_with_byte()):
            return ""
        text = decode(self._held, self._start)
        if not text or text.endswith(_UNKNOWN):
            return ""
        self._held, self._start = [], False
        return text

    def _ends_with_byte(self) -> bool:
        return bool(BYTE_TOKEN.fullmatch(self._tokenizer.text_of(self._held[-1])))

    @property
    def held(self) -> str:
        """The whole characters of the text that is not sure yet."""
        if not self._held:
            return ""
        return self._tokenizer.decode(self._held, self._start).rstrip(_UNKNOWN)

    def end(self) -> str:
        """What was held."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, self._start)


class Cutter:
    """Text up to the first stop that is complete.

    Attributes:
      stopped: whether one was found; all that comes after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text before a stop, without what may become one."""
        if self.stopped:
            return ""
        self._held += text
        # The one that ends first; of those, the longest.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if self.stopped:
            kept, self._held = self._held[: min(found)[1]], ""
            return kept
        sure = len(self._held) - _overlap(self._held, self._stops)
        kept, self._held = self._held[:sure], self._held[sure:]
        return kept

    def end(self) -> str:
        """What was held."""
        held, self._held = self._held, ""
        return held


class Parting:
    """Parts what a model says into its reasoning and its answer, as the template writes them.

    There is reasoning where the text begins as the template opens it, or where the prompt has
    opened it already; it goes on to the template's mark, or to the end.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._state: Callable[[], NewText] = self._opening
        self._held = ""
        self._begun = False  # whether some of the reasoning has been given

    def add(self, text: str) -> NewText:
        """The new text whose part is sure."""
        self._held += text
        return self._state()

    def end(self) -> NewText:
        """What was held. White space around reasoning is no part of it."""
        held, self._held = self._held, ""
        before = self._frame.before
        if self._state == self._thinking:
            return NewText(reasoning=held.rstrip())
        if self._state == self._opening and before and held.lstrip().startswith(before):
            return NewText(reasoning=held.strip().removeprefix(before).strip())
        return NewText("" if self._state == self._between else held)

    def _opening(self) -> NewText:
        """Nothing is known yet."""
        held, (lead, before, after) = self._held, self._frame
        if lead and held.startswith(lead):
            return self._enter(self._answering, len(lead))
        if lead.startswith(held) and lead:
            return NewText()
        inner = held.lstrip()
        if after and before.startswith(inner) and inner != before:
            return NewText()
        if after and inner.startswith(before):
            return self._enter(self._thinking, len(held) - len(inner) + len(before))
        return self._enter(self._answering, 0)

    def _thinking(self) -> NewText:
        after = self._frame.after
        at = self._held.find(after)
        if at >= 0:
            thought = self._held[:at].rstrip()
            answer = self._enter(self._between, at + len(after))
            return NewText(answer.content, thought if self._begun else thought.lstrip())
        if not self._begun:
            self._held = self._held.lstrip()
        sure = len(self._held) - _overlap(self._held, [after])
        thought = self._held[:sure].rstrip()
        self._begun = self._begun or bool(thought)
        self._held = self._held[len(thought) :]
        return NewText(reasoning=thought)

    def _between(self) -> NewText:
        """Line ends between the two are part of neither."""
        self._held = self._held.lstrip("\n")
        return self._enter(self._answering, 0) if self._held else NewText()

    def _answering(self) -> NewText:
        held, self._held = self._held, ""
        return NewText(held)

    def _enter(self, state: Callable[[], NewText], taken: int) -> NewText:
        """Go on behind the first characters in another state."""
        self._state = state
        self._held = self._held[taken:]
        return state()


class Reader:
    """Reads one answer, token by token.

    Attributes:
      ended: "" while it goes on, "stop" after what ends an answer, "length" after the most tokens.
      taken: how many ids it has read, up to the one that ended the answer.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_ids: Collection[int] = (),
        stop_texts: Sequence[str] = (),
        frame: Frame = Frame(),
    ) -> None:
        """
        Args:
          detokenizer: gives the text.
          stop_ids: tokens that end an answer and are no part of it.
          stop_texts: texts that do the same.
          frame: what the template writes around the answer.
        """
        self._detokenizer = detokenizer
        self._stop_ids = frozenset(stop_ids)
        self._cutter, self._parting = Cutter(stop_texts), Parting(frame)
        self.ended, self.taken = "", 0

    def add(self, ids: Sequence[int], ended: str = "") -> NewText:
        """The new text after some tokens.

        It may end with a stop's text before the decoder knows of it: see `ended`, and let the
        decoder do no more. What it has said meanwhile is not taken.

        Args:
          ids: the new tokens, what stopped the answer included or not.
          ended: as of `requests.Said`.
        """
        if self.ended:
            return NewText()
        text = ""
        for left, token in zip(reversed(range(len(ids))), ids, strict=True):
            self.taken += 1
            if left or ended != "stop" or token not in self._stop_ids:
                text += self._cutter.add(self._detokenizer.add([token]))
            if self._cutter.stopped:
                break
        if ended:
            text += self._cutter.add(self._detokenizer.end())
            text += self._cutter.end()
        self.ended = "stop" if self._cutter.stopped else ended
        said = self._parting.add(text)
        if self.ended:
            rest = self._parting.end()
            said = NewText(said.content + rest.content, said.reasoning + rest.reasoning)
        return said


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    sizes = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(sizes, default=0)
