"""One item of a task: a prompt, its right answer, and what the answer is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from medmoe_jax.data.conversation import Turn

Turns = tuple[tuple[str, str], ...]  # (role, content) of each
Prompt = str | Turns


class Criterion(NamedTuple):
    """What may be true of an answer, its points, negative of a fault, and words to sort it by."""

    criterion: str
    points: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """A prompt and its right answer.

    prompt: a user's turn, or several turns of which the last is a user's.
    choices: letters or labels to choose among; empty for free text.
    texts: what the letters stand for, where they are known.
    language, part: of the item within its task.
    allowed: of a list as the answer, the terms that may stand in it; of a number, its limits.
    source, spans: a text, and `(type, start, stop)` of the entities in it.
    rubric: what a judge looks for in the answer.
    own: the prompt without examples, where some stand before it.
    """

    prompt: Prompt
    answer: str
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    language: str = ""
    part: str = ""
    allowed: tuple[str, ...] = ()
    source: str = ""
    spans: tuple[tuple[str, int, int], ...] = ()
    rubric: tuple[Criterion, ...] = ()
    own: Prompt = ""

    @property
    def turns(self) -> str | list[Turn]:
        """The prompt as a model takes it."""
        return as_turns(self.prompt)


def as_turns(prompt: Prompt) -> str | list[Turn]:
    """A prompt as a model takes it: a text, or a list of `{"role", "content"}`."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": role, "content": content} for role, content in prompt]


def with_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with a text after its last turn."""
    if isinstance(prompt, str):
        return prompt + text
    (*before, (role, content)) = prompt
    return (*before, (role, content + text))


def last_line(prompt: Prompt) -> str:
    """The last line of a prompt: the cue that the answer follows."""
    text = prompt if isinstance(prompt, str) else prompt[-1][1]
    return text.rpartition("\n")[2]
