"""Contamination: items of tasks whose text stands in training rows, by shared n-grams of words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from medmoe_jax.data.conversation import Conversation
from medmoe_jax.data.words import words
from medmoe_jax.evaluation.items import Item

_SAID = ("reasoning_content", "content")
RUN = 13  # words that an item and a row share


@dataclass
class Overlap:
    """An item with a training row that shares n-grams with it.

    share: of the item's n-grams, how many stand in the row. shared: one that does.
    """

    task: str
    item: int
    text: str
    row: int
    row_text: str
    share: float
    shared: str
    also: list[int] = field(default_factory=list)


def item_text(item: Item) -> str:
    """What of an item must not have been trained on: its text and, of exams, its options.

    Of several turns these are all but the system's, which may be that of many rows.
    """
    turns = [("user", item.prompt)] if isinstance(item.prompt, str) else item.prompt
    asked = [item.source] if item.source else [text for role, text in turns if role != "system"]
    return " ".join([*asked, *item.texts])


def row_text(row: Conversation) -> str:
    """What of a training row is looked through: all that its turns say and think."""
    said = (turn.get(key, "") for turn in row["conversations"] for key in _SAID)
    return " ".join(text for text in said if text)


class ItemIndex:
    """The n-grams of items, by which an item is found in a text."""

    def __init__(self, tasks: Mapping[str, Sequence[Item]], n: int = RUN) -> None:
        """
        Args:
          tasks: name -> items.
          n: words in a row (signs in scripts without spaces); an item that is shorter counts as a
            whole.
        """
        self._grams, whole = _index(tasks, n)
        self._sizes = {key: len(own) for key, own in whole.items()}

    def found_in(self, text: str) -> dict[tuple[str, int], tuple[float, str]]:
        """(task, item) -> the share of its n-grams that a text has, and one of them."""
        hits: dict[tuple[str, int], set] = defaultdict(set)
        for gram in _grams(words(text), self._grams):
            for key in self._grams[len(gram)].get(gram, ()):
                hits[key].add(gram)
        return {
            key: (len(shared) / self._sizes[key], " ".join(min(shared)))
            for key, shared in hits.items()
        }


def overlaps(
    tasks: Mapping[str, Sequence[Item]], rows: Iterable[str], n: int = RUN
) -> list[Overlap]:
    """For every item the training row that shares most of its n-grams, if any does.

    Args:
      tasks: name -> items.
      rows: texts of the training rows.
      n: words in a row (signs in scripts without spaces); an item that is shorter counts as a
        whole.

    Returns:
      in the order of the items; `also` are further rows by number.
    """
    index = ItemIndex(tasks, n)
    best: dict[tuple[str, int], Overlap] = {}
    for number, text in enumerate(rows):
        for key, (share, shared) in index.found_in(text).items():
            found = best.get(key)
            if found is None or share > found.share:
                further = [found.row, *found.also] if found else []
                item = tasks[key[0]][key[1]]
                best[key] = Overlap(
                    *(key[0], key[1], item_text(item), number, text, share),
                    shared,
                    further,
                )
            else:
                found.also.append(number)
    return [best[key] for key in sorted(best)]


def _index(tasks: Mapping[str, Sequence[Item]], n: int):
    """(length -> n-gram -> items, item -> its n-grams)."""
    grams: dict[int, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))
    whole: dict[tuple[str, int], set] = {}
    for task, items in tasks.items():
        for i, item in enumerate(items):
            own = words(item_text(item))
            size = min(n, len(own))
            found = {tuple(own[at : at + size]) for at in range(len(own) - size + 1)}
            whole[task, i] = found
            for gram in found if size else ():
                grams[size][gram].append((task, i))
    return grams, whole


def _grams(own: Sequence[str], grams: dict[int, dict]) -> Iterable[tuple]:
    for size in grams:
        for at in range(len(own) - size + 1):
            yield tuple(own[at : at + size])
