"""One conversation in a chat template: the prompt and the form of every answer in it.

For every answer there is its *prompt* (the turns before it, with the generation prompt: what the
model reads) and its *form* (the prompt, and after it what the model is to say, as the template
writes an answer at a conversation's end).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from medmoe_jax.data.calls import left_out
from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.marked import NOTHING, MarkedTurns, Rendered, Renders, Span, cut, template_part
from medmoe_jax.data.pieces import Piece, filled
from medmoe_jax.errors import UserError


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
        tokens: re.Pattern = NOTHING,
    ) -> None:
        """
        Args:
          template, turns, tools, tokens: as for `MarkedTurns`.
        """
        self._marked = MarkedTurns(template, turns, tools, tokens)
        self._tools = tools
        self.turns = turns

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
        return self._marked.render(count, asks)

    def form(self, turn: int, end: str) -> Form:
        """An answer after its prompt, up to `end`. Raises UserError where it cannot be found."""
        prompt, answered = self.text(turn, True), self.text(turn + 1, False)
        start = len(prompt.text)
        if not answered.text.startswith(prompt.text):
            answered = self._joined(turn, prompt, answered, end)
        spans = [s for s in self._marked.spans(answered) if s.own.turn == turn and s.end > start]
        after = max((span.end for span in spans), default=start)
        texts = [span.start for span in spans if span.own.field != "reasoning_content"]
        at = answered.text.find(end, after) if end else -1
        stop = at + len(end) if at >= 0 else max(after, len(answered.text.rstrip()))
        lead = answered.text[start : max(start, min(texts, default=start))]
        return Form(turn, answered, start, stop, lead, answered.text[after:])

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
        spans = self._marked.spans(answered)
        mine = [i for i, span in enumerate(spans) if span.own.turn == turn]
        before = max((span.end for span in spans[: mine[0] if mine else None]), default=0)
        found = spans[mine[0]].start if mine else answered.text.find(end, before)
        if found < 0 or (not mine and self.turns[turn]["content"].strip()):
            raise UserError(
                f"turn {turn}: the chat template leaves out or changes the text of the answer; "
                f"{self._marked.advice}"
            )
        asked = max((span.end for span in self._marked.spans(prompt)), default=0)
        header, written = prompt.text[asked:], answered.text[before:found]
        thinks = mine and spans[mine[0]].own.field == "reasoning_content"
        if thinks and header.startswith(written) and header[len(written) :].strip():
            raise UserError(
                f"turn {turn}: the chat template's prompt ends with {header!r}, past the place of "
                "reasoning_content, so the model would be trained to think where it is asked not "
                "to; set its options (data.template_options), or leave the reasoning out"
            )
        if written.startswith(header):
            start = before + len(header)
        elif header.startswith(written):
            start = found
        else:
            raise UserError(
                f"turn {turn}: the chat template asks for an answer with {header!r} and writes it "
                f"after {written!r}, so it would be trained as inference never sees it; set its "
                f"options (data.template_options) or {self._marked.advice}"
            )
        shift = len(prompt.text) - start
        moved = [mark._replace(at=mark.at + shift) for mark in answered.marks if mark.at >= start]
        return Rendered(prompt.text + answered.text[start:], (*prompt.marks, *moved))

    def _pieces(
        self, rendered: Rendered, forms: Sequence[Form], taught: Collection[int]
    ) -> list[Piece]:
        spans, at = self._marked.spans(rendered), 0
        pieces: list[Piece] = []
        for form in forms:
            pieces += self._frame(rendered.text, spans, at, form.start)
            pieces += self._answer(rendered.text, spans, form, form.turn in taught)
            at = form.end
        pieces += self._frame(rendered.text, spans, at, len(rendered.text))
        return filled(pieces)

    def _frame(self, text: str, spans: Sequence[Span], start: int, end: int) -> Iterator[Piece]:
        """All that is no answer."""
        for chunk, span in cut(text, spans, start, end):
            role = self.turns[span.own.turn]["role"] if span else ""
            yield Piece(chunk, role, "frame", "text" if span else "markup")

    def _answer(
        self, text: str, spans: Sequence[Span], form: Form, learned: bool
    ) -> Iterator[Piece]:
        """What the model says: lead or reasoning, the answer's texts, and what ends it."""
        chunks = list(cut(text, spans, form.start, form.end))
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
        spans = self._marked.spans(rendered)
        self._check_texts(spans, count, taught)
        markup = template_part(rendered.text, spans, 0, len(rendered.text))
        for tool in self._tools:
            name = tool.get("function", tool).get("name", "")
            if name not in markup:
                raise _no_place("", "tools", name)
        said = {form.turn: form for form in forms}
        for number, turn in enumerate(self.turns[:count]):
            if turn.get("tool_calls"):
                self._check_calls(number, rendered, spans, said.get(number))

    def _check_texts(self, spans: Sequence[Span], count: int, taught: Collection[int]) -> None:
        """The part of `_check` on reasoning and content.

        What an earlier answer was thought from may be left out, as inference will see it.
        """
        whole = {span.own for span in spans if span.whole}
        for own in self._marked.texts:
            needed = own.turn < count and own.field != "tool_calls"
            needed &= own.field == "content" or own.turn in taught
            if needed and own not in whole:
                if own.field != "content":
                    raise UserError(
                        f"turn {own.turn}: the chat template has no place for {own.field}; use "
                        "one that has (data.template), or leave it out"
                    )
                raise UserError(
                    f"turn {own.turn}: the chat template changes the text of a turn or leaves it "
                    f"out ({own.text[:40]!r}); {self._marked.advice}"
                )

    def _check_calls(
        self, number: int, rendered: Rendered, spans: Sequence[Span], form: Form | None
    ) -> None:
        """The part of `_check` on the calls in an answer, which must stand in its form.

        An answer that stands otherwise than after its prompt has none; its calls may then be
        anywhere, and their names those in the list of tools.
        """
        start, end = (form.start, form.end) if form else (0, len(rendered.text))
        markup = template_part(rendered.text, spans, start, end)
        missing = left_out(self.turns[number]["tool_calls"], markup)
        there = {mark.number for mark in rendered.marks if start <= mark.at <= end}
        for at, own in enumerate(self._marked.texts):
            if (own.turn, own.field) == (number, "tool_calls") and at not in there:
                missing = own.text if missing is None else missing
        if missing is not None:
            raise _no_place(f"turn {number}: ", "tool_calls", missing)


def _no_place(where: str, field: str, part: Any) -> UserError:
    return UserError(
        f"{where}the chat template has no place for {field} (it leaves out {part!r}); use one "
        "that has (data.template), or leave them out"
    )
