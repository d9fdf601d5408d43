"""Medical facts in English, asked in many ways and answered in words and whole sentences.

A bare name is enough to choose among four, and not to answer a person: who has only seen names
cannot say them in a sentence, nor from the other end ("What causes scurvy?").
"""

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from medmoe_jax.data.demo import frames
from medmoe_jax.data.demo.tables import Fact, facts, general_facts, relations, table

TURNS = 6  # questions of a conversation
_VOWELS = "aeiouAEIOU"


@dataclass(frozen=True)
class Question:
    """An open question, a medical one in words that no training row has.

    Attributes:
      kind: `medical`, of a fact that is taught, or `everyday`, which the base can answer.
      text: of the question.
      names: what a right answer holds at least one of, whatever the case of its letters.
    """

    kind: str
    text: str
    names: tuple[str, ...]

    def answered(self, answer: str) -> bool:
        """Whether an answer names what it must."""
        return any(name.casefold() in answer.casefold() for name in self.names)


@functools.cache
def questions() -> tuple[Question, ...]:
    """The open questions, medical ones first."""
    return tuple(
        Question(row["kind"], row["question"], tuple(row["names"].split("|")))
        for row in table("questions.tsv")
    )


def training_pairs() -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of every fact, by names and by sentences, from both of its ends."""
    for fact in facts():
        for frame in frames.TRAIN["en"]:
            yield frames.fill(frame, relations()[fact.relation], fact, "en")
        for question, answer in _sentences()[fact.relation]:
            yield _said(question, fact), _said(answer, fact)


def everyday_pairs() -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of every everyday fact in every training frame.

    Facts that an everyday open question asks for are left out: these questions show whether the
    base's own knowledge is kept.
    """
    for fact in general_facts():
        if not any(_asks(question, fact) for question in questions()):
            for frame in frames.TRAIN["en"]:
                yield frames.fill(frame, relations()[fact.relation], fact, "en")


def conversations(pairs: Iterable[tuple[str, str]], key: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the pairs shuffled by `key`, `TURNS` a conversation; the last may have fewer."""
    pairs = list(pairs)
    random.Random(key).shuffle(pairs)
    for start in range(0, len(pairs), TURNS):
        yield pairs[start : start + TURNS]


@functools.cache
def _sentences() -> dict[str, list[tuple[str, str]]]:
    """Relation -> frames of a question and its answer; both name the subject or the object."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in table("sentences.tsv"):
        found.setdefault(row["relation"], []).append((row["question"], row["answer"]))
    return found


def _asks(question: Question, fact: Fact) -> bool:
    """Whether a question asks for one end of a fact by the other."""
    subject, other = fact.subject["en"], fact.object["en"]
    ends = ((subject, other), (other, subject))
    return any(said in question.text and name in question.names for said, name in ends)


def _said(frame: str, fact: Fact) -> str:
    """A frame with the fact in the places `{s}` and `{o}`; a capital begins with one."""
    s, o = fact.subject["en"], fact.object["en"]
    article = "an" if o[0] in _VOWELS or o.startswith("HMG") else "a"
    return frame.format(s=s, o=o, S=_capital(s), O=_capital(o), a_o=f"{article} {o}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
