"""One conversation in a chat template: where people's texts and the answers lie in what it writes.

For every answer there is its *prompt* (the turns before it, with the generation prompt: what the
model reads) and its *form* (the prompt, and after it what the model is to say, as the template
writes an answer at a conversation's end). People's texts are told from the template's own by a mark
inside each text; that the marks change nothing else is checked at every rendering.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from medmoe_jax.data.calls import escaped, left_out
from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.pieces import Piece, beside_text, filled
from medmoe_jax.errors import UserError

_OPEN, _CLOSE = "\ue000", "\ue001"
# Numbers in marks have digits of their own too, so that no template changes them with the text's.
_DIGITS = {ord(str(digit)): 0xE010 + digit for digit in range(10)}
_PLAIN = {private: plain for plain, private in _DIGITS.items()}
_MARK = re.compile(f"{_OPEN}([\ue010-\ue019]{{1,9}}){_CLOSE}")
_NOTHING = re.compile("(?!)")
# Where in a text its mark stands. Templates may ask how a text begins or ends, or what is in it;
# then the next share is tried.
_SHARES = (1 / 2, 1 / 3, 4 / 5, 0.0, 1.0)
# The names that published templates give to what an assistant thinks before it answers.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Renders(Protocol):
    """What a conversation asks of a template."""

    def render(self, turns: Sequence[Mapping], tools: Sequence[Mapping], asks: bool) -> str:
        """The text of some turns, with the generation prompt if it `asks` for an answer."""


class _Own(NamedTuple):
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


class _Span(NamedTuple):
    """A text of people in a rendered one, or a part of it.

    Attributes:
      start, end: where it stands.
      own: the text.
      inside: the last place in that text that was marked.
      begins, ends: whether its beginning and its end, but for outer white space, are there.
    """

    start: int
    end: int
    own: _Own
    inside: int
    begins: bool
    ends: bool

    @property
    def whole(self) -> bool:
        """Whether all of the text is there."""
        return self.begins and self.ends

    def goes_on(self, other: _Span) -> bool:
        """Whether the other is the next part of the same text."""
        return self.end == other.start and self.own is other.own and self.inside < other.inside


class Form(NamedTuple):
    """An answer after its prompt.

    Attributes:
      turn: its number.
      rendered: the turns up to it.
      start, end: of what the model says.
      lead: what stands before the answer's text.
      rest: all that stands after the answer's text.
    """

    turn: int
    rendered: Rendered
    start: int
    end: int
    lead: str
    rest: str

    @property
    def said(self) -> str:
        """The text up to the answer's end."""
        return self.rendered.text[: self.end]

    def first_end(self, tokens: Collection[str]) -> str:
        """The first of some tokens in the rest, or all of the rest, stripped, if there is none."""
        found = [(self.rest.find(t), -len(t), t) for t in tokens if t.strip() and t in self.rest]
        return min(found)[2] if found else self.rest.strip()


class RenderedTalk:
    """A conversation and what a template makes of it."""

    def __init__(
        self,
        template: Renders,
        turns: Sequence[Turn],
        tools: Sequence[dict] = (),
        tokens: re.Pattern = _NOTHING,
    ) -> None:
        """
        Args:
          template: what renders the turns.
          turns, tools: of the conversation.
          tokens: finds what must stay text where a template writes it changed, such as the marks of
            turns: in people's texts they are marked apart.
        """
        self._template, self._tools, self._tokens = template, tools, tokens
        self.turns = turns
        self._own: list[_Own] = []
        for number, turn in enumerate(self.turns):
            self._note_texts(number, turn)
        self._memory: dict[tuple[int, bool], Rendered] = {}

    def prompt(self, end: str) -> list[Piece]:
        """What the model reads before it answers these turns; `end` ends the answers in them."""
        rendered = self.text(len(self.turns), True)
        within = self._within(rendered, self._forms(end, ()))
        self._check(rendered, len(self.turns), within)
        return self._pieces(rendered, within, ())

    def rows(self, end: str) -> list[list[Piece]]:
        """The training rows: every answer after its prompt, in as few rows as hold them so."""
        left = {n for n in self._answers() if self.turns[n].get("train_weight", 1) > 0}
        forms = self._forms(end, left)
        out: list[list[Piece]] = []
        rendered, count = self.text(len(self.turns), False), len(self.turns)
        while True:
            within = self._within(rendered, forms)
            taught = {form.turn for form in within} & left
            if taught or not left:
                self._check(rendered, count, within, taught)
                out.insert(0, self._pieces(rendered, within, taught))
            left -= taught
            if not left:
                return out
            last = next(form for form in reversed(forms) if form.turn in left)
            rendered, count = last.rendered, last.turn + 1

    def text(self, count: int, asks: bool) -> Rendered:
        """The first `count` turns, with the generation prompt if it `asks` for an answer."""
        key = (count, asks)
        if key not in self._memory:
            self._memory[key] = self._render(count, asks)
        return self._memory[key]

    def form(self, turn: int, end: str) -> Form:
        """An answer after its prompt, up to `end`. Raises UserError where it cannot be found."""
        prompt, answered = self.text(turn, True), self.text(turn + 1, False)
        start = len(prompt.text)
        if not answered.text.startswith(prompt.text):
            answered = self._joined(turn, prompt, answered, end)
        spans = [s for s in self._spans(answered) if s.own.turn == turn and s.end > start]
        after = max((span.end for span in spans), default=start)
        texts = [span.start for span in spans if span.own.field != "reasoning_content"]
        at = answered.text.find(end, after) if end else -1
        stop = at + len(end) if at >= 0 else max(after, len(answered.text.rstrip()))
        lead = answered.text[start : max(start, min(texts, default=start))]
        return Form(turn, answered, start, stop, lead, answered.text[after:])

    @property
    def _advice(self) -> str:
        """What to do where this template cannot be used. The built-in ones write text alone."""
        other = "another" if beside_text(self.turns, self._tools) else "a built-in"
        return f"use {other} template (data.template)"

    def _answers(self) -> list[int]:
        return [n for n, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def _forms(self, end: str, learned: Collection[int]) -> list[Form]:
        """The answers after their prompts; those that no row teaches, where they can be found."""
        forms = []
        for number in self._answers():
            try:
                forms.append(self.form(number, end))
            except UserError:
                if number in learned:
                    raise
        return forms

    def _within(self, rendered: Rendered, forms: Sequence[Form]) -> list[Form]:
        """The answers that stand in a text exactly as after their prompts."""
        return [form for form in forms if rendered.text.startswith(form.said)]

    def _joined(self, turn: int, prompt: Rendered, answered: Rendered, end: str) -> Rendered:
        """The prompt, and after it the answer as the template wrote it behind other text.

        So it is where turns before the answer are written otherwise once it is given, and where a
        generation prompt begins the answer (`<think>`) for a model that goes on from there.
        """
        spans = self._spans(answered)
        mine = [i for i, span in enumerate(spans) if span.own.turn == turn]
        before = max((span.end for span in spans[: mine[0] if mine else None]), default=0)
        found = spans[mine[0]].start if mine else answered.text.find(end, before)
        if found < 0 or (not mine and self.turns[turn]["content"].strip()):
            raise UserError(
                f"turn {turn}: the chat template leaves out or changes the text of the answer; "
                f"{self._advice}"
            )
        asked = max((span.end for span in self._spans(prompt)), default=0)
        header, written = prompt.text[asked:], answered.text[before:found]
        thinks = mine and spans[mine[0]].own.field == "reasoning_content"
        if thinks and header.startswith(written) and header[len(written) :].strip():
            raise UserError(
                f"turn {turn}: the chat template's prompt ends with {header!r}, past the place of "
                "reasoning_content, so the model would be trained to think where it is asked not "
                "to; set its options (data.template_options), or remove the reasoning from the row"
            )
        if written.startswith(header):
            start = before + len(header)
        elif header.startswith(written):
            start = found
        else:
            raise UserError(
                f"turn {turn}: the chat template asks for an answer with {header!r} and writes it "
                f"after {written!r}, so it would be trained as inference never sees it; set its "
                f"options (data.template_options) or {self._advice}"
            )
        shift = len(prompt.text) - start
        moved = [mark._replace(at=mark.at + shift) for mark in answered.marks if mark.at >= start]
        return Rendered(prompt.text + answered.text[start:], (*prompt.marks, *moved))

    # Marks ------------------------------------------------------------------------------------

    def _render(self, count: int, asks: bool) -> Rendered:
        plain = [_given(turn) for turn in self.turns[:count]]
        text = self._template.render(plain, self._tools, asks)
        for tokens, share in itertools.product(dict.fromkeys((self._tokens, _NOTHING)), _SHARES):
            turns, places = self._marked(count, share, tokens)
            marked = self._template.render(turns, self._tools, asks)
            numbers = [_number(found) for found in _MARK.finditer(marked)]
            if _MARK.sub("", marked) == text and max(numbers, default=-1) < len(places):
                return Rendered(text, tuple(_found(marked, places)))
        raise UserError(
            "the chat template looks into the text of a turn and writes it by what it finds, so "
            f"answers cannot be located in it; {self._advice}"
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

        return [_given(_mapped(turn, mark)) for turn in self.turns[:count]], places

    def _note_texts(self, number: int, turn: Turn) -> None:
        """Number the texts of a turn, in the order in which `_mapped` meets them."""
        field = ""

        def note(text: str) -> str:
            if text.strip():
                answers = turn["role"] == "assistant" and field != "tool_calls"
                self._own.append(_Own(number, field, text, escapes=not answers))
            return text

        for field in ("reasoning_content", "content", "tool_calls"):
            _mapped({key: turn[key] for key in (field,) if key in turn}, note)

    def _spans(self, rendered: Rendered) -> list[_Span]:
        """Where people's texts are, in order."""
        spans: list[_Span] = []
        ends = [mark.at for mark in rendered.marks[1:]] + [len(rendered.text)]
        for mark, limit in zip(rendered.marks, ends, strict=False):
            own, floor = self._own[mark.number], spans[-1].end if spans else 0
            sides = (rendered.text[floor : mark.at], rendered.text[mark.at : limit])
            back, forth, begins, ends = own.around(mark.inside, *sides)
            span = _Span(mark.at - back, mark.at + forth, own, mark.inside, begins, ends)
            if spans and spans[-1].goes_on(span):
                span = span._replace(start=spans[-1].start, begins=spans.pop().begins)
            spans.append(span)
        return spans

    # What comes of it ---------------------------------------------------------------------------

    def _pieces(
        self, rendered: Rendered, forms: Sequence[Form], taught: Collection[int]
    ) -> list[Piece]:
        spans, at = self._spans(rendered), 0
        pieces: list[Piece] = []
        for form in forms:
            pieces += self._frame(rendered.text, spans, at, form.start)
            pieces += self._answer(rendered.text, spans, form, form.turn in taught)
            at = form.end
        pieces += self._frame(rendered.text, spans, at, len(rendered.text))
        return filled(pieces)

    def _frame(self, text: str, spans: Sequence[_Span], start: int, end: int) -> Iterator[Piece]:
        """All that is no answer."""
        for chunk, span in _chunks(text, spans, start, end):
            role = self.turns[span.own.turn]["role"] if span else ""
            yield Piece(chunk, role, "frame", "text" if span else "markup")

    def _answer(
        self, text: str, spans: Sequence[_Span], form: Form, learned: bool
    ) -> Iterator[Piece]:
        """What the model says: lead or reasoning, the answer's texts, and what ends it."""
        chunks = list(_chunks(text, spans, form.start, form.end))
        thought = "reasoning_content"
        texts = [i for i, (_, span) in enumerate(chunks) if span and span.own.field != thought]
        first, last = (texts[0], texts[-1]) if texts else (0, -1)
        thinks = thought in self.turns[form.turn]
        for number, (chunk, span) in enumerate(chunks):
            part = "content"
            if number < first:
                part = "reasoning" if thinks else "lead"
            elif number > last:
                part = "close"
            yield Piece(chunk, "assistant", part, "text" if span else "markup", learned)

    def _check(
        self,
        rendered: Rendered,
        count: int,
        forms: Sequence[Form],
        taught: Collection[int] = (),
    ) -> None:
        """Raise UserError for what the template left out or changed of the first turns."""
        spans = self._spans(rendered)
        self._check_texts(spans, count, taught)
        markup = _markup(rendered.text, spans, 0, len(rendered.text))
        for tool in self._tools:
            name = tool.get("function", tool).get("name", "")
            if name not in markup:
                raise _no_place("", "tools", name)
        said = {form.turn: form for form in forms}
        for number, turn in enumerate(self.turns[:count]):
            if turn.get("tool_calls"):
                self._check_calls(number, rendered, spans, said.get(number))

    def _check_texts(self, spans: Sequence[_Span], count: int, taught: Collection[int]) -> None:
        """The part of `_check` on reasoning and content.

        What an earlier answer was thought from may be left out, as inference will see it.
        """
        whole = {span.own for span in spans if span.whole}
        for own in self._own:
            needed = own.turn < count and own.field != "tool_calls"
            needed &= own.field == "content" or own.turn in taught
            if needed and own not in whole:
                if own.field != "content":
                    raise UserError(
                        f"turn {own.turn}: the chat template has no place for {own.field}; use "
                        "one that has (data.template), or remove it from the row"
                    )
                raise UserError(
                    f"turn {own.turn}: the chat template changes the text of a turn or leaves it "
                    f"out ({own.text[:40]!r}); {self._advice}"
                )

    def _check_calls(
        self, number: int, rendered: Rendered, spans: Sequence[_Span], form: Form | None
    ) -> None:
        """The part of `_check` on the calls in an answer, which must stand in its form.

        An answer that stands otherwise than after its prompt has none; its calls may then be
        anywhere, and their names those in the list of tools.
        """
        start, end = (form.start, form.end) if form else (0, len(rendered.text))
        markup = _markup(rendered.text, spans, start, end)
        missing = left_out(self.turns[number]["tool_calls"], markup)
        there = {mark.number for mark in rendered.marks if start <= mark.at <= end}
        for at, own in enumerate(self._own):
            if (own.turn, own.field) == (number, "tool_calls") and at not in there:
                missing = own.text if missing is None else missing
        if missing is not None:
            raise _no_place(f"turn {number}: ", "tool_calls", missing)


def _no_place(where: str, field: str, part: Any) -> UserError:
    return UserError(
        f"{where}the chat template has no place for {field} (it leaves out {part!r}); use one "
        "that has (data.template), or remove them from the row"
    )


def _markup(text: str, spans: Sequence[_Span], start: int, end: int) -> str:
    """A stretch of a text without the texts of people."""
    return _OPEN.join(chunk for chunk, span in _chunks(text, spans, start, end) if not span)


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


def _chunks(
    text: str, spans: Sequence[_Span], start: int, end: int
) -> Iterator[tuple[str, _Span | None]]:
    """A stretch of a text, cut where people's texts begin and end."""
    at = start
    for span in spans:
        first, last = max(span.start, at), min(span.end, end)
        if first < last:
            yield text[at:first], None
            yield text[first:last], span
            at = last
    yield text[at:end], None
