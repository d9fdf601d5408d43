"""Runs side by side: paired differences against scipy and loops, the page, and contamination."""

import numpy as np
import pytest
from scipy.stats import binomtest

from medmoe_jax.data.conversation import Conversation, Turn
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import Item, Report, Task, evaluate, html, metrics, page, records
from medmoe_jax.evaluation.compare import POOLED, alone, apart, compare, mcnemar
from medmoe_jax.evaluation.overlap import overlaps, row_text
from medmoe_jax.evaluation.shots import before_item
from tests.evaluation.models import Constant, Scripted

LABELS = ("yes", "no")


def choice(name, right, language="en"):
    items = tuple(Item(f"{name} {i}", r, LABELS, language=language) for i, r in enumerate(right))
    return Task(name, "mul", "choice", "accuracy", items, split="dev")


class Said(Constant):
    """Answers by prompt."""

    def __init__(self, said):
        super().__init__("")
        self.said = said

    def choose(self, prompts, choices, ending, done):
        return [
            [(float(c == self.said[p]), 1) for c in options]
            for p, options in zip(prompts, choices, strict=True)
        ]


def run(tasks, seed, accuracy, path):
    """Records of a model that is right with a probability, and its report."""
    generator = np.random.default_rng(seed)
    said = {
        item.prompt: item.answer
        if generator.random() < accuracy
        else LABELS[item.answer == LABELS[0]]
        for task in tasks
        for item in task.items
    }
    report = evaluate(Said(said), tasks, progress=False, written=path)
    return records.read(path), report


@pytest.fixture
def runs(tmp_path):
    generator = np.random.default_rng(0)
    tasks = [choice(n, generator.choice(LABELS, 60).tolist()) for n in ("one", "two")]
    return [run(tasks, s, a, tmp_path / str(s)) for s, a in ((1, 0.5), (2, 0.75))]


def test_differences_are_those_of_a_loop_and_of_scipy(runs):
    (a, _), (b, _) = runs
    one, two, pooled = compare(a, b, resamples=400)
    for found, name in ((one, "one"), (two, "two")):
        of = {k: [r["right"] for r in x if r["task"] == name] for k, x in (("a", a), ("b", b))}
        assert (found.task, found.n, found.unpaired) == (f"{name}@dev", 60, 0)
        assert found.score_a == pytest.approx(np.mean(of["a"]))
        assert found.difference == pytest.approx(np.mean(of["b"]) - np.mean(of["a"]))
        pairs = list(zip(of["a"], of["b"], strict=True))
        assert found.only_a == pairs.count((1.0, 0.0)) and found.only_b == pairs.count((0.0, 1.0))
        exact = binomtest(found.only_a, found.only_a + found.only_b).pvalue
        assert found.p == pytest.approx(exact)
        # the paired bootstrap's interval, near that of the normal approximation
        gains = np.subtract(of["b"], of["a"])
        reach = 1.96 * gains.std() / np.sqrt(60)
        assert found.low == pytest.approx(gains.mean() - reach, abs=0.04)
        assert found.high == pytest.approx(gains.mean() + reach, abs=0.04)
    assert pooled.task == POOLED and pooled.n == 120
    assert pooled.difference == pytest.approx((one.difference + two.difference) / 2)
    assert pooled.only_a == one.only_a + two.only_a
    assert pooled.p == pytest.approx(binomtest(pooled.only_a, pooled.only_a + pooled.only_b).pvalue)
    assert pooled.high - pooled.low < one.high - one.low


def test_a_run_against_itself_and_reversed(runs):
    (a, _), (b, _) = runs
    same = compare(a, a, resamples=50)
    assert all(d.difference == d.low == d.high == 0 and d.p == 1.0 for d in same)
    forth, back = compare(a, b, resamples=50)[0], compare(b, a, resamples=50)[0]
    assert forth.difference == -back.difference and forth.only_a == back.only_b
    assert forth.p == back.p and mcnemar(0, 0) == 1.0


def test_only_shared_items_are_compared(runs):
    (a, _), (b, _) = runs
    found = compare(a[:80], b[10:], resamples=20)
    assert [d.n for d in found] == [50, 20, 70] and [d.unpaired for d in found] == [10, 40, 50]
    with pytest.raises(UserError, match="no item in common"):
        compare(a[:10], b[10:20])
    with pytest.raises(UserError, match="resamples: 0 is below 1"):
        compare(a, b, resamples=0)
    with pytest.raises(UserError, match="seed: -1 is below 0"):
        compare(a, b, seed=-1)
    other = [{**r, "metric": "exact_match"} for r in b]
    with pytest.raises(UserError, match="one@dev: scored by accuracy and by exact_match"):
        compare(a, other)


def test_tasks_of_one_run_alone_are_named(runs):
    (a, _), (b, _) = runs
    assert alone(a, b) == [] and alone(a, b[:60]) == ["two@dev"] and alone(b[:60], a) == []


def test_tasks_without_a_common_item_are_named(runs):
    (a, _), (b, _) = runs
    one_half, other_half = [*a[:60], *a[60:80]], [*b[:60], *b[80:]]
    assert [d.task for d in compare(one_half, other_half)] == ["one@dev"]
    assert apart(one_half, other_half) == ["two@dev"] and apart(a, b) == []
    assert apart(a, b[:60]) == []


def test_scores_that_are_no_share_have_no_mcnemar(tmp_path):
    items = tuple(Item(f"q{i}", "疾病实体：感冒", source=f"感冒{i}") for i in range(4))
    task = Task("ner", "zh", "generate", "entity_f1", items)
    right, wrong = "疾病实体：感冒", "疾病实体：咳"
    for name, said in (("a", [right, wrong, wrong, wrong]), ("b", [right, right, right, wrong])):
        model = Scripted({f"q{i}": [text] for i, text in enumerate(said)})
        evaluate(model, [task], progress=False, written=tmp_path / name)
    (found,) = compare(records.read(tmp_path / "a"), records.read(tmp_path / "b"), resamples=200)
    assert (found.score_a, found.score_b) == (0.25, 0.75)
    assert found.only_a is found.only_b is found.p is None and found.low < 0.5 < found.high


def test_items_that_are_asked_twice_are_paired_in_turn(tmp_path):
    task = choice("t", ["yes", "no"])
    twice = Task("t", "en", "choice", "accuracy", (*task.items, *task.items))
    evaluate(Constant("yes"), [twice], progress=False, written=tmp_path / "r")
    found = records.read(tmp_path / "r")
    assert compare(found, found, resamples=5)[0].n == 4


def test_the_page_of_an_evaluation(tmp_path):
    """Scores, languages, confusion, and examples that were right and wrong."""
    items = [
        Item(f"<q{i}>", "yes" if i % 3 else "no", LABELS, language=("en", "zh")[i % 2])
        for i in range(60)
    ]
    task = Task("t", "mul", "choice", "accuracy", tuple(items), 0.6, split="dev")
    path = tmp_path / "r"
    report = evaluate(Constant("yes"), [task], progress=False, written=path, about={"base": "B"})
    sections = page.of_report(report, records.read(path))
    titles = [s.title for s in sections]
    assert titles == [
        *("Scores", "What was asked, and whom", "Languages", "Confusion: t@dev"),
        *("Right answers", "Wrong answers"),
    ]
    by = {s.title: s for s in sections}
    assert [row[1] for row in by["Languages"].rows] == ["en", "zh"]
    for language, row in zip(("en", "zh"), by["Languages"].rows, strict=True):
        own = [i.answer == "yes" for i in items if i.language == language]
        assert row[3] == f"{100 * np.mean(own):.1f}" and row[5] == len(own)
    np.testing.assert_allclose(by["Confusion: t@dev"].matrix, [[1, 0], [1, 0]])
    assert len(by["Right answers"].rows) == len(by["Wrong answers"].rows) == 20
    assert all(row[2] == row[3] == "yes" for row in by["Right answers"].rows)
    assert all((row[2], row[3]) == ("no", "yes") for row in by["Wrong answers"].rows)
    text = html.report_html(tmp_path / "p.html", sections).read_text()
    assert "&lt;q30&gt;" in text and "<q" not in text


def test_the_page_of_several_runs(runs, tmp_path):
    (a, first), (b, second) = runs
    found = page.beside({"A": first, "B": second}, {"B": compare(a, b, resamples=20)})
    assert [s.title for s in found] == ["Side by side", "B against A", "A", "B"]
    assert found[0].columns[-2:] == ("A", "B") and len(found[0].rows) == 2
    assert found[1].rows[-1][0] == POOLED
    assert html.report_html(tmp_path / "p.html", found).is_file()
    alone = Report(first.results[:1])
    assert page.beside({"A": first, "B": alone}, {})[0].rows[1][-1] == ""


def test_questions_on_one_text_are_told_apart():
    """What stands before the text is no part of what is asked, what stands after it is."""
    prompts = ("fever, cough\nA or B?", "fever, cough\nC or D?", "Guide.\nfever, cough\nA or B?")
    ids = [records.identity(Item(p, "yes", LABELS, source="fever, cough")) for p in prompts]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("form", ["prompt", "turns"])
@pytest.mark.parametrize("asked", ["fever?", (("user", "a"), ("assistant", "b"), ("user", "c"))])
def test_a_user_s_item_is_the_same_behind_examples(asked, form):
    item, examples = Item(asked, "yes", LABELS), [Item("cough?", "no", LABELS)]
    told = before_item(item, examples, form)
    assert told.prompt != item.prompt
    assert records.identity(told) == records.identity(item) != records.identity(examples[0])


# Contamination.


def test_overlaps_are_those_of_a_naive_search():
    generator = np.random.default_rng(1)
    vocabulary = [f"w{i}" for i in range(12)]
    rows = [" ".join(generator.choice(vocabulary, 30)) for _ in range(20)]
    texts = [" ".join(generator.choice(vocabulary, n)) for n in (3, 8, 20, 40, 6, 9)]
    texts[4] = " ".join(rows[7].split()[5:11])
    first, second, *others = rows[3].split()[:9]
    texts[5] = f"{first}. {second.upper()}, {' '.join(others)}"
    tasks = {"t": [Item(text, "a") for text in texts]}
    n = 4
    found = {o.item: o for o in overlaps(tasks, rows, n)}
    for i, text in enumerate(texts):
        own = [w.strip(".,").lower() for w in text.split()]
        size = min(n, len(own))
        grams = {tuple(own[k : k + size]) for k in range(len(own) - size + 1)}
        shares = []
        for row in rows:
            words = row.split()
            inside = {tuple(words[k : k + size]) for k in range(len(words) - size + 1)}
            shares.append(len(grams & inside) / len(grams))
        if max(shares) == 0:
            assert i not in found
            continue
        assert found[i].share == pytest.approx(max(shares)) == pytest.approx(shares[found[i].row])
        others = {k for k, share in enumerate(shares) if share} - {found[i].row}
        assert set(found[i].also) == others and found[i].row_text == rows[found[i].row]
    assert found[4].share == found[5].share == 1.0


def test_overlaps_look_at_text_and_options_in_any_script():
    asked = {"choices": ("A", "B"), "texts": ("感冒", "肺炎"), "source": "患者，男性，六十岁"}
    items = [Item("… 患者，男性，六十岁，咳嗽三天", "A", **asked), Item("other", "x")]
    (found,) = overlaps({"t": items}, ["甲", "病历：患者男性六十岁 感冒 肺炎。"], 13)
    assert (found.task, found.item, found.row, found.share) == ("t", 0, 1, 1.0)
    assert overlaps({"t": items}, ["患者男性"], 13) == []


def test_overlaps_look_at_all_turns_of_an_item():
    """The last one may be any question, and a system's text that of many rows."""
    turns = (
        ("system", "answer as a doctor would do it"),
        ("user", "a man of sixty years has a fever and coughs"),
        ("assistant", "since when does he have it"),
        ("user", "and now"),
    )
    rows = ["and now", "answer as a doctor would do it", "He coughs: a man of sixty years has it."]
    (found,) = overlaps({"t": [Item(turns, "x")]}, rows, 5)
    assert (found.row, found.also, found.shared) == (2, [], "a man of sixty years")
    assert found.share == 2 / 14


def test_overlaps_look_at_thoughts_too():
    said: list[Turn] = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "B", "reasoning_content": "a man has a fever"},
    ]
    row = Conversation(conversations=said, language="")
    assert row_text(row) == "ask a man has a fever B"


def test_every_metric_that_records_keep_can_be_counted_again(tmp_path):
    """From records alone, the score is the report's."""
    spans = Item("q", "Disease: flu", source="flu", spans=(("Disease", 0, 3),))
    number = Item("q", "20", allowed=("19", "21"))
    cases = {"span_f1": (spans, "Disease: flu"), "number_within": (number, "The answer is 20.5")}
    for metric, (item, said) in cases.items():
        task = Task(metric, "en", "generate", metric, (item,))
        report = evaluate(Constant(said), [task], progress=False, written=tmp_path / metric)
        found = records.read(tmp_path / metric)
        assert compare(found, found, resamples=2)[0].score_a == report.results[0].score == 1.0
        assert metrics.find(metric).whole


def test_a_confusion_has_its_labels_in_the_order_of_the_choices(tmp_path):
    scale = ("mild", "severe", "fatal")
    items = tuple(Item(f"q{i}", answer, scale) for i, answer in enumerate(scale))
    task = Task("t", "en", "choice", "kappa_linear", items)
    report = evaluate(Constant("severe"), [task], progress=False, written=tmp_path / "r")
    sections = page.of_report(report, records.read(tmp_path / "r"))
    (confusion,) = [section for section in sections if section.title.startswith("Confusion")]
    assert tuple(confusion.rows) == scale
    np.testing.assert_allclose(confusion.matrix, [[0, 1, 0]] * 3)
