"""Metrics against scikit-learn, sacrebleu, rouge-score, scipy and values worked out by hand."""

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest
from sklearn import metrics as reference

from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics
from medmoe_jax.evaluation.intervals import bootstrap, interval, wilson

RIGHT = ["a", "b", "c", "a", "b", "a", "a", "d"]
GUESS = ["a", "b", "a", "a", "c", "a", "b", "e"]


def test_classification_scores_match_scikit_learn():
    assert metrics.compute("accuracy", GUESS, RIGHT) == reference.accuracy_score(RIGHT, GUESS)
    for average in ("macro", "weighted"):
        expected = reference.f1_score(RIGHT, GUESS, average=average, zero_division=0)
        assert metrics.compute(f"{average}_f1", GUESS, RIGHT) == pytest.approx(expected, abs=1e-12)


def test_entity_f1_counts_tuples_over_all_items():
    right = ["疾病实体：感冒，肺炎", "无", "身体实体：嘴"]
    guess = ["疾病实体：感冒\n身体实体：肺炎", "药物实体：甲", "身体实体：嘴"]
    # found 4, right 3, both 2
    assert metrics.compute("entity_f1", guess, right) == pytest.approx(2 * 2 / (4 + 3))
    assert metrics.compute("entity_f1", ["无"], ["无"]) == 1.0
    assert metrics.compute("entity_f1", ["无"], ["身体实体：嘴"]) == 0.0


def test_rouge_l_matches_the_reference_on_english():
    pairs = [
        ("the patient has a mild cough", "patient has had a cough for 3 days"),
        ("no fever", "The patient denies fever, chills."),
    ]
    scorer = RougeScorer(["rougeL"])
    expected = np.mean([scorer.score(a, p)["rougeL"].fmeasure for p, a in pairs])
    guess, right = zip(*pairs, strict=True)
    assert metrics.compute("rouge_l", guess, right) == pytest.approx(expected)


def test_rouge_l_reads_chinese_by_character():
    # longest common subsequence 患者咳 of 4 and 5 characters
    assert metrics.compute("rouge_l", ["患者咳嗽"], ["患者有咳痰"]) == pytest.approx(2 * 3 / 9)


def test_tokens_in_several_scripts():
    assert metrics.tokens("Bệnh nhân, ho 3 ngày.") == ["bệnh", "nhân", "ho", "3", "ngày"]
    assert metrics.tokens("हिन्दी में") == ["हिन्दी", "में"]
    assert metrics.tokens("咳CT検査のあと") == ["咳", "ct", "検", "査", "の", "あ", "と"]


def test_chrf_matches_sacrebleu():
    guess, right = ["the cat sat", "咳嗽三天"], ["the cat sits", "咳嗽两天"]
    expected = sacrebleu.corpus_chrf(guess, [right]).score / 100
    assert metrics.compute("chrf", guess, right) == pytest.approx(expected, abs=1e-9)


def test_letter_sets():
    guess, right = ["A, C", "B", "A"], ["C, A", "B, D", "E"]
    assert metrics.compute("letters_exact", guess, right) == pytest.approx(1 / 3)
    assert metrics.compute("letters_hamming", guess, right) == pytest.approx((1 + 0.5 + 0) / 3)


def test_hit_at_3():
    rankings = [["a", "b", "c", "d"]] * 2
    assert metrics.compute("hit_at_3", rankings, ["c", "d"]) == 0.5


def test_unknown_metric():
    with pytest.raises(UserError, match="'bleurt' is not one of accuracy"):
        metrics.compute("bleurt", ["a"], ["a"])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (123, 1550)])
def test_wilson_matches_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(1).normal(0.4, 0.1, 400)
    low, high = bootstrap(values, lambda rows: float(rows.mean()), seed=5)
    assert (low, high) == bootstrap(values, lambda rows: float(rows.mean()), seed=5)
    assert (low, high) != bootstrap(values, lambda rows: float(rows.mean()), seed=6)
    reach = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - reach, abs=0.002)
    assert high == pytest.approx(values.mean() + reach, abs=0.002)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "entity_f1", "rouge_l", "chrf"])
def test_intervals_hold_the_score(name):
    right = ["疾病实体：感冒", "身体实体：嘴", "疾病实体：肺炎", "无"] * 5
    guess = ["疾病实体：感冒", "身体实体：手", "疾病实体：肺炎", "无"] * 5
    guess[4:6] = ["无", "身体实体：嘴"]
    metric = metrics.find(name)
    rows = metric.prepare(guess, right)
    low, high = interval(metric, rows, resamples=200)
    assert 0 <= low <= metric.reduce(rows) <= high <= 1 and low < high
