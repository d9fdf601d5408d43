"""Scores between 0 and 1 of predictions against answers.

Axes: N items. A metric first turns each item into numbers (`prepare`, row n depends on item n
alone), then the rows into one score (`reduce`), so that a resample of items is a resample of rows.
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF

from medmoe_jax.data.words import words
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import answer_tokens, answers, grammars
from medmoe_jax.evaluation.items import Item


@dataclass(frozen=True)
class Metric:
    """A score.

    prepare: (predictions, answers), each N texts -> array `[N]` or `[N, S]`.
    reduce: such an array -> score.
    binary: each row is 0 or 1 and the score their mean.
    ranked: a prediction is the list of choices, best first, instead of a text.
    whole: an answer is the item, instead of its answer's text.
    readable: whether a prediction for an item is in the form that the metric reads.
    complete: whether it reads all of an item's answer, no part of which may be lost.
    placed: whether it needs the places of an item's entities in its text.
    ordered: the order of an item's choices is that of a scale.
    listed: an answer lists several letters of the item's choices, which are its `allowed`.
    """

    name: str
    prepare: Callable[[Sequence, Sequence], np.ndarray]
    reduce: Callable[[np.ndarray], float]
    binary: bool = False
    ranked: bool = False
    whole: bool = False
    readable: Callable[[str, Item], bool] = lambda text, item: bool(text.strip())
    complete: Callable[[Item], bool] = lambda item: True
    placed: bool = False
    ordered: bool = False
    listed: bool = False


def compute(name: str, predictions: Sequence, answers: Sequence) -> float:
    """The score of a metric by name, of items for `whole`. Raises UserError for an unknown name."""
    metric = find(name)
    return metric.reduce(metric.prepare(predictions, answers))


def find(name: str) -> Metric:
    """The metric of this name. Raises UserError where there is none, with the closest one."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"metric {name!r} is not one of {', '.join(METRICS)}{hint}")
    return METRICS[name]


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


# rouge_score and scikit-learn are imported where they are used: with what they bring along (nltk,
# scipy, pandas) they would take more than a second of every start of every command.
@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


_CHRF = CHRF()


def _each(score: Callable[[str, Any], float]):
    def prepare(predictions, golds):
        pairs = zip(predictions, golds, strict=True)
        return np.array([score(p, a) for p, a in pairs], np.float64)

    return prepare


def _mean(rows_N: np.ndarray) -> float:
    return float(rows_N.mean())


def same(prediction: str, answer: str) -> float:
    """1 where two texts are equal up to spaces, else 0; é may be one sign or two (NFC)."""
    return float(_composed(prediction) == _composed(answer))


def _composed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _same_caseless(prediction: str, answer: str) -> float:
    return same(prediction.casefold(), answer.casefold())


_LETTERS = frozenset("ABCDEFGHIJ")


def _letters_of(item: Item) -> frozenset[str]:
    """The letters of an item's choices, of which several may be right: A to J where not known."""
    return frozenset(item.allowed) or _LETTERS


def _letter_set(text: str, item: Item) -> frozenset[str]:
    # One of A to J that is no choice is read too: "A, F" is not A alone.
    return answers.all_letters(text, sorted(_letters_of(item) | _LETTERS))


def _letters(name: str, score: Callable[[frozenset, frozenset], float], **more) -> Metric:
    def each(prediction: str, item: Item) -> float:
        right = _letter_set(item.answer, item)
        return float(score(_letter_set(prediction, item), right)) if right else 0.0

    return Metric(
        name,
        _each(each),
        _mean,
        whole=True,
        readable=lambda text, item: bool(_letter_set(text, item)),
        complete=lambda item: _signs(item.answer) <= _letters_of(item),
        listed=True,
        **more,
    )


def _signs(text: str) -> set[str]:
    return set(filter(str.isalnum, answer_tokens.normal(text)))


def _rouge_l(prediction: str, answer: str) -> float:
    return _rouge().score(answer, prediction)["rougeL"].fmeasure


def _sections_rouge_l(prediction: str, answer: str) -> float:
    """Mean over the answer's sections; one that is empty counts as 无."""
    written, right = grammars.sections(prediction), grammars.sections(answer)
    scores = [_rouge_l(written.get(head, "") or "无", body or "无") for head, body in right.items()]
    return sum(scores) / len(scores) if scores else 0.0


def _codes(predictions, golds) -> np.ndarray:
    """`[N, 2]` label numbers of prediction and answer."""
    _, codes = np.unique([*predictions, *golds], return_inverse=True)
    return codes.reshape(2, -1).T


def _places_of_choices(predictions, items) -> np.ndarray:
    """`[N, 2]` places of prediction and answer in the order of an item's choices.

    What is no choice counts as the one that is farthest from the answer. Raises UserError for an
    answer that is none.
    """
    places = []
    for prediction, item in zip(predictions, items, strict=True):
        choices, last = item.choices, len(item.choices) - 1
        if item.answer not in choices:
            raise UserError(
                f"kappa_linear needs choices with the answer {item.answer!r} among them"
            )
        right = choices.index(item.answer)
        far = last if 2 * right <= last else 0
        places.append((choices.index(prediction) if prediction in choices else far, right))
    return np.array(places, np.int64)


def _f1(average: str):
    def reduce(rows_Nx2: np.ndarray) -> float:
        from sklearn.metrics import f1_score

        predicted_N, right_N = rows_Nx2.T
        return float(f1_score(right_N, predicted_N, average=average, zero_division=0))

    return reduce


def _kappa(weights: str | None):
    def reduce(rows_Nx2: np.ndarray) -> float:
        from sklearn.metrics import cohen_kappa_score

        predicted_N, right_N = rows_Nx2.T
        if len(np.unique(rows_Nx2)) == 1:
            return 1.0  # all the same, and all right: chance agrees as well, which leaves 0 / 0
        labels = np.arange(rows_Nx2.max() + 1)  # also those between that no row has
        return float(cohen_kappa_score(right_N, predicted_N, labels=labels, weights=weights))

    return reduce


def _set_counts(parse: Callable[[str], frozenset]):
    """`[N, 3]`: tuples found and right, found, right."""

    def prepare(predictions, golds):
        counts = []
        for prediction, answer in zip(predictions, golds, strict=True):
            found, right = parse(prediction), parse(answer)
            counts.append((len(found & right), len(found), len(right)))
        return np.array(counts, np.int64)

    return prepare


def _term_counts(predictions, items) -> np.ndarray:
    """As of sets; a term that the item's list does not allow is none."""
    counts = []
    for prediction, item in zip(predictions, items, strict=True):
        found, right = grammars.terms(prediction), grammars.terms(item.answer)
        if item.allowed:
            found = {term for term in found if term[0] in item.allowed}
        counts.append((len(found & right), len(found), len(right)))
    return np.array(counts, np.int64)


def _span_counts(predictions, items) -> np.ndarray:
    """As of sets, of places: a mention is found wherever it stands in the text."""
    counts = []
    for prediction, item in zip(predictions, items, strict=True):
        found = {
            (kind, at, at + len(mention))
            for kind, mention in grammars.entities(prediction)
            for at in _places(mention, item.source)
        }
        right = set(item.spans)
        counts.append((len(found & right), len(found), len(right)))
    return np.array(counts, np.int64)


def _places(mention: str, text: str) -> list[int]:
    """Where a mention stands in a text, not within a longer word of letters."""
    spaced = re.compile(r"[A-Za-z\u00c0-\u052f]")
    before = r"(?<![A-Za-z\u00c0-\u052f])" if spaced.match(mention[:1]) else ""
    after = r"(?![A-Za-z\u00c0-\u052f])" if spaced.match(mention[-1:]) else ""
    return [m.start() for m in re.finditer(before + re.escape(mention) + after, text)]


def _set_f1(rows_Nx3: np.ndarray) -> float:
    """Micro-averaged F1; 1 where there is nothing to find and nothing found."""
    hits, found, right = rows_Nx3.sum(0)
    return float(2 * hits / (found + right)) if found + right else 1.0


def _within(prediction: str, item) -> float:
    """Whether the number given lies within the item's limits; a date or weeks must be the same.

    It is the first one where the text says which its answer is, for more may follow; else the last.
    """
    limits = [grammars.numbers(limit) for limit in item.allowed]
    right = grammars.numbers(item.answer)
    said = answers.said(prediction)
    texts = [_result(text) for text in said] if said else [answer_tokens.spoken(prediction)]
    if re.fullmatch(_DATE, item.answer.strip()):
        texts = [" ".join(re.findall(_DATE, text)) for text in texts]
    found = next(filter(None, map(grammars.numbers, reversed(texts))), [])
    if len(limits) != 2 or not all(len(limit) == 1 for limit in limits):
        given = found[: len(right)] if said else found[-len(right) :]
        return float(bool(right) and given == right)
    low, high = sorted(limit[0] for limit in limits)  # 95% and 105% of a negative value fall
    return float(bool(found) and low <= found[0 if said else -1] <= high)


_DATE = r"\b\d{1,2}[/-]\d{1,2}[/-]\d{4}\b"


def _result(answer: str) -> str:
    """What follows the last sign of a result before a number; "the 10-year risk" has no number.

    What stands in brackets says how it came about, "24.5 (70 / 1.69²)", unless nothing else does.
    """
    bare = re.sub(r"\([^()]*\)", " ", answer)
    text = bare if re.search(r"\d", bare) else answer
    signs = r"=>?|->|[≈≃≅→⇒]|\bequals\b|\\approx|\\rightarrow"
    after = re.split(rf"(?:{signs})\s*(?=[-+]?\.?\d)", text)[-1]
    return re.sub(r"(?<![\w.])\d[\d.]*-[A-Za-z]+", " ", after)


def _hit(count: int):
    return _each(lambda ranking, answer: float(answer in ranking[:count]))


def _chrf_counts(predictions, golds) -> np.ndarray:
    """`[N, S]` n-gram counts, which chrF adds over the corpus."""
    return np.array(_CHRF._extract_corpus_statistics(predictions, [golds]), np.int64)


def _chrf(rows_NxS: np.ndarray) -> float:
    return _CHRF._aggregate_and_compute(rows_NxS.tolist()).score / 100


def _listed(parse: Callable[[str], frozenset]):
    """Whether a text is a list in its grammar, if one with nothing in it."""
    return lambda text, _: bool(parse(text)) or text.strip(" .。").casefold() in grammars.NOTHING


def _set_metric(name: str, parse: Callable[[str], frozenset]) -> Metric:
    readable = _listed(parse)

    def complete(item: Item) -> bool:
        lines = filter(None, map(str.strip, item.answer.splitlines()))
        return all(line[-1] in ":：" or readable(line, item) for line in lines)

    return Metric(name, _set_counts(parse), _set_f1, readable=readable, complete=complete)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _each(same), _mean, binary=True),
        Metric("macro_f1", _codes, _f1("macro")),
        Metric("weighted_f1", _codes, _f1("weighted")),
        Metric("kappa", _codes, _kappa(None)),
        Metric("kappa_linear", _places_of_choices, _kappa("linear"), whole=True, ordered=True),
        # Whether there is an answer at all, which a judge then grades.
        Metric("answered", _each(lambda text, _: float(bool(text.strip()))), _mean, binary=True),
        Metric("hit_at_3", _hit(3), _mean, binary=True, ranked=True),
        Metric("exact_match", _each(_same_caseless), _mean, binary=True),
        _letters("letters_exact", operator.eq, binary=True),
        # Intersection over union of the letters, as the authors of FrenchMedMCQA score.
        _letters("letters_hamming", lambda found, right: len(found & right) / len(found | right)),
        _letters("letters_inside", lambda found, right: right <= found, binary=True),
        _set_metric("entity_f1", grammars.entities),
        _set_metric("relation_f1", grammars.relations),
        _set_metric("event_f1", grammars.events),
        _set_metric("labelled_f1", grammars.labelled),
        Metric(
            "term_f1",
            _term_counts,
            _set_f1,
            whole=True,
            complete=lambda item: len(item.answer.strip().splitlines()) == 1,
        ),
        Metric("span_f1", _span_counts, _set_f1, whole=True, placed=True),
        Metric("rouge_l", _each(_rouge_l), _mean, readable=lambda text, _: bool(words(text))),
        Metric(
            "sections_rouge_l",
            _each(_sections_rouge_l),
            _mean,
            readable=lambda text, _: bool(grammars.sections(text)),
        ),
        Metric("chrf", _chrf_counts, _chrf),
        Metric(
            "number_within",
            _each(_within),
            _mean,
            binary=True,
            whole=True,
            readable=lambda text, _: bool(grammars.numbers(text)),
        ),
    )
}


def one(rows_N: np.ndarray, n: int) -> float | None:
    """What row n says of its item alone, where a row is one number."""
    value = float(rows_N[n]) if rows_N.ndim == 1 else math.nan
    return None if math.isnan(value) else value
