"""Scores between 0 and 1 of predictions against answers.

Axes: N items. A metric first turns each item into numbers (`prepare`, row n depends on item n
alone), then the rows into one score (`reduce`), so that a resample of items is a resample of rows.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF

from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import answers, grammars


@dataclass(frozen=True)
class Metric:
    """A score.

    prepare: (predictions, answers), each N texts -> array `[N]` or `[N, S]`.
    reduce: such an array -> score.
    binary: each row is 0 or 1 and the score their mean.
    ranked: a prediction is the list of choices, best first, instead of a text.
    """

    name: str
    prepare: Callable[[Sequence, Sequence[str]], np.ndarray]
    reduce: Callable[[np.ndarray], float]
    binary: bool = False
    ranked: bool = False


def compute(name: str, predictions: Sequence, answers: Sequence[str]) -> float:
    """The score of a metric by name. Raises UserError for an unknown name."""
    metric = find(name)
    return metric.reduce(metric.prepare(predictions, answers))


def find(name: str) -> Metric:
    """The metric of this name. Raises UserError where there is none."""
    if name not in METRICS:
        raise UserError(f"metric {name!r} is not one of {', '.join(METRICS)}")
    return METRICS[name]


def tokens(text: str) -> list[str]:
    """Lower-case words in any script; each Chinese or Japanese character is a token."""
    found, word = [], ""
    for character in unicodedata.normalize("NFC", text).lower():
        name = unicodedata.name(character, "")
        alone = name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA"))
        goes_on = unicodedata.category(character)[0] in "LMN" and not alone
        if word and not goes_on:
            found.append(word)
            word = ""
        if alone:
            found.append(character)
        elif goes_on:
            word += character
    return [*found, word] if word else found


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


# rouge_score and scikit-learn are imported where they are used: with what they bring along (nltk,
# scipy, pandas) they would take more than a second of every start of every command.
@functools.cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


_CHRF = CHRF()


def _each(score: Callable[[str, str], float]):
    def prepare(predictions, answers):
        pairs = zip(predictions, answers, strict=True)
        return np.array([score(p, a) for p, a in pairs], np.float64)

    return prepare


def _mean(rows_N: np.ndarray) -> float:
    return float(rows_N.mean())


def _same(prediction: str, answer: str) -> float:
    return float(" ".join(prediction.split()) == " ".join(answer.split()))


def _same_caseless(prediction: str, answer: str) -> float:
    return _same(prediction.casefold(), answer.casefold())


def _letters_same(prediction: str, answer: str) -> float:
    return float(_letter_set(prediction) == _letter_set(answer))


def _letters_overlap(prediction: str, answer: str) -> float:
    chosen, right = _letter_set(prediction), _letter_set(answer)
    return len(chosen & right) / max(1, len(chosen | right))


def _letter_set(text: str) -> frozenset[str]:
    return answers.letters(text, "ABCDEFGH")


def _rouge_l(prediction: str, answer: str) -> float:
    return _rouge().score(answer, prediction)["rougeL"].fmeasure


def _codes(predictions, answers) -> np.ndarray:
    """`[N, 2]` label numbers of prediction and answer."""
    _, codes = np.unique([*predictions, *answers], return_inverse=True)
    return codes.reshape(2, -1).T


def _f1(average: str):
    def reduce(rows_Nx2: np.ndarray) -> float:
        from sklearn.metrics import f1_score

        predicted_N, right_N = rows_Nx2.T
        return float(f1_score(right_N, predicted_N, average=average, zero_division=0))

    return reduce


def _set_counts(parse: Callable[[str], frozenset]):
    """`[N, 3]`: tuples found and right, found, right."""

    def prepare(predictions, answers):
        counts = []
        for prediction, answer in zip(predictions, answers, strict=True):
            found, right = parse(prediction), parse(answer)
            counts.append((len(found & right), len(found), len(right)))
        return np.array(counts, np.int64)

    return prepare


def _set_f1(rows_Nx3: np.ndarray) -> float:
    """Micro-averaged F1; 1 where there is nothing to find and nothing found."""
    hits, found, right = rows_Nx3.sum(0)
    return float(2 * hits / (found + right)) if found + right else 1.0


def _hit(count: int):
    return _each(lambda ranking, answer: float(answer in ranking[:count]))


def _chrf_counts(predictions, answers) -> np.ndarray:
    """`[N, S]` n-gram counts, which chrF adds over the corpus."""
    return np.array(_CHRF._extract_corpus_statistics(predictions, [answers]), np.int64)


def _chrf(rows_NxS: np.ndarray) -> float:
    return _CHRF._aggregate_and_compute(rows_NxS.tolist()).score / 100


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _each(_same), _mean, binary=True),
        Metric("macro_f1", _codes, _f1("macro")),
        Metric("weighted_f1", _codes, _f1("weighted")),
        Metric("hit_at_3", _hit(3), _mean, binary=True, ranked=True),
        Metric("exact_match", _each(_same_caseless), _mean, binary=True),
        Metric("letters_exact", _each(_letters_same), _mean, binary=True),
        # Intersection over union of the letters, as the authors of FrenchMedMCQA score.
        Metric("letters_hamming", _each(_letters_overlap), _mean),
        Metric("entity_f1", _set_counts(grammars.entities), _set_f1),
        Metric("relation_f1", _set_counts(grammars.relations), _set_f1),
        Metric("labelled_f1", _set_counts(grammars.labelled), _set_f1),
        Metric("term_f1", _set_counts(grammars.terms), _set_f1),
        Metric("rouge_l", _each(_rouge_l), _mean),
        Metric("chrf", _chrf_counts, _chrf),
    )
}
