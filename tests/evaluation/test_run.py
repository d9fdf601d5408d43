"""Evaluation with models whose scores are known, ways to answer, and reports."""

import dataclasses
import io
import json
import random
import re

import pytest
from rich.console import Console

from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.evaluation import Item, Report, Task, Way, evaluate, html, readings, records, ways
from medmoe_jax.evaluation.items import as_turns
from medmoe_jax.inference.language_model import Answer
from tests.evaluation.models import Constant, Guesser, Oracle, Scripted


def exam(n=400, seed=0, name="exam"):
    generator = random.Random(seed)
    items = tuple(Item(f"q{i}", generator.choice("ABCD"), tuple("ABCD")) for i in range(n))
    return Task(name, "en", "choice", "accuracy", items)


def one(model, task, **more):
    return evaluate(model, [task], progress=False, **more).results[0]


def test_an_oracle_is_right_and_a_guesser_is_at_chance():
    task = exam()
    best = one(Oracle(task), task)
    assert best.score == 1.0 and best.high == pytest.approx(1.0) and best.n == 400
    chance = one(Guesser(3), task)
    assert chance.low < 0.25 < chance.high and chance.high - chance.low < 0.1
    assert chance.chance == 0.25


def test_a_constant_scores_the_share_of_its_letter():
    task = exam()
    share = sum(item.answer == "B" for item in task.items) / len(task.items)
    assert one(Constant("B"), task).score == share
    assert one(Constant("B"), task, way=Way("constrained")).score == share


class Lengths:
    """The second choice is less likely, but longer in tokens and bytes."""

    shortened = 0

    def choose(self, prompts, choices, ending, done):
        self.ending = ending
        alone = [len(p) < 4 for p in prompts]
        return [[(-1.0, 1), (-9.0, 3)] if a else [(-2.0, 1), (-3.0, 3)] for a in alone]


LONG = Task("t", "en", "choice", "accuracy", (Item("the question\ncue", "a b c", ("a", "a b c")),))


@pytest.mark.parametrize(
    ("score", "wanted", "scores"),
    [
        ("sum", 0.0, [-2.0, -3.0]),
        ("token", 1.0, [-2.0, -1.0]),
        ("byte", 1.0, [-2.0, -0.6]),
        ("unconditional", 1.0, [-1.0, 6.0]),  # less the scores after "cue" alone
    ],
)
def test_scores_of_a_likelihood(score, wanted, scores, tmp_path):
    result = one(Lengths(), LONG, way=Way(score=score), written=tmp_path / "r")
    assert result.score == wanted
    (record,) = records.read(tmp_path / "r")
    assert record["scores"] == pytest.approx(scores)
    assert record["ranking"] == (["a b c", "a"] if wanted else ["a", "a b c"])


def test_the_end_of_the_turn_counts_only_where_it_is_asked_for():
    model = Lengths()
    one(model, LONG)
    assert model.ending is False
    one(model, LONG, way=Way(ending=True))
    assert model.ending is True


def test_option_texts_are_scored_in_place_of_letters():
    item = Item("q", "B", ("A", "B"), ("aspirin", "heparin"))
    task = Task("t", "en", "choice", "accuracy", (item,))
    assert one(Constant("heparin"), task, way=Way("text")).score == 1.0
    assert one(Constant("aspirin"), task, way=Way("text")).score == 0.0
    assert one(Constant("B"), task, way=Way("text")).score == 0.0  # all alike: the first


def test_free_answers_are_read_and_kept_as_they_were(tmp_path):
    task = exam(8)
    text = "Let us see. The answer is C."
    result = one(Constant(text), task, way=Way("free"), written=tmp_path / "r")
    assert result.score == sum(item.answer == "C" for item in task.items) / 8
    assert (result.unparsed, result.cut) == (0, 0)
    assert {tuple(r["raw"]) for r in records.read(tmp_path / "r")} == {(text,)}
    lost = one(Constant("?", ended=False), task, way=Way("free"))
    assert (lost.score, lost.unparsed, lost.cut) == (0.0, 8, 8)
    assert lost.notes() == [
        "8 answers could not be read",
        "8 answers were cut at the most tokens",
    ]


def test_reasoning_is_asked_for_in_the_item_s_language(tmp_path):
    """Records hold all that was asked; the item is the same as without."""
    asked = {"q0": "zh", "q1": "de", "q2": "xx"}
    items = tuple(Item(q, "B", ("A", "B"), language=c) for q, c in asked.items())
    task = Task("t", "mul", "choice", "accuracy", items)
    said = ["因为……答案为B。", "Daher ist die Antwort B.", "So the answer is B."]
    model = Scripted({q: [text] for q, text in zip(asked, said, strict=True)})
    assert one(model, task, way=Way("reason"), written=tmp_path / "r").score == 1.0
    whole = [q + ways.REASON[c] for q, c in zip(asked, ("zh", "de", "en"), strict=True)]
    found = records.read(tmp_path / "r")
    assert model.prompts == whole == [record["prompt"] for record in found]
    one(Constant("B"), task, written=tmp_path / "letters")
    letters = records.read(tmp_path / "letters")
    assert [record["prompt"] for record in letters] == list(asked)
    assert [record["id"] for record in letters] == [record["id"] for record in found]


class Drawn:
    """Answers with a letter that depends on the stream which an item draws from."""

    shortened = 0

    def answer(self, prompts, max_tokens, sampling):
        streams = ((sampling.seed, sampling.first + i) for i in range(len(prompts)))
        letters = [random.Random(str(stream)).choice("ABCD") for stream in streams]
        return [Answer(letter) for letter in letters]


def test_every_item_has_draws_of_its_own_whatever_the_batch(tmp_path):
    task = exam(40)
    found = []
    for batch in (7, 40):
        way = Way("free", samples=3, temperature=0.7)
        one(Drawn(), task, way=way, batch=batch, written=tmp_path / "r")
        found.append([tuple(r["raw"]) for r in records.read(tmp_path / "r")])
    assert found[0] == found[1] and len(set(found[0])) > 20


def test_seeds_have_no_sample_in_common(tmp_path):
    """Several samples of each item: those of two seeds tell how far votes differ by chance."""
    seeds = []

    class Listening(Drawn):
        def answer(self, prompts, max_tokens, sampling):
            seeds.append(sampling.seed)
            return super().answer(prompts, max_tokens, sampling)

    for seed in (0, 1, 2, -1, 2**63 - 1):
        one(Listening(), exam(3), way=Way("free", samples=4, temperature=0.7), seed=seed)
        assert seeds[-4] == seed  # the first one's is that of a single sample
    assert len(set(seeds)) == 20 and all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_most_samples_decide():
    task = Task("t", "en", "choice", "accuracy", (Item("q0", "B", tuple("ABC")),))
    said = ["The answer is A.", "I do not know", "The answer is B.", "B", "The answer is C"]
    way = Way("free", samples=5, temperature=0.7)
    model = Scripted({"q0": said})
    result = one(model, task, way=way)
    assert result.score == 1.0 and result.unparsed == 0 and model.sampling.temperature == 0.7
    tie = Scripted({"q0": ["C", "B", "A", "B", "C"]})
    assert one(tie, task, way=way).score == 0.0  # of equals the one that came first


@pytest.mark.parametrize("answer", ["free", "reason"])
def test_several_samples_of_a_task_without_choices_are_refused(answer):
    task = Task("open", "en", "generate", "letters_exact", (Item("q0", "A, C", ()),))
    with_choices = Task("t", "en", "choice", "accuracy", (Item("q1", "B", tuple("ABC")),))
    way = Way(answer, samples=3, temperature=0.7)
    report = evaluate(Constant("B"), [task, with_choices], way=way, progress=False)
    assert [r.task for r in report.results] == ["t"]
    (failure,) = report.failures
    assert failure["task"] == "open" and "'open' has no choices" in failure["error"]


def test_an_example_that_a_model_goes_on_to_is_cut():
    item = Item("q0", "a b", ())
    task = Task("t", "en", "generate", "exact_match", (item,), until=("\n\n",))
    for said in ("a b\n\nWhat is next?\nx", "\n\na b\n\nWhat is next?\nx"):
        assert one(Scripted({"q0": [said]}), task).score == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": "guess"}, "answer: 'guess' is none of letter, text"),
        ({"score": "mean"}, "score: 'mean' is none of sum"),
        ({"samples": 3}, "several samples need a temperature above 0"),
        ({"samples": 3, "temperature": 1.0}, "and an answer that is written"),
        ({"samples": 0}, "samples: 0 is below 1"),
        ({"answer": "free", "max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({"temperature": float("nan")}, "temperature: nan is not a finite number"),
        ({"answer": "free", "temperature": -1.0}, r"temperature: -1\.0 is below 0"),
        ({"answer": "free", "score": "byte"}, "need an answer that is scored"),
        ({"answer": "constrained", "ending": True}, "need an answer that is scored"),
        ({"reading": "first-capital"}, "reads what is written; letter is scored"),
    ],
)
def test_ways_that_there_are_not(wrong, message):
    with pytest.raises(UserError, match=message):
        Way(**wrong)


READ = [
    ("ming", "It is (C), not B", "C"),
    ("ming", "none", None),
    ("medcare", "解析：A对。\n答案为C", "C"),
    ("medcare", "答案为A\n所以答案为BD", None),
    ("medcare", "The answer is D.", "D"),
    ("medcare", "D", None),
    ("apollo", "\nThe correct answer is (b), not (C) or (b).\n(A)(A)(A)", "B"),
    ("apollo", "Answer C then A then C", "A"),  # so it does: the A of "Answer" is one
    ("apollo", "Yes.", "A"),
    ("apollo", "nothing here", None),
]


@pytest.mark.parametrize(("name", "text", "wanted"), READ)
def test_letters_as_published_code_reads_them(name, text, wanted):
    assert readings.read(readings.find(name), text, tuple("ABCDE")) == wanted


def test_an_unknown_reading_is_named_with_the_closest():
    with pytest.raises(UserError, match="did you mean 'apollo'"):
        readings.find("appolo")


def test_a_reading_takes_the_place_of_ours():
    task = Task("t", "en", "choice", "accuracy", (Item("q", "C", tuple("ABCD")),))
    model = Constant("A patient. The answer is C.")
    assert one(model, task, way=Way("free")).score == 1.0
    assert one(model, task, way=Way("free", reading="first-capital")).score == 0.0


@pytest.mark.parametrize("way", [Way(), Way("free", samples=3, temperature=1.0)])
def test_prompts_that_the_model_cuts_are_counted_by_task(way):
    class Short(Constant):
        """Cuts every second prompt, as often as it is asked it."""

        def choose(self, prompts, choices, ending, done):
            self.shortened += len(prompts[::2])
            return super().choose(prompts, choices, ending, done)

        def answer(self, prompts, max_tokens, sampling):
            self.shortened += len(prompts[::2])
            return super().answer(prompts, max_tokens, sampling)

    first, second = exam(4), dataclasses.replace(exam(6), name="other", shortened=1)
    report = evaluate(Short("B"), [first, second], way=way, progress=False)
    assert [result.shortened for result in report.results] == [2, 4]


def test_nan_is_an_error():
    class Broken:
        shortened = 0

        def choose(self, prompts, choices, ending, done):
            return [[(float("nan"), 1)] * 4 for _ in prompts]

    with pytest.raises(ValueError, match=r"exam: .*NaN"):
        evaluate(Broken(), [exam(4)], progress=False)


def test_a_stop_ends_after_a_batch_and_keeps_the_tasks_that_are_finished(tmp_path):
    task, asked, saved = exam(), [], []

    def stop():
        asked.append(oracle.asked)
        return len(asked) == 3 + 13

    oracle = Oracle(task)
    with pytest.raises(Stopped, match="evaluation was asked to stop, in task 'second'"):
        evaluate(
            oracle,
            [task, exam(name="second")],
            way=Way("constrained"),
            batch=32,
            written=tmp_path / "records",
            stop=stop,
            finished=lambda report: saved.append([r.task for r in report.results]),
            progress=False,
        )
    assert asked[:2] == [32, 64] and asked[-1] == 400 + 3 * 32
    assert saved == [["exam"]] and len(records.read(tmp_path / "records")) == 400


@pytest.mark.parametrize("score", ["sum", "unconditional"])
def test_scored_items_are_asked_at_once_and_a_stop_ends_between_their_batches(score):
    class Batches(Constant):
        def choose(self, prompts, choices, ending, done):
            answers = super().choose(prompts, choices, ending, done)
            for size in (100, 250, 50):
                told.append(size)
                done(size)
            return answers

    told, model = [], Batches("A")
    way = Way(score=score)
    assert one(model, exam(), way=way).n == 400
    times = 2 if score == "unconditional" else 1
    assert told == [100, 250, 50] * times and model.asked == 400 * times
    told.clear()
    with pytest.raises(Stopped, match="in task 'exam'"):
        evaluate(model, [exam()], way=way, progress=False, stop=lambda: len(told) == 2)
    assert told == [100, 250]


def test_a_task_that_cannot_be_done_does_not_lose_the_others(tmp_path):
    class Narrow(Constant):
        def answer(self, prompts, max_tokens, sampling):
            raise UserError(f"{max_tokens} new tokens do not fit a context of 512")

    note = Task("note", "en", "generate", "rouge_l", (Item("q", "a"),), max_tokens=1024)
    saved = []
    report = evaluate(
        Narrow("A"),
        [exam(4), note, exam(4, name="other")],
        progress=False,
        finished=lambda so_far: saved.append(len(so_far.results)),
        written=tmp_path / "records",
        failures=[{"task": "gone", "error": "no file"}],
    )
    assert [r.task for r in report.results] == ["exam", "other"] and saved == [1, 1, 2]
    assert [f["task"] for f in report.failures] == ["gone", "note"]
    assert "note: not done: 1024 new tokens do not fit a context of 512" in report.notes()
    split, written = dataclasses.replace(note, split="test"), tmp_path / "records"
    report = evaluate(Narrow("A"), [split], progress=False, written=written)
    assert written.read_text() == ""  # not those of the evaluation before
    assert [f["task"] for f in report.failures] == ["note@test"]  # dev might be done


def test_further_scores_and_rankings():
    class Ranker:
        shortened = 0

        def choose(self, prompts, choices, ending, done):
            return [[(-float(i), 1) for i, _ in enumerate(c)] for c in choices]

    labels = ("a", "b", "c", "d")
    items = tuple(Item(f"q{i}", answer, labels) for i, answer in enumerate("abcd"))
    task = Task("t", "en", "choice", "accuracy", items, also=("hit_at_3", "macro_f1"))
    result = one(Ranker(), task)
    assert result.score == 0.25
    assert result.also == {"hit_at_3": 0.75, "macro_f1": pytest.approx(0.4 / 4)}


@pytest.mark.parametrize("answer", ["letter", "text", "constrained", "free", "reason"])
def test_a_metric_of_rankings_needs_all_choices_scored(answer, tmp_path):
    """One choice, or those of some samples, would be a hit at 1 under another name."""
    items = tuple(Item(f"q{i}", right, tuple("abcd")) for i, right in enumerate("abcd"))
    further = Task("further", "en", "choice", "accuracy", items, also=("hit_at_3", "macro_f1"))
    main = dataclasses.replace(further, name="main", metric="hit_at_3", also=())
    report = evaluate(
        Constant("c"), [main, further], way=Way(answer), progress=False, written=tmp_path / "r"
    )
    scored = answer in ("letter", "text")
    assert [r.task for r in report.results] == ["main", "further"][not scored :]
    assert ("hit_at_3" in report.results[-1].also) == scored
    assert {len(r["ranking"]) for r in records.read(tmp_path / "r")} == {4 * scored}
    told = [f"main: not done: metric 'hit_at_3' needs a score of every choice, which the answer "
            f"'{answer}' has not; ask with letter or text"]  # fmt: skip
    assert [note for note in report.notes() if "not done" in note] == told * (not scored)


def test_records(tmp_path):
    task = exam(3)
    path = tmp_path / "records.jsonl"
    evaluate(Constant("A"), [task, task], progress=False, written=path)
    found = records.read(path)
    assert len(found) == 6
    first = found[0]
    assert first["task"] == "exam" and first["prompt"] == "q0" and first["choices"] == list("ABCD")
    assert first["scores"] == [1.0, 0.0, 0.0, 0.0] and first["prediction"] == "A"
    assert first["answer"] == task.items[0].answer and first["right"] == float(
        first["answer"] == "A"
    )
    assert len({r["id"] for r in found}) == 3
    turns = Item((("user", "a"), ("assistant", "b"), ("user", "c")), "x")
    assert records.item_of({"prompt": as_turns(turns.prompt), "answer": "x"}) == turns
    path.write_text('{"task": "x"}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:1: not a record of medmoe eval: no 'id'"):
        records.read(path)
    with pytest.raises(UserError, match="no such file"):
        records.read(tmp_path / "none")


def test_reports_survive_saving(tmp_path):
    task = exam(20)
    about = {"base": "b", "versions": {"x": "1"}}
    report = evaluate(Guesser(0), [task], progress=False, about=about)
    path = report.save(tmp_path / "deep" / "report.json")
    assert Report.load(path).to_dict() == report.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert report.average("knowledge") == report.results[0].score
    assert report.average("alignment") is None
    assert len(report.table().rows) == 1 and report.notes() == ["base: b"]
    saved = json.loads(path.read_text())
    assert saved["about"]["versions"] == {"x": "1"} and saved["settings"]["answer"] == "letter"
    for failures in ([{"error": "e"}], [{"task": "t"}], [{"task": "t", "error": 1}]):
        path.write_text(json.dumps({**saved, "failures": failures}))
        with pytest.raises(UserError, match=r"report\.json: .*failures"):
            Report.load(path)
    (result,) = saved["results"]
    older = {"task": "t", "score": 0.5}
    for other, wanted in (
        (older, "results of 't': fields that lack: language, group, kind, metric, low, high, "),
        ({**result, "more": 1}, "fields that are not known: more; "),
    ):
        path.write_text(json.dumps({**saved, "results": [other]}))
        with pytest.raises(UserError, match=rf"report\.json: not a saved .*{wanted}"):
            Report.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"report\.json"):
        Report.load(path)


def test_an_evaluation_draws_no_bar_into_a_file(capsys):
    evaluate(Guesser(0), [exam(4)])
    assert capsys.readouterr().err == ""


def test_a_table_keeps_its_columns_at_eighty_characters():
    long = exam(12345 // 100, name="medqa_mainland_4:a_long_part")
    long = dataclasses.replace(long, split="test")
    report = evaluate(Oracle(long), [long], progress=False)
    also = {"letters_hamming": 0.5, "sections_rouge_l": 1.0}
    results = [dataclasses.replace(report.results[0], also=also, majority=1.0)]
    out = io.StringIO()
    Console(file=out, width=80).print(Report(results).table())
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for column in ("task", "metric", "score", "95% interval", "chance", "majority", "n"):
        assert column in text.splitlines()[1 if not text.splitlines()[0].strip() else 0]
    assert "97.0–100.0" in text and "sections_rouge_l" in text


def test_a_column_of_a_page_is_all_numbers_or_all_words():
    """Its heading too; an interval is a number, and so is nothing where there are numbers."""
    rows = [["seed", 1, "13.7–69.4", "", ""], ["stage", "align", "2.0 – 30.0", "7%", ""]]
    page = html.TableSection("", ["what", "is", "interval", "share", "none"], rows).body()
    assert re.findall(r'class="number">([^<]+)<', page) == [
        *("interval", "share", "13.7–69.4", "2.0 – 30.0", "7%")
    ]
    assert "<td>1</td>" in page and "<td>align</td>" in page


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
