"""Medical knowledge: training rows and four-option items from the table of facts."""

import random
from collections.abc import Iterator

from medmoe_jax.data.demo import frames
from medmoe_jax.data.demo.tables import LANGUAGES, Fact, facts, relations


def training_pairs() -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, answer, language) of every fact in every training frame."""
    for fact in facts():
        for language in LANGUAGES:
            for frame in frames.TRAIN[language]:
                yield *frames.fill(frame, relations()[fact.relation], fact, language), language


def items(seed: int) -> Iterator[dict]:
    """Yield one four-option item per fact and language, in held-out frames.

    The facts of a relation are cut into groups of four that share a frame, and the four objects
    of a group are the choices of each of its items. So within a group every object is right once
    and wrong three times, and a preference that ignores the question scores exactly 25%.
    """
    for language in LANGUAGES:
        for name, members in _by_relation().items():
            rng = random.Random(f"{seed}/knowledge/{language}/{name}")
            shuffled = rng.sample(members, len(members))
            offset = rng.randrange(len(frames.HELD_OUT[language]))
            for start in range(0, len(shuffled), 4):
                held_out = frames.HELD_OUT[language]
                frame = held_out[(start // 4 + offset) % len(held_out)]
                yield from _group_items(frame, shuffled[start : start + 4], language)


def _group_items(frame, group: list[Fact], language: str) -> Iterator[dict]:
    for i, fact in enumerate(group):
        relation = relations()[fact.relation]
        choices = [
            frames.fill(frame, relation, fact, language, other.object[language])[1]
            for other in group[i % 4 :] + group[: i % 4]
        ]
        rotation = (i * 3) % 4
        prompt, answer = frames.fill(frame, relation, fact, language)
        yield {
            "prompt": prompt,
            "answer": answer,
            "choices": choices[rotation:] + choices[:rotation],
            "language": language,
            "group": "knowledge",
            "task": fact.relation,
        }


def _by_relation() -> dict[str, list[Fact]]:
    members: dict[str, list[Fact]] = {}
    for fact in facts():
        members.setdefault(fact.relation, []).append(fact)
    return members
