"""The tables of the demo corpus, read from the `.tsv` files beside this module.

Every text comes in two languages and is kept as a dict `{"en": ..., "zh": ...}`.
"""

import csv
import functools
from dataclasses import dataclass
from importlib import resources

LANGUAGES = ("en", "zh")
Text = dict[str, str]


def table(name: str) -> list[dict[str, str]]:
    """Return the records of a `.tsv` file beside this module."""
    text = resources.files("medmoe_jax.data.demo").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


@dataclass(frozen=True)
class Fact:
    """One fact: `relation(subject) = object`; `source` is empty outside medicine."""

    id: str
    relation: str
    subject: Text
    object: Text
    source: str = ""


@dataclass(frozen=True)
class Relation:
    """The wordings of one relation, with `{s}` for the subject.

    `noun` is a noun phrase and `stem` the beginning of a statement that the object completes.
    `question` is used in training, `other` is a second question kept for evaluation.
    """

    name: str
    medical: bool
    noun: Text
    question: Text
    other: Text
    stem: Text


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Return the medical facts, each with a public source."""
    return tuple(
        Fact(r["id"], r["relation"], _both(r, "subject"), _both(r, "object"), r["source"])
        for r in table("facts.tsv")
    )


@functools.cache
def general_facts() -> tuple[Fact, ...]:
    """Return the everyday facts of the pretraining text; none is medical."""
    return tuple(
        Fact(f"general-{i}", r["relation"], _both(r, "subject"), _both(r, "object"))
        for i, r in enumerate(table("general.tsv"))
    )


@functools.cache
def relations() -> dict[str, Relation]:
    """Return all relations by name."""
    return {
        r["relation"]: Relation(
            r["relation"],
            r["domain"] == "medical",
            *(_both(r, column) for column in ("noun", "question", "other", "stem")),
        )
        for r in table("relations.tsv")
    }


@functools.cache
def words() -> dict[str, tuple[Text, ...]]:
    """Return the word lists by kind: names, colors, fruits, complaints, drugs and so on."""
    kinds: dict[str, list[Text]] = {}
    for r in table("words.tsv"):
        kinds.setdefault(r["kind"], []).append({"en": r["en"], "zh": r["zh"]})
    return {kind: tuple(entries) for kind, entries in kinds.items()}


def leaks(text: str) -> bool:
    """Say whether `text` holds the subject of a medical fact together with its object."""
    lowered = text.lower()
    return any(s in lowered and any(o in lowered for o in objects) for s, objects in _links())


@functools.cache
def _links() -> tuple[tuple[str, set[str]], ...]:
    """Every name of a subject, with the names of its object."""
    return tuple(
        (subject.lower(), {text.lower() for text in fact.object.values()})
        for fact in facts()
        for subject in fact.subject.values()
    )


def _both(record: dict[str, str], column: str) -> Text:
    return {language: record[f"{column}_{language}"] for language in LANGUAGES}
