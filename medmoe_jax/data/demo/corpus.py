"""The demo corpus as rows to train on and items to score; every function is pure and seeded.

A row is `{"conversations": [{"role": "user", "content": str}, {"role": "assistant", "content":
str}], "language": "en" | "zh"}`; plain text is the answer to a short "Continue:" turn. An item is
`{"prompt", "answer", "choices", "language", "group", "task"}`; `choices` holds four answers for
group "knowledge" and is empty for group "alignment", where the answer is generated.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from medmoe_jax.data.conversation import Conversation, Turn
from medmoe_jax.data.demo import alignment, answers, general, knowledge
from medmoe_jax.data.demo.tables import LANGUAGES
from medmoe_jax.errors import UserError

PRETRAINING_ROWS = 18_000
ALIGNMENT_ROWS = 4_000
ITEMS_PER_FORMAT_TASK = 25

Pair = tuple[str, str]  # what is asked, and the answer


def pretraining_rows(rows: int = PRETRAINING_ROWS, seed: int = 0) -> list[Conversation]:
    """Return everyday rows in shuffled order, none of which links a medical fact's two ends.

    The everyday facts and word translations (about 4300 rows) are always there, so `rows`
    below that still returns them all.
    """
    return _rows(general.pairs(rows, seed), f"{seed}/pretraining")


def knowledge_rows(seed: int = 0) -> list[Conversation]:
    """Return every medical fact in every training frame and language, in shuffled order."""
    return _rows(knowledge.training_pairs(), f"{seed}/knowledge")


def answer_rows(seed: int = 0) -> list[Conversation]:
    """Return every medical fact in English, asked and answered in words and whole sentences."""
    return _talks(answers.training_pairs(), f"{seed}/answers")


def everyday_rows(seed: int = 0) -> list[Conversation]:
    """Return everyday facts in English, without those that the open questions ask for."""
    return _talks(answers.everyday_pairs(), f"{seed}/everyday")


def alignment_rows(rows: int = ALIGNMENT_ROWS, seed: int = 0) -> list[Conversation]:
    """Return `rows` rows of the clinical format tasks, in shuffled order."""
    return _rows(alignment.training_pairs(rows, seed), f"{seed}/alignment")


def knowledge_items(seed: int = 0) -> list[dict]:
    """Return one four-option item per fact and language, worded as no training row is."""
    return list(knowledge.items(seed))


def alignment_items(per_task: int = ITEMS_PER_FORMAT_TASK, seed: int = 0) -> list[dict]:
    """Return `per_task` generation items per format task and language, on unseen cases."""
    return list(alignment.items(per_task, seed))


def in_language(found: Sequence[Any], language: str) -> list[Any]:
    """Return those of some rows or items that are in a language; "" = all.

    Raises:
      UserError: the corpus has none in it.
    """
    if language and language not in LANGUAGES:
        raise UserError(
            f"the demonstration has no language '{language}'; it has {', '.join(LANGUAGES)}"
        )
    return [one for one in found if not language or one["language"] == language]


def texts_for_tokenizer(seed: int = 0) -> list[str]:
    """Return every turn of all training rows; the held-out items are not among them."""
    rows = pretraining_rows(seed=seed) + knowledge_rows(seed) + alignment_rows(seed=seed)
    return [turn["content"] for row in rows for turn in row["conversations"]]


def _talks(pairs: Iterable[Pair], key: str) -> list[Conversation]:
    """Conversations in English of several turns."""
    return [_row(some, "en") for some in answers.conversations(pairs, key)]


def _rows(pairs: Iterable[tuple[str, str, str]], key: str) -> list[Conversation]:
    rows = [_row([(prompt, answer)], language) for prompt, answer, language in pairs]
    random.Random(key).shuffle(rows)
    return rows


def _row(pairs: Iterable[Pair], language: str) -> Conversation:
    said: list[Turn] = []
    for prompt, answer in pairs:
        said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"conversations": said, "language": language}
