"""Metrics against scikit-learn, sacrebleu, rouge-score, scipy and values worked out by hand."""

import unicodedata

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest
from sklearn import metrics as reference

from medmoe_jax.data.words import words
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import Item, metrics
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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Bệnh nhân, ho 3 ngày.", ["bệnh", "nhân", "ho", "3", "ngày"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("咳CT検査のあと", ["咳", "ct", "検", "査", "の", "あ", "と"]),
        ("ｶﾞﾝ細胞", ["ガ", "ン", "細", "胞"]),  # half-width kana
        ("ＣＴ検査", ["ct", "検", "査"]),
        ("人々と時々", ["人", "々", "と", "時", "々"]),
        ("คนไข้", ["ค", "น", "ไ", "ข้"]),  # a tone mark belongs to its sign
        ("ជំងឺ flu", ["ជំ", "ងឺ", "flu"]),
        ("", []),
    ],
)
def test_words_in_several_scripts(text, wanted):
    assert words(text) == wanted


def test_kappa_matches_scikit_learn():
    right, guess = list("AABCBACB"), list("ABBCBACA")
    expected = reference.cohen_kappa_score(right, guess)
    assert metrics.compute("kappa", guess, right) == pytest.approx(expected)
    assert metrics.compute("kappa", ["A", "A"], ["A", "A"]) == 1.0


@pytest.mark.parametrize(
    ("scale", "right", "guess"),
    [
        ("ABC", "AABCBACB", "ABBCBACA"),
        (("1", "2", "10"), ("1", "10", "2", "10"), ("2", "10", "10", "1")),
        (("mild", "severe", "fatal"), ("mild", "severe"), ("fatal", "severe")),
        ("ABCD", "AADDB", "ADDAA"),  # a step that nothing has is a step
    ],
)
def test_linear_kappa_takes_the_order_of_the_choices(scale, right, guess):
    expected = reference.cohen_kappa_score(
        list(right), list(guess), labels=list(scale), weights="linear"
    )
    items = [Item("q", answer, tuple(scale)) for answer in right]
    assert metrics.compute("kappa_linear", list(guess), items) == pytest.approx(expected)


def test_no_answer_is_farthest_on_a_scale():
    items = [Item("q", answer, tuple("ABCD")) for answer in "ABCD"]
    far = metrics.compute("kappa_linear", list("DDAA"), items)
    assert metrics.compute("kappa_linear", ["", "", "", "E"], items) == far < 0
    with pytest.raises(UserError, match="needs choices with the answer 'A' among them"):
        metrics.compute("kappa_linear", ["A"], [Item("q", "A")])


def item(answer, **more):
    return Item("q", answer, **more)


def test_spans_count_places_where_sets_count_mentions():
    text = "Flu and flu; not influenza. flu"
    gold = item("Disease: Flu; flu", source=text, spans=(("Disease", 0, 3), ("Disease", 8, 11)))
    # "flu" stands twice by itself, once of which is no entity
    assert metrics.compute("span_f1", ["Disease: Flu; flu"], [gold]) == pytest.approx(2 * 2 / 5)
    assert metrics.compute("span_f1", ["Disease: flu"], [gold]) == pytest.approx(2 * 1 / 4)
    assert metrics.compute("span_f1", ["Drug: Flu"], [gold]) == 0.0
    chinese = item("疾病实体：感冒", source="流行性感冒", spans=(("疾病", 3, 5),))
    assert metrics.compute("span_f1", ["疾病实体：感冒"], [chinese]) == 1.0


def test_terms_that_are_not_allowed_are_none():
    gold = item("感冒，咳嗽", allowed=("感冒", "咳嗽", "肺炎"))
    assert metrics.compute("term_f1", ["感冒，头痛"], [gold]) == pytest.approx(2 * 1 / 3)
    nothing = item("没有对应的标准化实体", allowed=("感冒",))
    assert metrics.compute("term_f1", ["没有对应的标准化实体"], [nothing]) == 1.0


def test_events_and_sections():
    event = "主体词：疼痛；发生状态：否定；描述词：持续，轻；解剖部位：头"
    assert metrics.compute("event_f1", [event], [f"事件如下：\n{event}"]) == 1.0
    assert metrics.compute("event_f1", [event.replace("，轻", "")], [event]) == 0.0
    right = "报告如下：\n主诉：咳嗽三天\n既往史："
    # the first section has four signs, of which two are said; the second is empty in both
    score = metrics.compute("sections_rouge_l", ["主诉：咳嗽"], [right])
    assert score == pytest.approx((2 * 2 / 6 + 1) / 2)
    assert metrics.compute("sections_rouge_l", ["no report"], [right]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("80 / 2² = 20. The answer is 20.4", 1.0),
        ("The answer is 20.4, not 18", 1.0),
        ("The answer is 18, not 20.4", 0.0),
        ("The answer is 20.4 mL/min/1.73 m²", 1.0),
        ("The answer is 20.4 kg/m^2", 1.0),
        ("The answer is 81.6 / 4 = 20.4 points of 90", 1.0),
        ("between 18 and 30 it is 20", 1.0),
        ("Answer: GFR = 20 mL/min, = normal", 1.0),
        ("Answer: 20 = ", 1.0),
        ("The answer is: the 10-year risk is 20%", 1.0),
        ("The answer is 81.6/(2)² ≈ 20.4", 1.0),
        ("The answer is 81.6 / 4 -> 20.4", 1.0),
        ("The answer is 81.6 / 4 => 20.4", 1.0),
        ("The answer is $81.6 / 4 \\approx 20.4$", 1.0),
        ("The answer is 80 / 4, which equals 20", 1.0),
        ("The answer is 20.4 (81.6 / 4 = 20.4; normal = 18.5 to 24.9)", 1.0),
        ("The answer is 20.4 (normal = 1 to 2)", 1.0),
        ("The answer is (20.4)", 1.0),
        ("The answer is (81.6 / 4) ≈ 30", 0.0),
        ("The answer is −20", 0.0),
        ("\\boxed{19}", 1.0),
        ("The answer is 1,020.4", 0.0),
        ("The answer is high", 0.0),
        ("20", 1.0),
        ("The answer is:\n\n20.4", 1.0),
        ("The answer is\n$$20.4$$", 1.0),
        ("**Answer**: 20 mL/min/1.73 m²", 1.0),
        ("**Final Answer**: 20 mL/min per 1.73 m^2", 1.0),
        ("20 mL/min/1.73 m²", 1.0),
        ("The estimated GFR is 20 mL/min/1.73m².", 1.0),
        ("GFR = 175 × 1.2^-1.154 = 20.1 mL/min/1.73 m^{2}", 1.0),
        ("The BMI is 20 kg/m^2", 1.0),
        ("The answer is 20\n\nNote: the answer is only an estimate.", 1.0),
        ("The answer is 20.\nThis answer is based on 70 kg.", 1.0),
        ("The answer is not 30 but 20", 1.0),
        ("The answer isn't 30, it is 20", 1.0),
        ('{"answer": 20}', 1.0),
        ("After 30 comes 20. The answer is high.", 0.0),
        ("<think>The answer is 30</think>20", 1.0),
    ],
)
def test_numbers_within_limits(said, wanted):
    gold = item("20.0", allowed=("19.0", "21.0"))
    assert metrics.compute("number_within", [said], [gold]) == wanted


def test_dates_and_weeks_must_be_the_same():
    date = item("03/05/2021", allowed=("03/05/2021", "03/05/2021"))
    assert metrics.compute("number_within", ["The answer is 3/5/2021."], [date]) == 1.0
    assert metrics.compute("number_within", ["The answer is 3/6/2021."], [date]) == 0.0
    for said in ("LMP 05/10/2020 + 280 days = 03/05/2021", "It is due on 3-5-2021, in 40 weeks."):
        assert metrics.compute("number_within", [said], [date]) == 1.0
    assert metrics.compute("number_within", ["03/05/2021 - 7 days = 02/26/2021"], [date]) == 0.0
    weeks = item("('17 weeks', '4 days')", allowed=("('17 weeks', '4 days')",) * 2)
    assert metrics.compute("number_within", ["17 weeks and 4 days"], [weeks]) == 1.0


def test_limits_of_a_negative_number_may_fall():
    gap = item("-5", allowed=("-4.75", "-5.25"))
    said = ["The answer is -5.2", "The answer is −4.8", "The answer is -5.3", "The answer is 5"]
    assert metrics.compute("number_within", said, [gap] * 4) == 0.5


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("entity_f1", ["疾病实体：感冒", "none", "无。"], ["感冒", "I think flu", ""]),
        ("relation_f1", ["a -> b", "none"], ["a and b"]),
        ("letters_exact", ["A, C"], ["all of them"]),
        ("number_within", ["20"], ["much"]),
        ("rouge_l", ["some text", "咳嗽", "5"], ["  ", "+", "，；"]),
        ("sections_rouge_l", ["主诉：咳嗽\n诊断:", " 建议 ： 休息"], ["Plan: rest", "主诉"]),
    ],
)
def test_what_can_be_read(metric, good, bad):
    readable = metrics.find(metric).readable
    assert all(readable(text, item(text)) for text in good)
    assert not any(readable(text, item(text)) for text in bad)


ANSWERS = (
    *("Subjective: pain\nPlan: rest", "主诉：咳嗽\n建议：", "Drug: a; b", "a -> b"),
    *("fever: present", "主体词：咳嗽", "aspirin, insulin", "none", "AC", "5", "x"),
    *("+", "，；", '""', "->"),
)


@pytest.mark.parametrize("name", [m.name for m in metrics.METRICS.values() if not m.placed])
def test_an_answer_that_a_metric_can_read_is_right_against_itself(name):
    """A file of tasks with another answer is refused: no answer could be right there."""
    metric = metrics.find(name)
    read = [text for text in ANSWERS if metric.readable(text, item(text))]
    assert read
    for text in read:
        said = (text,) if metric.ranked else text
        right = Item("q", text, (text,)) if metric.whole else text
        assert metrics.compute(name, [said], [right]) == pytest.approx(1.0)


def test_chrf_matches_sacrebleu():
    guess, right = ["the cat sat", "咳嗽三天"], ["the cat sits", "咳嗽两天"]
    expected = sacrebleu.corpus_chrf(guess, [right]).score / 100
    assert metrics.compute("chrf", guess, right) == pytest.approx(expected, abs=1e-9)


def test_letter_sets():
    for said in ("A\nC", "CA", "A: vrai\nB: faux\nC: vrai"):
        assert metrics.compute("letters_exact", [said], [item("A, C")]) == 1.0
        assert metrics.compute("letters_hamming", [said], [item("A, C")]) == 1.0
    guess, right = ["A, C", "B", "A"], list(map(item, ["C, A", "B, D", "E"]))
    assert metrics.compute("letters_exact", guess, right) == pytest.approx(1 / 3)
    assert metrics.compute("letters_hamming", guess, right) == pytest.approx((1 + 0.5 + 0) / 3)


def test_letters_are_those_of_the_choices():
    wide = [item(answer, allowed=tuple("ABCDEFGHIJKLM")) for answer in ("A, K", "L", "KM")]
    assert metrics.compute("letters_exact", ["A, L", "K", "K, M"], wide) == pytest.approx(1 / 3)
    hamming = (1 / 3 + 0 + 1) / 3
    assert metrics.compute("letters_hamming", ["A, L", "K", "K, M"], wide) == pytest.approx(hamming)
    assert metrics.compute("letters_inside", ["A, L", "K, L", "M"], wide) == pytest.approx(1 / 3)
    narrow = [item("B", allowed=tuple("ABC"))]
    assert metrics.compute("letters_exact", ["B, F"], narrow) == 0.0  # F is none of its choices
    assert metrics.compute("letters_exact", ["none"], [item("none")]) == 0.0


def test_hit_at_3():
    rankings = [["a", "b", "c", "d"]] * 2
    assert metrics.compute("hit_at_3", rankings, ["c", "d"]) == 0.5


@pytest.mark.parametrize("name", ["exact_match", "accuracy"])
def test_signs_that_are_written_in_two_ways_are_the_same(name):
    """As Unicode has it: what differs in meaning stays apart."""
    texts = ["fièvre", "Kopfschmerzen Übelkeit", "がん", "sốt", "열"]
    apart = [unicodedata.normalize("NFD", text) for text in texts]
    assert all(a != b for a, b in zip(texts, apart, strict=True))
    assert metrics.compute(name, apart, texts) == metrics.compute(name, texts, apart) == 1
    assert metrics.compute(name, ["10² cells", "fievre"], ["102 cells", "fièvre"]) == 0


def test_unknown_metric():
    with pytest.raises(UserError, match="'bleurt' is not one of accuracy"):
        metrics.compute("bleurt", ["a"], ["a"])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (123, 1550)])
def test_wilson_matches_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_holds_the_share_itself():
    """To the last bit: a picture draws from the share to the interval's ends."""
    for n in range(1, 200):
        for hits in (0, 1, n - 1, n):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1


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
