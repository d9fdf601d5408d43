"""Chat templates in Jinja, as tokenizer files bring them.

What inference reads, and how a template writes an answer, is found by rendering (`RenderedTalk`).
Here: the template itself, its variables, and what a plain answer looks like in it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes

from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.jinja_limits import Sandbox, rendered
from medmoe_jax.data.pieces import CALLED, SAMPLE, TOOLS, Piece, filled
from medmoe_jax.data.talk import Form, RenderedTalk
from medmoe_jax.errors import UserError

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
_DATE = "strftime_now"  # the function that templates call for the date
# What shows where a template puts the reasoning before an answer.
_THOUGHTFUL: tuple[Turn, ...] = (
    SAMPLE[0],
    {**SAMPLE[1], "reasoning_content": "(for a reason)"},
)
_THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
# What a template's own code may raise on a conversation that it was not written for.
_FAULTS = (
    *(TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
    *(RecursionError, MemoryError),
)


class _Shape(NamedTuple):
    """How a template writes a short conversation.

    Attributes:
      sample: the conversation.
      form: its answer.
      lead: what stands between the prompt and the text of a plain answer.
      thought: what stands before and after the reasoning of an answer.
    """

    sample: Sequence[Turn]
    form: Form
    lead: str
    thought: tuple[str, str]


class Jinja:
    """A chat template in Jinja. Implements `pieces.Template`.

    Attributes:
      source: the template's text.
      options: variables that were set beside those that every template is given.
      thinks: whether it has a place for the reasoning before an answer.
      end: the text that ends an answer, stripped.
    """

    frames = False
    ends_with_eos = False

    def __init__(
        self,
        source: str,
        names: Mapping[str, str] | None = None,
        tokens: Collection[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
          source: the template.
          names: texts of the tokens that templates ask for, such as `eos_token`.
          tokens: texts of the vocabulary's tokens of their own; the first after an answer ends it.
          options: further variables, such as `enable_thinking`. `strftime_now` is the date, as
            YYYY-MM-DD, for templates that write today's.

        Raises:
          UserError: the template cannot be read, an option is none of its variables, or it writes
            nothing after an answer that could end it.
        """
        self.source, self.options = source, dict(options or {})
        environment = Sandbox({"tojson": _to_json})
        try:
            self._tree = environment.parse(source)
            self._template = environment.from_string(source, {"raise_exception": _raise})
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from error
        except (*_FAULTS, SyntaxError) as error:  # of its numbers, or too deep for the compiler
            raise UserError(f"chat template: cannot be compiled: {error}") from error
        names = dict(names or {})
        # White space is a token of some vocabularies, but marks nothing.
        marks = sorted({t for t in (*tokens, *names.values()) if t.strip()}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, marks)) or "(?!)", re.IGNORECASE)
        self._values: dict[str, Any] = {"documents": None, **names, **self._checked_options(names)}
        self._text_arguments = False
        self._text_arguments = self._wants_text()
        self.thinks = self._differ(SAMPLE, _THOUGHTFUL)
        self._shape = self._shown()
        self.end = self._shape.form.first_end([*tokens, *names.values()])
        if not self.end:
            raise UserError(
                "the chat template writes nothing after an answer that could end it, so a model "
                "would never learn to stop; use one that writes eos or a mark there (data.template)"
            )
        if self.end in self._shape.lead:
            raise UserError(
                f"the chat template writes {self.end!r}, which ends an answer, before the answer's "
                "text; use a built-in template (data.template)"
            )

    def prompt(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[Piece]:
        """What the model reads before it answers these turns."""
        return RenderedTalk(self, self._thoughts_apart(turns), tools, self._tokens).prompt(self.end)

    def rows(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[list[Piece]]:
        """The training rows of a conversation; see `pieces.Template`."""
        return RenderedTalk(self, self._thoughts_apart(turns), tools, self._tokens).rows(self.end)

    def sample(self) -> list[Piece]:
        """The pieces of a short conversation."""
        return self.rows(self._shape.sample)[0]

    def lead(self) -> list[Piece]:
        """What stands between a prompt and the text of a plain answer."""
        return filled([Piece(self._shape.lead, "assistant", "lead")])

    def thought(self) -> tuple[Piece, Piece]:
        """What stands before and after the reasoning of an answer; empty where it has no place."""
        before, after = self._shape.thought
        return Piece(before, "assistant", "reasoning"), Piece(after, "assistant", "reasoning")

    def render(self, turns: Sequence[Mapping], tools: Sequence[Mapping], asks: bool) -> str:
        """The text of some turns, with the generation prompt if it `asks` for an answer.

        Raises:
          UserError: the template refuses them.
        """
        if self._text_arguments:
            turns = [_with_text_arguments(turn) for turn in turns]
        try:
            return rendered(
                self._template,
                {
                    "messages": list(turns),
                    "tools": list(tools) or None,
                    "add_generation_prompt": asks,
                    **self._values,
                },
            )
        except jinja2.TemplateError as error:
            date = f" (data.template_options.{_DATE}='YYYY-MM-DD' gives the date)"
            hint = date if _DATE in str(error) else ""
            message = f"the chat template refuses this conversation: {error}{hint}"
            raise UserError(message) from error
        except _FAULTS as error:
            raise UserError(f"the chat template fails on this conversation: {error}") from error

    def sources(self, bos: str, eos: str) -> list[str]:
        """What `jinja` gives; it asks for bos and eos by their names."""
        del bos, eos
        return [self.jinja()]

    def jinja(self) -> str:
        """The source with its options as defaults, so that other tools render the same text."""
        lines = []
        for name, value in self.options.items():
            literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
            default = f"{{%- set {name} = {literal} %}}"
            unless = f"{{%- if {name} is not defined %}}{default}{{%- endif %}}"
            lines.append(self._dated() if name == _DATE else unless)
        if _DATE in self._names() and _DATE not in self.options:
            # What asks whether there is such a function found none here either.
            lines.append(f"{{%- set {_DATE} = no_such_function %}}")
        return "".join(lines) + self.source

    def _dated(self) -> str:
        """A macro in place of the date function, for the formats that the template names."""
        calls = (call for call in self._tree.find_all(jinja2.nodes.Call) if call.args)
        formats = {
            call.args[0].value
            for call in calls
            if getattr(call.node, "name", "") == _DATE
            and isinstance(call.args[0], jinja2.nodes.Const)
        }
        cases = "".join(
            f"{{%- if format == {json.dumps(f)} %}}{self._values[_DATE](f)}{{%- endif %}}"
            for f in sorted(formats)
        )
        return f"{{%- macro {_DATE}(format) %}}{cases}{{%- endmacro %}}"

    def _names(self) -> set[str]:
        return {node.name for node in self._tree.find_all(jinja2.nodes.Name)}

    def _checked_options(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The options as the template is given them. Raises UserError for one it does not use."""
        used = self._names() - {*_GIVEN, *names}
        unknown = [name for name in self.options if name not in used]
        if unknown:
            known = ", ".join(sorted(used)) or "none"
            raise UserError(
                f"data.template_options.{unknown[0]}: the chat template has no such variable (it "
                f"uses {known})"
            )
        values = dict(self.options)
        if _DATE in values:
            try:
                values[_DATE] = datetime.date.fromisoformat(values[_DATE]).strftime
            except (TypeError, ValueError):
                raise UserError(
                    f"data.template_options.{_DATE}: {values[_DATE]!r} is no date; write YYYY-MM-DD"
                ) from None
        return values

    def _thoughts_apart(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns; an answer that holds its own `<think>` block as reasoning and content."""
        return [_thought_apart(turn) if self.thinks else turn for turn in turns]

    def _wants_text(self) -> bool:
        """Whether arguments of tool calls must be JSON text, as some templates expect them.

        A template may refuse a conversation for other reasons, so they must be what it takes.
        """
        return any(
            self._refuses(turns) and not self._refuses([_with_text_arguments(t) for t in turns])
            for turns in (CALLED, CALLED[:2])
        )

    def _refuses(self, turns: Sequence[Mapping]) -> bool:
        try:
            self.render(turns, TOOLS, False)
        except UserError:
            return True
        return False

    def _differ(self, one: Sequence[Turn], other: Sequence[Turn]) -> bool:
        texts = {RenderedTalk(self, turns).text(len(turns), False).text for turns in (one, other)}
        return len(texts) > 1

    def _shown(self) -> _Shape:
        """How it writes a short conversation."""
        thoughtful, thought = None, ("", "")
        if self.thinks:
            try:
                thoughtful = RenderedTalk(self, _THOUGHTFUL).form(1, "")
            except UserError:  # its options close the thoughts in the prompt
                pass
            else:
                before, _, after = thoughtful.lead.partition(_THOUGHTFUL[1]["reasoning_content"])
                thought = (before, after)
        try:
            form = RenderedTalk(self, SAMPLE).form(1, "")
        except UserError:
            if thoughtful is None:
                raise
            # A template whose answers always begin with reasoning.
            return _Shape(_THOUGHTFUL, thoughtful, "", thought)
        return _Shape(SAMPLE, form, form.lead, thought)


def _with_text_arguments(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    if not turn.get("tool_calls"):
        return turn
    calls = [
        {**call, "function": {**f, "arguments": _to_json(f["arguments"])}}
        for call in turn["tool_calls"]
        for f in (call["function"],)
    ]
    return {**turn, "tool_calls": calls}


def _thought_apart(turn: Turn) -> Turn:
    found = _THINKING.match(turn["content"])
    if turn["role"] != "assistant" or "reasoning_content" in turn or not found:
        return turn
    if not found[1].strip():
        return turn
    reasoning, content = found[1].strip("\n"), found[2].lstrip("\n")
    return {**turn, "reasoning_content": reasoning, "content": content}


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
