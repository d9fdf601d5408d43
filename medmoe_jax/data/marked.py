"""Turns as a chat template writes them, and where people's texts lie in what it wrote.

People's texts are told from the template's own by a mark inside each text; that the marks change
nothing else is checked at every rendering.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from medmoe_jax.data.calls import escaped
from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.pieces import beside_text
from medmoe_jax.errors import UserError

_OPEN, _CLOSE = "\ue000", "\ue001"
# Numbers in marks have digits of their own too, so that no template changes them with the text's.
_DIGITS = {ord(str(digit)): 0xE010 + digit for digit in range(10)}
_PLAIN = {private: plain for plain, private in _DIGITS.items()}
_MARK = re.compile(f"{_OPEN}([\ue010-\ue019]{{1,9}}){_CLOSE}")
NOTHING = re.compile("(?!)")
# Where in a text its mark stands. Templates may ask how a text begins or ends, or what is in it;
# then the next share is tried.
_SHARES = (1 / 2, 1 / 3, 4 / 5, 0.0, 1.0)
# The names that published templates give to what an assistant thinks before it answers.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Renders(Protocol):
    """What a conversation asks of a template."""

    def render(self, turns: Sequence[Mapping], tools: Sequence[Mapping], asks: bool) -> str:
        """The text of some turns, with the generation prompt if it `asks` for an answer."""


class OwnText(NamedTuple):
    """A text of people.

    Attributes:
      turn, field: where it is from; the arguments of calls are many texts of `tool_calls`.
      text: itself.
      escapes: whether a template may write it as it stands in JSON, which it may not with what
        the model is to say as text.
    """

    turn: int
    field: str
    text: str
    escapes: bool

    def around(self, inside: int, before: str, after: str) -> tuple[int, int, bool, bool]:
        """How much of it stands before and after a mark, and if its beginning and end are there.

        Args:
          inside: where in the text the mark stood.
          before, after: what a template wrote on the two sides of the mark.
        """
        tries = []
        for form in (str, escaped) if self.escapes else (str,):
            left, right = self.text[:inside], self.text[inside:]
            back, forth = _common(form(left)[::-1], before[::-1]), _common(form(right), after)
            begins, ends = back >= len(form(left.lstrip())), forth >= len(form(right.rstrip()))
            tries.append((back, forth, begins, ends))
        return max(tries, key=lambda found: found[0] + found[1])


class Mark(NamedTuple):
    """Where a mark stood: in a rendered text, which text of people, and where in that one."""

    at: int
    number: int
    inside: int


class Rendered(NamedTuple):
    """What a template wrote, and where the marks stood in it."""

    text: str
    marks: tuple[Mark, ...]


class Span(NamedTuple):
    """A text of people in a rendered one, or a part of it.

    Attributes:
      start, end: where it stands.
      own: the text.
      inside: the last place in that text that was marked.
      begins, ends: whether its beginning and its end, but for outer white space, are there.
    """

    start: int
    end: int
    own: OwnText
    inside: int
    begins: bool
    ends: bool

    @property
    def whole(self) -> bool:
        """Whether all of the text is there."""
        return self.begins and self.ends

    def goes_on(self, other: Span) -> bool:
        """Whether the other is the next part of the same text."""
        return self.end == other.start and self.own is other.own and self.inside < other.inside


class MarkedTurns:
    """Some turns, and what a template writes of the first ones of them."""

    def __init__(
        self, template: Renders, turns: Sequence[Turn], tools: Sequence[dict], tokens: re.Pattern
    ) -> None:
        """
        Args:
          template: what renders the turns.
          turns, tools: of the conversation.
          tokens: finds what must stay text where a template writes it changed, such as the marks of
            turns: in people's texts they are marked apart.
        """
        self._template, self._tools, self._tokens = template, tools, tokens
        self._turns = turns
        self.texts: list[OwnText] = []
        for number, turn in enumerate(turns):
            self._note_texts(number, turn)
        self._memory: dict[tuple[int, bool], Rendered] = {}

    @property
    def advice(self) -> str:
        """What to do where this template cannot be used. The built-in ones write text alone."""
        other = "another" if beside_text(self._turns, self._tools) else "a built-in"
        return f"use {other} template (data.template)"

    def render(self, count: int, asks: bool) -> Rendered:
        """The first `count` turns, with the generation prompt if it `asks` for an answer."""
        key = (count, asks)
        if key not in self._memory:
            self._memory[key] = self._render(count, asks)
        return self._memory[key]

    def _render(self, count: int, asks: bool) -> Rendered:
        plain = [_given(turn) for turn in self._turns[:count]]
        text = self._template.render(plain, self._tools, asks)
        for tokens, share in itertools.product(dict.fromkeys((self._tokens, NOTHING)), _SHARES):
            turns, places = self._marked(count, share, tokens)
            marked = self._template.render(turns, self._tools, asks)
            numbers = [_number(found) for found in _MARK.finditer(marked)]
            if _MARK.sub("", marked) == text and max(numbers, default=-1) < len(places):
                return Rendered(text, tuple(_found(marked, places)))
        raise UserError(
            "the chat template looks into the text of a turn and writes it by what it finds, so "
            f"answers cannot be located in it; {self.advice}"
        )

    def _marked(
        self, count: int, share: float, tokens: re.Pattern
    ) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
        """The first turns with marks in every text of people, and `(text, place)` of each mark."""
        texts, places = itertools.count(), []

        def mark(text: str) -> str:
            if not text.strip():
                return text
            own = next(texts)
            inside = {_inside(text, share), *(m.start() + 1 for m in tokens.finditer(text))}
            out, before = [], 0
            for at in sorted(inside):
                number = str(len(places)).translate(_DIGITS)
                places.append((own, at))
                out += [text[before:at], _OPEN, number, _CLOSE]
                before = at
            return "".join([*out, text[before:]])

        return [_given(_mapped(turn, mark)) for turn in self._turns[:count]], places

    def _note_texts(self, number: int, turn: Turn) -> None:
        """Number the texts of a turn, in the order in which `_mapped` meets them."""
        field = ""

        def note(text: str) -> str:
            if text.strip():
                answers = turn["role"] == "assistant" and field != "tool_calls"
                self.texts.append(OwnText(number, field, text, escapes=not answers))
            return text

        for field in ("reasoning_content", "content", "tool_calls"):
            _mapped({key: turn[key] for key in (field,) if key in turn}, note)

    def spans(self, rendered: Rendered) -> list[Span]:
        """Where people's texts are, in order."""
        spans: list[Span] = []
        ends = [mark.at for mark in rendered.marks[1:]] + [len(rendered.text)]
        for mark, limit in zip(rendered.marks, ends, strict=False):
            own, floor = self.texts[mark.number], spans[-1].end if spans else 0
            sides = (rendered.text[floor : mark.at], rendered.text[mark.at : limit])
            back, forth, begins, ends = own.around(mark.inside, *sides)
            span = Span(mark.at - back, mark.at + forth, own, mark.inside, begins, ends)
            if spans and spans[-1].goes_on(span):
                span = span._replace(start=spans[-1].start, begins=spans.pop().begins)
            spans.append(span)
        return spans


def _found(marked: str, places: Sequence[tuple[int, int]]) -> Iterator[Mark]:
    removed = 0
    for found in _MARK.finditer(marked):
        yield Mark(found.start() - removed, *places[_number(found)])
        removed += len(found[0])


def _number(mark: re.Match) -> int:
    return int(mark[1].translate(_PLAIN))


def _given(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as templates expect it."""
    given = {key: value for key, value in turn.items() if key != "train_weight"}
    if "reasoning_content" in given:
        given |= dict.fromkeys(_REASONING, given["reasoning_content"])
    return given


def _inside(text: str, share: float) -> int:
    """The position that lies at this share of a text's inner part."""
    lead = len(text) - len(text.lstrip())
    return lead + round(share * len(text.strip()))


def _mapped(turn: Mapping[str, Any], change) -> dict[str, Any]:
    """A turn with its texts changed, in this order: reasoning, content, arguments of tool calls."""
    out = dict(turn)
    for field in ("reasoning_content", "content"):
        if field in out:
            out[field] = change(out[field])
    if out.get("tool_calls"):
        out["tool_calls"] = [
            {**call, "function": {**f, "arguments": _leaves(f.get("arguments", {}), change)}}
            for call in out["tool_calls"]
            for f in (call["function"],)
        ]
    return out


def _leaves(value: Any, change) -> Any:
    """A JSON value with the texts in it changed, but not the keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _leaves(item, change) for key, item in value.items()}
    return [_leaves(item, change) for item in value] if isinstance(value, list) else value


def _common(left: str, right: str) -> int:
    """How many characters two texts begin alike with."""
    if right.startswith(left):
        return len(left)
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def cut(
    text: str, spans: Sequence[Span], start: int, end: int
) -> Iterator[tuple[str, Span | None]]:
    """A stretch of a text, cut where people's texts begin and end."""
    at = start
    for span in spans:
        first, last = max(span.start, at), min(span.end, end)
        if first < last:
            yield text[at:first], None
            yield text[first:last], span
            at = last
    yield text[at:end], None


def template_part(text: str, spans: Sequence[Span], start: int, end: int) -> str:
    """A stretch of a text without the texts of people."""
    return _OPEN.join(chunk for chunk, span in cut(text, spans, start, end) if not span)
