"""Contamination: items of tasks whose text stands in training rows, by shared n-grams of words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from medmoe_jax.evaluation.items import Item
from medmoe_jax.evaluation.tokens import words


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
    """What of an item must not have been trained on: its text and, of exams, its options."""
    asked = item.source or (item.prompt if isinstance(item.prompt, str) else item.prompt[-1][1])
    return " ".join([asked, *item.texts])


def overlaps(
    tasks: Mapping[str, Sequence[Item]], rows: Iterable[str], n: int = 13
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
    grams, whole = _index(tasks, n)
    best: dict[tuple[str, int], Overlap] = {}
    sizes = {key: len(own) for key, own in whole.items()}
    for number, text in enumerate(rows):
        hits: dict[tuple[str, int], set] = defaultdict(set)
        for gram in _grams(words(text), grams):
            for key in grams[len(gram)].get(gram, ()):
                hits[key].add(gram)
        for key, shared in hits.items():
            share = len(shared) / sizes[key]
            found = best.get(key)
            if found is None or share > found.share:
                further = [found.row, *found.also] if found else []
                item = tasks[key[0]][key[1]]
                best[key] = Overlap(
                    *(key[0], key[1], item_text(item), number, text, share),
                    " ".join(min(shared)),
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
