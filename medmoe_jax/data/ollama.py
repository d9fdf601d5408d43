"""A Modelfile for Ollama: a chat template in its language, and what ends an answer.

Ollama's templates are those of Go's text/template. One is made from how a Jinja template renders
conversations, where these are the same few texts around every turn; no other can be made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from medmoe_jax.data.conversation import Turn
from medmoe_jax.errors import UserError

Render = Callable[[Sequence[Turn]], str]
_SYSTEM, _FIRST, _ANSWER, _SECOND = (
    Turn(role=role, content=f"({role} {number})")
    for number, role in enumerate(("system", "user", "assistant", "user"))
)
MODELFILE = "Modelfile"
_QUOTE = '"""'


class OllamaFrame(NamedTuple):
    """The texts around the turns of a conversation that ends with a question.

    Attributes:
      first: before the first question, where there is no system text.
      question: between a question and what the model says.
      lead: what it says before the text of its answer.
      answer: between an answer and the next question.
      system: before a system text, and between it and the first question; empty = the template
        has no place for one.
    """

    first: str
    question: str
    lead: str
    answer: str
    system: tuple[str, ...]


def frame_of(render: Render) -> OllamaFrame | None:
    """The frame of a template, or None where its conversations are not made of one.

    Args:
      render: a template's text of turns, with the prompt of the answer that is to follow.

    A text with the marks that quote one in a Modelfile has no place there.
    """
    long = (_FIRST, _ANSWER, _SECOND)
    single, several = _around(render, long[:1]), _around(render, long)
    if len(single) != 2 or len(several) != 4:
        return None
    first, question = single
    _, said, answer, _ = several
    lead = said.removeprefix(question)
    try:
        with_system = _around(render, (_SYSTEM, *long))
        if not with_system and _SYSTEM["content"] in render((_SYSTEM, *long)):
            return None  # it stands elsewhere than in front
    except UserError:
        with_system = []
    system = tuple(with_system[:2])
    want = [first, question + lead, answer, question]
    same = several == want and with_system in ([], [*system, *want[1:]])
    frame = OllamaFrame(first, question, lead, answer, system)
    return frame if same and _QUOTE not in _go(frame) else None


def _around(render: Render, turns: Sequence[Turn]) -> list[str]:
    """What stands before, between and after the contents; shorter where they are not all there."""
    text, out = render(turns), []
    for turn in turns:
        before, found, text = text.partition(turn["content"])
        if not found:
            return []
        out.append(before)
    return [*out, text]


def modelfile(weights: str, frame: OllamaFrame | None, ends: Sequence[str]) -> str:
    """The Modelfile.

    Args:
      weights: name of the GGUF file beside it.
      frame: of the chat template; None = Ollama takes one from the GGUF file, if it knows it.
      ends: texts that end an answer.
    """
    template = [f"TEMPLATE {_quoted(_go(frame))}"] if frame else []
    stops = [f"PARAMETER stop {_quoted(end)}" for end in ends]
    return "\n".join([f"FROM ./{weights}", *template, *stops]) + "\n"


def _go(frame: OllamaFrame) -> str:
    """The template in Go's language."""
    first, question, lead, answer = (_literal(text) for text in frame[:4])
    content, end = "{{ .Content }}", "{{ end }}"
    if frame.system:
        before, after = map(_literal, frame.system)
        first = "{{ if .System }}" + before + "{{ .System }}" + after + "{{ else }}" + first + end
    asked = '{{ if eq .Role "user" }}' + content + question
    answered = '{{ else if eq .Role "assistant" }}' + lead + content + answer
    return first + "{{ range .Messages }}" + asked + answered + end + end


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """A text in a Modelfile, over several lines or with quotes of its own."""
    if _QUOTE in text:
        raise UserError(f"{text!r}: a Modelfile of Ollama has no way to write {_QUOTE}")
    return f"{_QUOTE}{text}{_QUOTE}"
