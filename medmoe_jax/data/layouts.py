"""The built-in chat templates, as data: what is written around each role's turns.

Every answer of a conversation is written as it is at its end, so a conversation is one training
row. `Layout.jinja` gives the same template in the language of tokenizer files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.pieces import SAMPLE, Piece, filled, refuse_fields
from medmoe_jax.errors import UserError

DEFAULT_SYSTEM = "You are a helpful assistant."
_NOTHING = Piece("", "assistant", "reasoning")
_THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class TurnLayout:
    """How one role's turns are written; `space` stands before the content, as a part of it."""

    open: str = ""
    head: str = ""
    space: str = ""
    close: str = ""
    tail: str = ""
    bos: bool = False
    eos: bool = False

    def prompt(self, role: str) -> list[Piece]:
        """What stands before the content."""
        pieces = [Piece("", role, "open", "bos")] if self.bos else []
        return pieces + filled([Piece(self.open, role, "open"), Piece(self.head, role, "head")])

    def render(self, role: str, content: str, learned: bool = True) -> list[Piece]:
        """A whole turn. Reasoning in an answer, `<think>...</think>`, is a piece of its own."""
        text = self.space + content
        thought = _THINKING.match(text) if role == "assistant" else None
        at = thought.end() if thought else 0
        said = [
            Piece(text[:at], role, "reasoning", "text", learned),
            Piece(text[at:], role, "content", "text", learned),
            Piece(self.close, role, "close", learned=learned),
        ]
        said += [Piece("", role, "close", "eos", learned)] if self.eos else []
        return self.prompt(role) + filled([*said, Piece(self.tail, role, "tail")])

    def jinja(self, bos: str, eos: str, content: str) -> str:
        """A whole turn as an expression; `content` is the expression of its text."""
        before = (bos if self.bos else "") + self.open + self.head + self.space
        after = self.close + (eos if self.eos else "") + self.tail
        return f"{_quoted(before)} + {content} + {_quoted(after)}"


@dataclass(frozen=True)
class Layout:
    """A built-in template.

    `bos` stands before the conversation; with `as_text` only where other tools put it before a text
    of the vocabulary. `system_in_user` writes the system text into the first user turn. A system
    turn without a mark of its own stands at the beginning alone; elsewhere it would read as a part
    of other turns.
    """

    user: TurnLayout
    assistant: TurnLayout
    system: TurnLayout = field(default_factory=TurnLayout)
    bos: bool = False
    as_text: bool = False
    default_system: str = ""
    system_in_user: str = ""
    strip: bool = False

    frames = True

    def fitted(self, leaves_bos: bool) -> Layout:
        """The template for a vocabulary whose texts may begin without its bos."""
        return dataclasses.replace(self, bos=False) if self.as_text and leaves_bos else self

    @property
    def end(self) -> str:
        """The text that ends an answer, "" where that is eos alone."""
        return self.assistant.close.strip()

    @property
    def ends_with_eos(self) -> bool:
        """Whether an answer ends with the tokenizer's own eos."""
        return self.assistant.eos

    def prompt(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[Piece]:
        """What the model reads before it answers these turns."""
        return self._written(turns, tools) + self.assistant.prompt("assistant")

    def rows(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[list[Piece]]:
        """The conversation as one training row."""
        return [self._written(turns, tools)]

    def sample(self) -> list[Piece]:
        """The pieces of a short conversation."""
        return self._written(SAMPLE, ())

    def lead(self) -> list[Piece]:
        """Nothing stands between a prompt and the text of an answer."""
        return []

    def thought(self) -> tuple[Piece, Piece]:
        """There is no place for reasoning but in the text."""
        return _NOTHING, _NOTHING

    def _written(self, turns: Sequence[Turn], tools: Sequence[dict]) -> list[Piece]:
        refuse_fields(turns, tools, "this built-in template")
        self._check_systems(turns)
        pieces = [Piece("", "system", "open", "bos")] if self.bos else []
        for turn in self._placed(turns):
            content = turn["content"].strip() if self.strip else turn["content"]
            learned = turn.get("train_weight", 1) > 0
            pieces += getattr(self, turn["role"]).render(turn["role"], content, learned)
        return pieces

    def _check_systems(self, turns: Sequence[Turn]) -> None:
        """Raise UserError for a system turn that there is no place for."""
        for number, turn in enumerate(turns):
            asked = any(following["role"] == "user" for following in turns[number + 1 : number + 2])
            fits = number == 0 and (asked or not self.system_in_user)
            if turn["role"] == "system" and not self.system.open and not fits:
                raise UserError(
                    f"turn {number}: this built-in template has a place for one system turn, "
                    "before the first question; join the texts of several, write a later one into "
                    "the user turn after it, or use a template that marks them (data.template), as "
                    "chatml does"
                )

    def _placed(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns with the default system text added, or the system text moved."""
        has_system = bool(turns) and turns[0]["role"] == "system"
        if self.default_system and not has_system:
            return [{"role": "system", "content": self.default_system}, *turns]
        if self.system_in_user and has_system:
            system, first, *rest = turns
            system = system["content"].strip() if self.strip else system["content"]
            content = first["content"].strip() if self.strip else first["content"]
            content = self.system_in_user.format(system=system) + content
            return [{"role": first["role"], "content": content}, *rest]
        return turns

    def sources(self, bos: str, eos: str) -> list[str]:
        """In Jinja, without and with the space that some vocabularies put after a bos."""
        return [self.jinja(bos, eos, gap) for gap in ("", " ")]

    def jinja(self, bos: str = "", eos: str = "", gap: str = "") -> str:
        """The same template in Jinja, for a vocabulary with these texts of bos and eos.

        `gap` follows a bos: the space that some vocabularies put before a text where it begins.
        """
        bos = bos and bos + gap
        content = "(m.content | trim)" if self.strip else "m.content"
        lines = [*self._jinja_start(bos, eos, content), "{%- for m in turns %}"]
        place = f"(before if loop.first else '') + {content}" if self.system_in_user else content
        cases = {role: f"m.role == '{role}'" for role in ("system", "user", "assistant")}
        if self.system_in_user:
            del cases["system"]
        elif not self.system.open:
            cases["system"] += " and loop.first"
        for number, (role, case) in enumerate(cases.items()):
            written = getattr(self, role).jinja(bos, eos, place)
            lines.append(f"{{%- {'elif' if number else 'if'} {case} %}}")
            lines.append(f"    {{{{- {written} }}}}")
        answer = (bos if self.assistant.bos else "") + self.assistant.open + self.assistant.head
        lines += [
            "{%- else %}",
            "    {{- raise_exception('this template has no place here for the role ' + m.role) }}",
            "{%- endif %}",
            "{%- endfor %}",
            "{%- if add_generation_prompt %}",
            f"    {{{{- {_quoted(answer)} }}}}",
            "{%- endif %}",
        ]
        return "\n".join(lines) + "\n"

    def _jinja_start(self, bos: str, eos: str, content: str) -> list[str]:
        """What stands before the loop over `turns`."""
        lines = ["{%- set turns = messages %}"]
        if self.bos:
            lines.append(f"{{{{- {_quoted(bos)} }}}}")
        if self.default_system:
            default = self.system.jinja(bos, eos, _quoted(self.default_system))
            lines += [
                "{%- if not messages or messages[0].role != 'system' %}",
                f"    {{{{- {default} }}}}",
                "{%- endif %}",
            ]
        if self.system_in_user:
            first, last = self.system_in_user.split("{system}")
            system = content.replace("m.", "messages[0].")
            lines += [
                "{%- set before = '' %}",
                "{%- if messages | length > 1 and messages[0].role == 'system' "
                "and messages[1].role == 'user' %}",
                f"    {{%- set before = {_quoted(first)} + {system} + {_quoted(last)} %}}",
                "    {%- set turns = messages[1:] %}",
                "{%- endif %}",
            ]
        return lines


def _quoted(text: str) -> str:
    """A text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)


def _chatml(role: str) -> TurnLayout:
    return TurnLayout(open="<|im_start|>", head=f"{role}\n", close="<|im_end|>", tail="\n")


def _llama3(role: str) -> TurnLayout:
    head = f"{role}<|end_header_id|>\n\n"
    return TurnLayout(open="<|start_header_id|>", head=head, close="<|eot_id|>")


def _gemma(role: str) -> TurnLayout:
    return TurnLayout(open="<start_of_turn>", head=f"{role}\n", close="<end_of_turn>", tail="\n")


TEMPLATES: dict[str, Layout] = {
    "chatml": Layout(
        system=_chatml("system"),
        user=_chatml("user"),
        assistant=_chatml("assistant"),
        default_system=DEFAULT_SYSTEM,
    ),
    # Every question begins a new text, as in the family's own chat format.
    "llama2": Layout(
        user=TurnLayout(bos=True, open="[INST]", space=" ", tail=" [/INST]"),
        assistant=TurnLayout(space=" ", close=" ", eos=True),
        system_in_user="<<SYS>>\n{system}\n<</SYS>>\n\n",
        strip=True,
    ),
    "llama3": Layout(
        system=_llama3("system"),
        user=_llama3("user"),
        assistant=_llama3("assistant"),
        bos=True,
        strip=True,
    ),
    "gemma": Layout(
        user=_gemma("user"),
        assistant=_gemma("model"),
        bos=True,
        system_in_user="{system}\n\n",
        strip=True,
    ),
    "user_assistant": Layout(
        system=TurnLayout(tail="\n"),
        user=TurnLayout(open="User:", tail="\n"),
        assistant=TurnLayout(open="Assistant:", eos=True),
        bos=True,
        as_text=True,
    ),
    # A space before the answer, where the field's evaluation tools put it as well.
    "plain": Layout(
        user=TurnLayout(), assistant=TurnLayout(space=" ", eos=True), bos=True, as_text=True
    ),
}
