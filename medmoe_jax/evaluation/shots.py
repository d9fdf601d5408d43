"""Examples before a prompt, and prompts that fit a model's context."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from medmoe_jax.data.conversation import Turn
from medmoe_jax.data.medical import Row, shorten
from medmoe_jax.data.medical.row import normal
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.items import Item, Prompt, as_turns
from medmoe_jax.ranges import NOT_NEGATIVE

FORMS = ("prompt", "turns")
PARTED = ("\n\n",)  # parts examples within one prompt: an answer that goes on beyond is cut there


@dataclass(frozen=True)
class Shots:
    """How many examples stand before each item, and whether in its prompt or as turns before it."""

    count: int = 0
    form: str = "prompt"

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check_whole("shots", self.count)
        if self.form not in FORMS:
            raise UserError(f"shots: the form {self.form!r} is none of {', '.join(FORMS)}")


def draw(name: str, pool: Sequence, count: int, seed: int) -> list:
    """Seeded examples, the same for every item. Raises UserError where the pool is too small."""
    if count > len(pool):
        raise UserError(f"{name}: {count} shots asked for, {len(pool)} rows to take from")
    return random.Random(f"{seed} shots").sample(list(pool), count)


def part(name: str, rows: Sequence, count: int, seed: int) -> tuple[list, list]:
    """(rows to ask, pool of `count` rows) of a set without training rows; none is in both.

    Raises UserError where none is left to ask.
    """
    pool = draw(name, rows, count, seed)
    taken = {normal(str(row.prompt)) for row in pool}
    asked = [row for row in rows if normal(str(row.prompt)) not in taken]
    if not asked:
        raise UserError(f"{name}: its {len(rows)} rows are all taken by {count} shots; give fewer")
    return asked, pool


def until(name: str, few: Shots, examples: Sequence, answers: Iterable[str]) -> tuple[str, ...]:
    """What ends a written answer beside its own end: what would part it from a next example.

    Raises UserError where an answer holds that itself, so that what is right would be cut.
    """
    if not examples or few.form != "prompt":
        return ()
    if any(end in answer for answer in answers for end in PARTED):
        raise UserError(
            f"{name}: some of its answers hold an empty line, which parts the examples of one "
            "prompt; ask with examples as turns (--shots-as=turns)"
        )
    return PARTED


def prompt(text: str, examples: Sequence[Row | _Pair], form: str, guide: str = "") -> Prompt:
    """A row's prompt with a guide and examples before it."""
    if not examples:
        return guide + text
    if form == "prompt":
        told = "".join(f"{r.prompt}{_joint(r.prompt)}{r.response}{PARTED[0]}" for r in examples)
        return guide + told + text
    turns = [pair for r in examples for pair in (("user", r.prompt), ("assistant", r.response))]
    turns[0] = ("user", guide + turns[0][1])
    return (*turns, ("user", text))


def before_item(item: Item, examples: Sequence[Item], form: str) -> Item:
    """A user's item with examples before it; of several turns they are further turns.

    The system's turn that an item begins with stays the first, and examples do not repeat it.
    """
    if not examples:
        return item
    rows = [_Pair(e.prompt, e.answer) for e in examples if isinstance(e.prompt, str)]
    if isinstance(item.prompt, str) and len(rows) == len(examples):
        return replace(item, prompt=prompt(item.prompt, rows, form), own=item.prompt)
    own = _turns(item.prompt)
    lead = own[:1] if own[0][0] == "system" else ()
    told = list(lead)
    for example in examples:
        turns = _turns(example.prompt)
        further = turns[1:] if turns[:1] == lead else turns
        told += [*further, ("assistant", example.answer)]
    return replace(item, prompt=(*told, *own[len(lead) :]), own=item.prompt)


@dataclass(frozen=True)
class _Pair:
    prompt: str
    response: str


def _turns(prompt: Prompt) -> tuple:
    return (("user", prompt),) if isinstance(prompt, str) else prompt


def _joint(text: str) -> str:
    """What stands between an example's prompt and its answer: a space after a cue."""
    return " " if text.rstrip()[-1:] in ":：?？)）" else "\n"


class _Encoder(Protocol):
    def prompt(self, turns: Sequence[Turn]) -> list[int]: ...


class Fitter:
    """Shortens the text of a row so that prompt and answer fit a context of `length` tokens.

    Attributes:
      shortened: rows it has shortened so far.
    """

    def __init__(
        self,
        encoder: _Encoder,
        length: int,
        max_tokens: int | None = None,
        written_choices: int = 0,
        added: Sequence[str] = (),
    ) -> None:
        """
        Args:
          encoder: gives the ids of a prompt.
          length: of the context.
          max_tokens: of a written answer; None = as the task says.
          written_choices: least room for a choice that is answered in text; 0 = it is scored.
          added: texts, of which one will stand after the prompt of such a choice.
        """
        self.encoder = encoder
        self.length = length
        self.max_tokens = max_tokens
        self.written_choices = written_choices
        self.added = added
        self.shortened = 0
        self._sizes: dict[str, int] = {}

    def __call__(self, row: Row, whole: Callable[[str], Prompt], max_tokens: int) -> Row:
        """The row, or one with less text.

        Args:
          row: of a set.
          whole: its prompt with all that stands before it.
          max_tokens: of a written answer.

        Raises:
          UserError: what may not be cut does not fit.
        """

        def measure(text: str) -> int:
            prompt = as_turns(whole(text))
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return len(self.encoder.prompt(turns))

        room = self._room(row, max_tokens)
        needed = measure(row.prompt)
        if needed + room <= self.length:
            return row
        self.shortened += 1
        short = shorten(row, self.length - room, measure)
        least = measure(short.prompt)
        if least + room > self.length:
            raise UserError(
                f"{row.name}: a prompt of {needed} tokens cannot be cut below {least}, and with "
                f"{room} for the answer it does not fit a context of {self.length}"
            )
        return short

    def _room(self, row: Row, max_tokens: int) -> int:
        """Tokens for the answer."""
        if row.kind == "generate" or self.written_choices:
            written = row.kind == "choice"
            least = max(max_tokens, self.written_choices if written else 0)
            asked = max(map(self._size, self.added), default=0) if written else 0
            return asked + (least if self.max_tokens is None else self.max_tokens)
        # A space may come before it, and the mark that ends a turn after it.
        return max(map(self._size, {*row.choices, *row.texts}), default=0) + 2

    def _size(self, text: str) -> int:
        if text not in self._sizes:
            given, empty = (
                len(self.encoder.prompt([{"role": "user", "content": t}])) for t in (text, "")
            )
            self._sizes[text] = max(1, given - empty)
        return self._sizes[text]
