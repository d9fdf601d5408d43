"""Tasks, evaluation with models whose scores are known, and reports."""

import functools
import hashlib
import json
import random

import pytest

from medmoe_jax.data import medical
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.evaluation import Item, Report, Task, evaluate, html, list_tasks, load_task


class Oracle:
    """Knows the answers by prompt."""

    def __init__(self, *tasks):
        self.answers = {i.prompt: i.answer for task in tasks for i in task.items}
        self.asked = 0

    def choose(self, prompts, choices):
        self.asked += len(prompts)
        return [
            [(0.0 if c == self.answers[p] else -5.0, 1) for c in options]
            for p, options in zip(prompts, choices, strict=True)
        ]

    def generate(self, prompts, max_tokens):
        return [self.answers[p] for p in prompts]


class Constant:
    """Always says the same."""

    def __init__(self, text):
        self.text = text

    def choose(self, prompts, choices):
        return [[(float(c == self.text), 1) for c in options] for options in choices]

    def generate(self, prompts, max_tokens):
        return [self.text] * len(prompts)


class Guesser(Constant):
    """Chooses at random."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def choose(self, prompts, choices):
        return [[(self.random.random(), 1) for _ in options] for options in choices]


def exam(n=400, seed=0):
    generator = random.Random(seed)
    items = tuple(Item(f"q{i}", generator.choice("ABCD"), tuple("ABCD")) for i in range(n))
    return Task("exam", "en", "choice", "accuracy", items)


def test_an_oracle_is_right_and_a_guesser_is_at_chance():
    task = exam()
    best = evaluate(Oracle(task), [task], progress=False).results[0]
    assert best.score == 1.0 and best.high == pytest.approx(1.0) and best.n == 400
    chance = evaluate(Guesser(3), [task], progress=False).results[0]
    assert chance.low < 0.25 < chance.high and chance.high - chance.low < 0.1


def test_a_constant_scores_the_share_of_its_letter():
    task = exam()
    share = sum(item.answer == "B" for item in task.items) / len(task.items)
    assert evaluate(Constant("B"), [task], progress=False).results[0].score == share


def test_length_normalisation_changes_the_choice():
    class Lengths:
        def choose(self, prompts, choices):
            return [[(-2.0, 1), (-3.0, 3)] for _ in prompts]

    task = Task("t", "en", "choice", "accuracy", (Item("q", "a b c", ("a", "a b c")),))
    assert evaluate(Lengths(), [task], progress=False).results[0].score == 0.0
    assert evaluate(Lengths(), [task], progress=False, normalise=True).results[0].score == 1.0


def test_free_answers_are_read_out_of_text():
    task = exam(8)
    report = evaluate(Constant("Let us see. The answer is C."), [task], free=True, progress=False)
    share = sum(item.answer == "C" for item in task.items) / 8
    assert report.results[0].score == share
    assert evaluate(Constant("?"), [task], free=True, progress=False).results[0].score == 0.0


def test_nan_is_an_error():
    class Broken:
        def choose(self, prompts, choices):
            return [[(float("nan"), 1)] * 4 for _ in prompts]

    with pytest.raises(ValueError, match=r"exam: .*NaN"):
        evaluate(Broken(), [exam(4)], progress=False)


def test_a_stop_ends_after_a_batch(tmp_path):
    """Nothing is written of an evaluation that was not finished."""
    task, asked = exam(), []

    def stop():
        asked.append(oracle.asked)
        return len(asked) == 3

    oracle = Oracle(task)
    with pytest.raises(Stopped, match="evaluation was asked to stop, in task 'exam'"):
        evaluate(oracle, [task], batch=32, records=tmp_path / "records", stop=stop)
    assert asked == [32, 64, 96] and not list(tmp_path.iterdir())


def test_further_scores_and_rankings():
    class Ranker:
        def choose(self, prompts, choices):
            return [[(-float(i), 1) for i, _ in enumerate(c)] for c in choices]

    labels = ("a", "b", "c", "d")
    items = tuple(Item(f"q{i}", answer, labels) for i, answer in enumerate("abcd"))
    task = Task("t", "en", "choice", "accuracy", items, also=("hit_at_3", "macro_f1"))
    result = evaluate(Ranker(), [task], progress=False).results[0]
    assert result.score == 0.25
    assert result.also == {"hit_at_3": 0.75, "macro_f1": pytest.approx(0.4 / 4)}


def test_records(tmp_path):
    task = exam(3)
    path = tmp_path / "records.jsonl"
    evaluate(Constant("A"), [task, task], progress=False, records=path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 6
    assert records[0] == {
        "task": "exam",
        "prompt_sha256": hashlib.sha256(b"q0").hexdigest(),
        "prediction": "A",
        "answer": task.items[0].answer,
    }


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_user_tasks(tmp_path):
    rows = [{"prompt": f"q{i}", "answer": "yes", "choices": ["yes", "no"]} for i in range(9)]
    rows.append({"prompt": "q9", "answer": "no", "choices": ["yes", "no"]})
    task = load_task(write(tmp_path / "mine.jsonl", *rows))
    assert (task.name, task.kind, task.metric, task.majority) == ("mine", "choice", "accuracy", 0.9)
    some = load_task(tmp_path / "mine.jsonl", limit=4, seed=1)
    assert len(some.items) == 4 and some == load_task(tmp_path / "mine.jsonl", limit=4, seed=1)
    free = load_task(write(tmp_path / "free.jsonl", {"prompt": "q", "answer": "a b"}))
    result = evaluate(Constant("A  b"), [free], progress=False).results[0]
    assert (result.metric, result.score, result.also) == ("exact_match", 1.0, {"rouge_l": 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no items"),
        ('{"prompt": "q"}', r"jsonl:1: field 'answer'"),
        ("{", r"jsonl:1: not JSON"),
        ("[]", r"jsonl:1: write an object"),
        ('{"prompt": "q", "answer": "c", "choices": ["a"]}', r"jsonl:1: the answer 'c'"),
        ('{"prompt": "q", "answer": "a", "choices": "a"}', r"jsonl:1: field 'choices'"),
        (
            '{"prompt": "q", "answer": "a", "choices": ["a"]}\n{"prompt": "q", "answer": "a"}',
            "some items have choices",
        ),
    ],
)
def test_bad_user_tasks(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_task(path)


def test_missing_and_unknown_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="'medqb' is not a medical set"):
        load_task("medqb")
    write(tmp_path / "t.jsonl", {"prompt": "q", "answer": "a"})
    with pytest.raises(UserError, match="limit is 0"):
        load_task(tmp_path / "t.jsonl", limit=0)


@pytest.mark.data
@pytest.mark.parametrize("name", [info.name for info in list_tasks()])
def test_every_task_is_solved_by_its_own_answers(name, data_dir):
    task = load_task(name, limit=40, root=data_dir)
    if len({i.prompt for i in task.items}) < len(task.items):  # pairs asked twice
        task = Task(**{**vars(task), "items": tuple({i.prompt: i for i in task.items}.values())})
    result = evaluate(Oracle(task), [task], progress=False, resamples=20).results[0]
    assert result.score == pytest.approx(1.0) and 0 < result.n <= 40
    assert all(value == pytest.approx(1.0) for value in result.also.values())
    assert (task.majority is None) == (task.metric not in ("accuracy", "letters_exact"))


@pytest.mark.data
def test_majority_comes_from_training_answers(data_dir):
    task = load_task("cmedtc", root=data_dir)
    assert task.majority == pytest.approx(357 / 1550)
    result = evaluate(Constant("Disease"), [task], progress=False).results[0]
    assert result.score == task.majority
    assert result.also["macro_f1"] < 0.02


@pytest.mark.data
def test_shots_come_from_training_rows(data_dir):
    plain, shot = (load_task("mmlu", 5, root=data_dir, shots=n) for n in (0, 2))
    train = {row.prompt for row in medical.rows("mmlu", "train", data_dir)}
    for a, b in zip(plain.items, shot.items, strict=True):
        assert b.prompt.endswith(a.prompt) and a.prompt not in train
        first = b.prompt.removesuffix(a.prompt).split("\n\n")[0]
        assert first.rpartition("\n")[0] in train
    with pytest.raises(UserError, match="0 training rows"):
        load_task("jmed_smdis", root=data_dir, shots=1)


@pytest.mark.data
def test_prompts_can_be_fitted(data_dir):
    fit = functools.partial(medical.shorten, limit=300)
    task = load_task("pubmedqa", 20, root=data_dir, fit=fit)
    assert all(len(i.prompt) <= 300 and i.prompt.endswith("(yes/no/maybe):") for i in task.items)


def test_reports_survive_saving(tmp_path):
    task = exam(20)
    report = evaluate(Guesser(0), [task], progress=False)
    path = report.save(tmp_path / "deep" / "report.json")
    assert Report.load(path).to_dict() == report.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert report.average("knowledge") == report.results[0].score
    assert report.average("alignment") is None
    assert report.table().row_count == 1
    path.write_text("{}")
    with pytest.raises(UserError, match=r"report\.json"):
        Report.load(path)


def test_the_page_stands_alone(tmp_path):
    task = exam(20)
    sections = [
        html.ResultsSection("Scores", evaluate(Guesser(0), [task], progress=False)),
        html.TextSection("About", "A < B\n\nsecond"),
        html.TableSection("Numbers", ["name", "value"], [["x", 1.5], ["y", 12]]),
        html.LinesSection("Loss", [("train", [0, 1, 2], [3.0, 2.0, 1.5]), ("dev", [2], [1.9])]),
        html.HeatMapSection(
            "Router", [[0.1, 0.9], [0.5, 0.5]], ["layer 0", "layer 1"], ["e0", "e1"], x="expert"
        ),
    ]
    text = html.report_html(tmp_path / "r.html", sections, title="Run <1>").read_text()
    assert "Run &lt;1&gt;" in text and "A &lt; B" in text
    assert text.count("<figure>") == 2 and "currentColor" in text and html.INK not in text
    assert "layer 1" in text and "0.90" in text and ">train<" in text
    for outside in ('href="http', 'src="', "url(http", "@import", "<script", "<metadata"):
        assert outside not in text
    assert "prefers-color-scheme: dark" in text


def test_a_heat_map_with_wrong_names_is_refused():
    section = html.HeatMapSection("Router", [[0.1, 0.9]], ["a", "b"], ["e0", "e1"])
    with pytest.raises(ValueError, match="'Router'"):
        section.body()
