"""Ways to have an item answered, and what a model said to it.

| way | the model |
|---|---|
| `letter` | scores each letter or label as its answer; the likeliest is taken |
| `text` | scores each option's own text |
| `constrained` | answers greedily, among the letters or labels alone |
| `free` | answers in free text, in which the choice is read |
| `reason` | is asked to reason and to end with "the answer is", and the choice is read |

Tasks without choices are answered in text, whatever the way.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import answers, metrics, readings
from medmoe_jax.evaluation.items import Item, Prompt, as_turns, last_line, with_text
from medmoe_jax.evaluation.tasks import Task
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE

ANSWERS = ("letter", "text", "constrained", "free", "reason")
SCORES = ("sum", "token", "byte", "unconditional")
_SCORED = ("letter", "text")
_WRITTEN = ("free", "reason")
_LEAST = {"free": 512, "reason": 1024}  # tokens to answer a choice in text
# What a model is asked to do first, by language; English for the others.
REASON = {
    "en": "\nReason step by step first. Then end with “The answer is …”.",
    "zh": "\n请先逐步分析，再以“答案为……”结尾。",
    "ja": "\nまず順を追って考え、最後に「答えは…」と書いてください。",
    "fr": "\nRaisonnez d'abord étape par étape, puis terminez par « La réponse est … ».",
    "es": "\nRazone primero paso a paso y termine con «La respuesta es …».",
    "ru": "\nСначала рассуждайте по шагам и закончите словами «Ответ: …».",
    "de": "\nÜberlegen Sie zuerst Schritt für Schritt und schließen Sie mit „Die Antwort ist …“.",
    "ar": "\nفكّر أولاً خطوة بخطوة، ثم اختم بعبارة «الإجابة هي …».",
    "hi": "\nपहले चरण-दर-चरण सोचिए, फिर अंत में लिखिए: «उत्तर … है»।",
}


class EvaluatedModel(Protocol):
    """All that evaluation asks of a model. A prompt is a text or a list of turns.

    shortened: prompts that it has cut so far, each time that it was asked one, to fit its context.
    """

    shortened: int

    def choose(
        self,
        prompts: Sequence,
        choices: Sequence[Sequence[str]],
        ending: bool,
        done: Callable[[int], object],
    ) -> list[list[tuple[float, int]]]:
        """For each prompt and choice: (sum of log probabilities, number of tokens).

        `done` is told how many prompts have theirs, whenever some have.
        """

    def constrained(self, prompts: Sequence, choices: Sequence[Sequence[str]]) -> list[int]:
        """The place of the choice that each prompt's greedy answer is, among its choices."""

    def answer(self, prompts: Sequence, max_tokens: int, sampling: Sampling) -> list:
        """Answers with `text`, and `ended` where the model came to its end itself."""


@dataclass(frozen=True)
class Way:
    """How items are answered.

    answer: one of the ways above.
    score: of a likelihood: `sum`, a `token`, a `byte`, or less that after the last line alone
      (`unconditional`).
    ending: the mark that ends a turn counts in a likelihood.
    samples, temperature: of a written choice, how many are drawn; most of them decide.
    reading: how a choice is read in text: "" by where it stands, or a name of `readings`.
    max_tokens: of a written answer; None = as the task says.
    """

    answer: str = "letter"
    score: str = "sum"
    ending: bool = False
    samples: int = 1
    temperature: float = 0.0
    reading: str = ""
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("answer", self.answer, ANSWERS),
            ("score", self.score, SCORES),
            ("reading", self.reading, ("", *readings.READINGS)),
        ):
            if value not in known:
                raise UserError(f"{name}: {value!r} is none of {', '.join(filter(None, known))}")
        COUNT.check_whole("samples", self.samples)
        NOT_NEGATIVE.check("temperature", self.temperature)
        if self.max_tokens is not None:
            COUNT.check_whole("max_tokens", self.max_tokens)
        if self.samples > 1 and (self.temperature <= 0 or self.answer not in _WRITTEN):
            raise UserError(
                "several samples need a temperature above 0, and an answer that is written "
                f"({' or '.join(_WRITTEN)})"
            )
        if self.answer not in _SCORED and (self.score != "sum" or self.ending):
            raise UserError(
                "a score, and the mark that ends a turn in it, need an answer that is scored "
                f"({' or '.join(_SCORED)})"
            )
        if self.reading and self.answer in _SCORED:
            raise UserError(f"{self.reading} reads what is written; {self.answer} is scored")

    def room(self, task: Task) -> int:
        """Most tokens of a written answer to a task."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(task.max_tokens, self.least if task.kind == "choice" else 0)

    def scored(self, task: Task) -> bool:
        """Whether answers to a task are scored, which takes least time with all items at once."""
        return task.kind == "choice" and self.answer in _SCORED

    @property
    def asks(self) -> tuple[str, ...]:
        """What may stand after a prompt, to ask for reasoning."""
        return tuple(REASON.values()) if self.answer == "reason" else ()

    @property
    def least(self) -> int:
        """Least tokens for a choice that is answered in text; 0 where it is scored."""
        return _LEAST.get(self.answer, 0)


@dataclass(frozen=True)
class Response:
    """What a model said to an item.

    text: its choice, '' for none; or what it wrote.
    ranking, scores: the choices, best first, and the score of each in the item's order; empty
      where none was scored.
    raw: all that it wrote.
    parsed: whether an answer could be read. cut: whether it was cut at the most tokens.
    """

    text: str
    ranking: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    raw: tuple[str, ...] = ()
    parsed: bool = True
    cut: bool = False


def ask(
    model: EvaluatedModel,
    task: Task,
    items: Sequence[Item],
    way: Way,
    seed: int,
    first: int,
    done: Callable[[int], object],
) -> list[Response]:
    """The answers to items of a task, the first of which is its item number `first`.

    Each item has draws of its own. `done` is told how many items are answered, whenever some are.

    Raises:
      ValueError: the model's scores are NaN.
      UserError: the task's metric looks at the ranking of all choices, and none is scored; or
        several samples are asked for, and it has no choices.
    """
    if way.samples > 1 and task.kind == "generate":
        raise UserError(
            f"task {task.name!r} has no choices, of which most samples could decide; "
            "ask it with one sample"
        )
    if way.scored(task):
        return _likeliest(model, task, items, way, done)
    if metrics.find(task.metric).ranked:
        raise UserError(
            f"metric {task.metric!r} needs a score of every choice, which the answer "
            f"{way.answer!r} has not; ask with {' or '.join(_SCORED)}"
        )
    sampling = Sampling(temperature=way.temperature, seed=seed, first=first)
    if task.kind == "generate":
        given = _written(model, task, items, way, sampling)
    elif way.least:
        given = _read(model, task, items, way, sampling)
    else:
        places = model.constrained([i.turns for i in items], [i.choices for i in items])
        chosen = (item.choices[place] for item, place in zip(items, places, strict=True))
        given = [Response(choice) for choice in chosen]
    done(len(given))
    return given


def asked(task: Task, item: Item, way: Way) -> Prompt:
    """All that a model is asked for an item: its prompt, and to reason where it is to."""
    if task.kind != "choice" or way.answer != "reason":
        return item.prompt
    return with_text(item.prompt, REASON.get(item.language, REASON["en"]))


def _likeliest(
    model: EvaluatedModel,
    task: Task,
    items: Sequence[Item],
    way: Way,
    done: Callable[[int], object],
) -> list[Response]:
    """The choices of each item, best first; of equals the one that stands first."""
    given = [i.texts if way.answer == "text" and i.texts else i.choices for i in items]
    base: list[list[float]] = [[0.0] * len(texts) for texts in given]
    if way.score == "unconditional":
        cues = [last_line(i.prompt) or " " for i in items]
        alone = model.choose(cues, given, way.ending, lambda cues: done(0))
        base = [[total for total, _ in row] for row in alone]
    pairs = model.choose([i.turns for i in items], given, way.ending, done)
    out = []
    for item, texts, row, less in zip(items, given, pairs, base, strict=True):
        values = tuple(
            _score(way.score, total, count, text) - b
            for (total, count), text, b in zip(row, texts, less, strict=True)
        )
        if any(math.isnan(value) for value in values):
            raise ValueError(f"{task.name}: the model's score of a choice is NaN")
        order = sorted(range(len(values)), key=lambda place, of=values: -of[place])
        ranking = tuple(item.choices[place] for place in order)
        out.append(Response(ranking[0], ranking, values))
    return out


def _score(kind: str, total: float, count: int, text: str) -> float:
    if kind == "token":
        return total / max(1, count)
    return total / max(1, len(text.encode())) if kind == "byte" else total


def _write(model, task, way: Way, sampling: Sampling, prompts) -> list:
    """Written answers, cut where an example would follow."""
    until = task.until if way.answer != "reason" else ()
    out = []
    for written in model.answer(prompts, way.room(task), sampling):
        said = written.text.lstrip("\n") if until else written.text
        ends = [end for end in map(said.find, until) if end > 0]
        text = said[: min(ends)] if ends else said
        out.append((text, written.ended or bool(ends)))
    return out


def _written(
    model, task: Task, items: Sequence[Item], way: Way, sampling: Sampling
) -> list[Response]:
    """Answers to a task without choices."""
    readable = metrics.find(task.metric).readable
    found = _write(model, task, way, sampling, [item.turns for item in items])
    return [
        Response(text, raw=(text,), parsed=readable(text, item), cut=not ended)
        for item, (text, ended) in zip(items, found, strict=True)
    ]


def _read(model, task: Task, items: Sequence[Item], way: Way, sampling: Sampling) -> list[Response]:
    """Choices read in written answers; of several samples the commonest, of equals the first."""
    turns = [as_turns(asked(task, item, way)) for item in items]
    drawn = [
        _write(model, task, way, replace(sampling, seed=_seed(sampling.seed, n)), turns)
        for n in range(way.samples)
    ]
    out = []
    for item, samples in zip(items, zip(*drawn, strict=True), strict=True):
        named = [_choice(text, item, way.reading) for text, _ in samples]
        votes = Counter(choice for choice in named if choice)
        text = votes.most_common(1)[0][0] if votes else ""
        raw = tuple(text for text, _ in samples)
        cut = any(not ended for _, ended in samples)
        out.append(Response(text, raw=raw, parsed=bool(votes), cut=cut))
    return out


def _seed(seed: int, sample: int) -> int:
    """The seed of a sample: another one for each pair, the first sample's the one given."""
    if not sample:
        return seed
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _choice(text: str, item: Item, reading: str) -> str | None:
    if reading:
        return readings.read(reading, text, item.choices)
    return answers.pick(text, item.choices, item.texts)
