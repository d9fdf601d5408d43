"""Tasks: of known sets, of suites, of users; examples before items; prompts that fit."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from medmoe_jax.data import medical
from medmoe_jax.data.medical import registry
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import Fitter, Shots, evaluate, list_tasks, load_task, metrics
from medmoe_jax.evaluation.tasks import expand, load_items, suites
from tests.data import upstream
from tests.evaluation.models import Constant, Oracle, asked


def write(path, *records, bom=""):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_text(bom + text, encoding="utf-8")
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


def test_user_tasks_with_a_mark_turns_and_a_metric(tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    row = {"messages": turns, "answer": "疾病实体：感冒", "metric": "entity_f1", "language": "zh"}
    task = load_task(write(tmp_path / "mine.jsonl", row, bom="\ufeff"))
    assert (task.metric, task.language, task.also) == ("entity_f1", "zh", ())
    assert task.items[0].turns == turns
    assert evaluate(Oracle(task), [task], progress=False).results[0].score == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no items"),
        ('{"prompt": "q"}', r"jsonl:1: field 'answer'"),
        ("{", r"jsonl:1: not JSON"),
        ("[]", r"jsonl:1: write an object"),
        ('{"prompt": "q", "answer": "c", "choices": ["a"]}', r"jsonl:1: the answer 'c'"),
        ('{"prompt": "q", "answer": "a", "choices": "a"}', r"jsonl:1: field 'choices'"),
        ('{"prompt": "q", "answer": "a", "anser": "a"}', r"jsonl:1: field 'anser' is none of"),
        (
            '{"prompt": "q", "answer": "a"}\n{"prompt": "q", "answer": "a", "metric": "rogue"}',
            r"t\.jsonl:2: metric 'rogue' is not one of .*; did you mean 'rouge_l'\?",
        ),
        (
            '{"prompt": "q", "answer": "A", "choices": ["A", "B"]}\n'
            '{"prompt": "q", "answer": "A", "choices": ["A", "B", "A"]}',
            r"t\.jsonl:2: field 'choices' has 'A' more than once",
        ),
        (
            '{"prompt": "q", "answer": "a b", "choices": ["a b", " a  b"]}',
            r"t\.jsonl:1: field 'choices' has 'a b' more than once",
        ),
        ('{"prompt": "q", "answer": "a", "metric": "hit_at_3"}', "metric 'hit_at_3' needs choices"),
        (
            '{"prompt": "q", "answer": "a", "language": ["en"]}',
            "jsonl:1: field 'language' must be a text",
        ),
        (
            '{"prompt": "q", "answer": "a", "metric": "kappa_linear"}',
            "metric 'kappa_linear' needs choices",
        ),
        (
            '{"prompt": "q", "answer": "1", "choices": ["1", "2"], "metric": "kappa_linear"}\n'
            '{"prompt": "q", "answer": "1", "choices": ["2", "1"], "metric": "kappa_linear"}',
            "metric 'kappa_linear' needs the same choices in the same order",
        ),
        ('{"messages": [], "answer": "a"}', r"jsonl:1: write 'prompt' or a list of 'messages'"),
        (
            '{"messages": [{"role": "doctor", "content": "x"}], "answer": "a"}',
            "a message must have a text 'content' and a role of",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "a"}',
            "the last message must be the user's",
        ),
        (
            '{"prompt": "q", "answer": "a", "choices": ["a"]}\n{"prompt": "q", "answer": "a"}',
            "some items have choices",
        ),
        (
            '{"prompt": "q", "answer": "a", "metric": "chrf"}\n{"prompt": "q", "answer": "a"}',
            "its items name several metrics",
        ),
        (
            '{"prompt": "q", "answer": "x", "metric": "span_f1"}',
            r"jsonl:1: metric 'span_f1' needs places in a text",
        ),
        *(
            (
                f'{{"prompt": "q", "answer": "none", "metric": "{metric}"}}\n'
                + f'{{"prompt": "q", "answer": "aspirin and insulin", "metric": "{metric}"}}',
                rf"jsonl:2: metric '{metric}' cannot read the answer 'aspirin and insulin'",
            )
            for metric in ("entity_f1", "relation_f1", "event_f1", "labelled_f1")
        ),
        (
            '{"prompt": "q", "answer": "Plan: rest", "metric": "sections_rouge_l"}',
            r"jsonl:1: metric 'sections_rouge_l' cannot read the answer 'Plan: rest'",
        ),
        *(
            (
                f'{{"prompt": "q", "answer": "{answer}", "metric": "letters_exact"{choices}}}',
                f"jsonl:1: metric 'letters_exact' cannot read the answer '{answer}'",
            )
            for answer, choices in (
                ("A, K", ""),
                ("a,c", ""),
                ("1, 3", ""),
                ("A, D", ', "choices": ["A", "B", "C"]'),
            )
        ),
        *(
            (
                json.dumps({"prompt": "q", "answer": answer, "metric": metric}),
                f"jsonl:1: metric '{metric}' cannot read the answer '",
            )
            for metric, answer in (
                ("relation_f1", "aspirin -> bleeding\nheparin->bleeding"),
                ("labelled_f1", "fever: present\nno cough"),
                ("entity_f1", "Drug: aspirin\nand insulin"),
                ("term_f1", "aspirin\ninsulin"),
            )
        ),
        (
            '{"prompt": "q", "answer": "1", "metric": "letters_exact", "choices": ["1", "2"]}',
            "jsonl:1: the choices of metric 'letters_exact' are one capital letter each",
        ),
    ],
)
def test_bad_user_tasks(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_task(path)


def test_fields_that_are_null_are_not_there(tmp_path):
    path = tmp_path / "t.jsonl"
    row = {"prompt": "q", "answer": "a", "choices": None, "language": None, "metric": None}
    write(path, {**row, "part": None}, {**row, "language": "fr", "part": 2023})
    task = load_task(path)
    assert [(item.language, item.part) for item in task.items] == [("und", ""), ("fr", "2023")]
    assert (task.kind, task.metric) == ("generate", "exact_match")


def test_a_user_s_list_may_have_types_of_nothing(tmp_path):
    path = tmp_path / "t.jsonl"
    answer = "Drug: aspirin\n\nDisease:\n"
    write(path, {"prompt": "q", "answer": answer, "metric": "entity_f1"})
    assert load_task(path).items[0].answer == answer


def test_a_user_s_task_with_several_right_letters(tmp_path):
    path = tmp_path / "t.jsonl"
    row = {"prompt": "q", "metric": "letters_exact", "choices": list("ABCDEFGHIJKL")}
    write(path, *({**row, "answer": answer} for answer in ("A, K", "LA", "Ａ、Ｋ")))
    task = load_task(path)
    assert (task.kind, task.metric) == ("generate", "letters_exact")
    assert metrics.compute(task.metric, ["K, A", "A, L", "A, L"], task.items) == pytest.approx(
        2 / 3
    )


def test_missing_and_unknown_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="'medqb' is not a medical set; did you mean medqa"):
        load_task("medqb")
    write(tmp_path / "t.jsonl", {"prompt": "q", "answer": "a"})
    with pytest.raises(UserError, match="limit is 0"):
        load_task(tmp_path / "t.jsonl", limit=0)
    (tmp_path / "t.csv").write_text("prompt,answer\n")
    with pytest.raises(UserError, match=r"t\.csv: a file with a task ends in \.jsonl, "):
        expand([str(tmp_path / "t.csv")])


def test_names_are_checked_with_suites_in_their_places():
    assert expand(["suite:cblue", "demo_knowledge"])[-1] == "demo_knowledge"
    assert len(expand(["suite:cblue"])) == 16 and len(expand(["suite:apollo12"])) == 12
    both = expand(["suite:medcare-exams", "suite:multimedqa", "medqa@test"])
    assert both.count("medqa@test") == 1 and both.count("medmcqa@dev") == 1
    assert expand(["demo_knowledge@dev"]) == ["demo_knowledge@dev"]
    assert load_task("demo_knowledge@dev", 3) == load_task("demo_knowledge", 3)
    with pytest.raises(UserError, match="demo_knowledge has no split 'test'"):
        load_task("demo_knowledge@test")
    with pytest.raises(UserError, match="no suite 'cblu'; did you mean 'cblue'"):
        expand(["suite:cblu"])
    with pytest.raises(UserError, match="'cmedtx' is not a medical set; did you mean cmedtc"):
        expand(["medqa", "cmedtx"])
    with pytest.raises(UserError, match=r"there is no file or folder 'my/qa\.json', nor a medical"):
        expand(["my/qa.json"])
    with pytest.raises(UserError, match=r"absent\.toml: no such file"):
        expand(["absent.toml"])
    with pytest.raises(UserError, match="medqa has no split 'tset'; it has train, dev, test"):
        expand(["medqa@tset"])


def test_tasks_of_one_title_are_refused(tmp_path):
    """Files of one name in two folders, and a set with its split named and not."""
    one, other = tmp_path / "one" / "mine.jsonl", tmp_path / "other" / "mine.jsonl"
    for path, prompt in ((one, "q"), (other, "p")):
        path.parent.mkdir()
        write(path, {"prompt": prompt, "answer": "a"})
    renamed = write(tmp_path / "yours.jsonl", {"prompt": "p", "answer": "a"})
    found = load_items([str(one), str(renamed), "demo_knowledge:en", "demo_knowledge:zh@dev"])
    languages = ["demo_knowledge:en@dev", "demo_knowledge:zh@dev"]
    assert list(found) == ["mine", "yours", *languages]
    for names, title in (
        ((str(one), str(other)), "mine"),
        (("demo_knowledge", "demo_knowledge@dev"), "demo_knowledge@dev"),
    ):
        words = "'{}' and '{}' would both be called '{}'; rename a".format(*names, title)
        with pytest.raises(UserError, match=re.escape(words)):
            load_items(names)


@pytest.mark.parametrize("name", suites())
def test_every_task_of_a_suite_is_there_with_its_split(name, tmp_path):
    """With files in upstream's layout it loads, and its own answers solve it."""
    names = expand([f"suite:{name}"])
    for entry in {medical.find(task.partition("@")[0])[0].name for task in names}:
        upstream.write(entry, tmp_path)
    for task in names:
        if task.startswith("xmedbench") and task[10:12] not in ("en", "ko"):
            continue  # the fixture has these two
        loaded = load_task(task, root=tmp_path)
        distinct = {asked(i.turns): i for i in loaded.items}
        loaded = dataclasses.replace(loaded, items=tuple(distinct.values()))
        result = evaluate(Oracle(loaded), [loaded], progress=False, resamples=10).results[0]
        assert result.score == pytest.approx(1.0) and result.split == task.partition("@")[2]
        assert result.unparsed == 0


@pytest.mark.data
@pytest.mark.parametrize("name", [info.name for info in list_tasks()])
def test_every_task_is_solved_by_its_own_answers(name, data_dir):
    try:
        task = load_task(name, limit=12, root=data_dir)
    except FileNotFoundError:
        assert not any((data_dir / f).is_dir() for f in medical.SETS[name].folder) or name in (
            *("medqa_5", "jmed_rrtnm", "jmed_mrner_disease", "jmed_mrner_medicine"),
        )
        return
    kept = {asked(i.turns): i for i in task.items}  # pairs asked twice
    task = dataclasses.replace(task, items=tuple(kept.values()))
    result = evaluate(Oracle(task), [task], progress=False, resamples=20).results[0]
    assert result.score == pytest.approx(1.0) and 0 < result.n <= 12
    spans = {"span_f1": 0.5}  # a mention may stand in the text where it is no entity
    assert all(v >= spans.get(k, 0.999) for k, v in result.also.items())
    guessed = task.metric in ("accuracy", "letters_exact", "weighted_f1", "macro_f1")
    assert (task.majority is not None) == guessed
    assert (task.chance is not None) == (task.kind == "choice" and task.metric == "accuracy")


@pytest.mark.data
def test_majority_comes_from_training_answers(data_dir):
    task = load_task("cmedtc", root=data_dir)
    assert task.majority == pytest.approx(357 / 1550) and task.duplicates == 11
    result = evaluate(Constant("Disease"), [task], progress=False).results[0]
    assert result.score == task.majority and result.chance == pytest.approx(1 / 44)
    assert result.also["macro_f1"] < 0.02


def test_a_guide_tells_labels_and_form_to_a_model_that_was_not_trained_on_them(tmp_path):
    upstream.write("cmedic", tmp_path)
    bare, guided = (load_task("cmedic", root=tmp_path, guided=g) for g in (False, True))
    for one, other in zip(bare.items, guided.items, strict=True):
        assert other.prompt.endswith(one.prompt) and "无、弱、强" in other.prompt
    for name in ("cmedqaner", "ncbi_disease", "frenchmedmcqa", "bc5cdr_relations", "medcalc"):
        assert medical.SETS[name].guide


# Examples.


def test_shots_come_from_training_rows(tmp_path):
    upstream.write("medqa", tmp_path)
    plain, shot, turns = (
        load_task("medqa@test", root=tmp_path, few=few)
        for few in (Shots(), Shots(2), Shots(2, "turns"))
    )
    assert shot.shots == 2 and shot.until == ("\n\n",) and turns.until == ()
    for a, b, c in zip(plain.items, shot.items, turns.items, strict=True):
        first, second, last = b.prompt.split("\n\n")
        assert last == a.prompt and first.startswith("Which drug, train ")
        assert first.endswith(("(A/B/C/D): B", "(A/B/C/D): C")) and first != second
        assert [t["role"] for t in c.turns] == ["user", "assistant"] * 2 + ["user"]
        assert c.turns[-1]["content"] == a.prompt and c.turns[1]["content"] in "BC"
    with pytest.raises(UserError, match="3 shots asked for, 2 rows"):
        load_task("medqa@test", root=tmp_path, few=Shots(3))


def test_shots_of_a_set_without_training_rows_are_not_asked(tmp_path):
    upstream.write("jmmlu", tmp_path)
    plain = load_task("jmmlu", root=tmp_path)
    shot = load_task("jmmlu", root=tmp_path, few=Shots(1), seed=3)
    (example,) = {i.prompt.split("\n\n")[0].rpartition(" ")[0] for i in shot.items}
    asked_ = {i.prompt.split("\n\n")[1] for i in shot.items}
    assert example in {i.prompt for i in plain.items} and example not in asked_
    assert shot.items == load_task("jmmlu", root=tmp_path, few=Shots(1), seed=3).items
    assert shot.items != load_task("jmmlu", root=tmp_path, few=Shots(1), seed=4).items


def test_shots_from_the_rows_to_be_asked_are_told(tmp_path, caplog):
    """The set has training rows, but not in this folder."""
    upstream.write("medqa", tmp_path)
    plain = load_task("medqa@test", root=tmp_path)
    for path in tmp_path.rglob("*train*"):
        path.unlink()
    shot = load_task("medqa@test", root=tmp_path, few=Shots(1))
    assert len(shot.items) == len(plain.items) - 1
    assert "its 1 examples are rows of test, and those are not asked" in caplog.text


def test_shots_of_a_user_task_are_not_asked(tmp_path):
    rows = [{"prompt": f"q{i}:", "answer": str(i)} for i in range(5)]
    path = write(tmp_path / "t.jsonl", *rows)
    task = load_task(path, few=Shots(2))
    assert len(task.items) == 3
    for item in task.items:
        *examples, last = item.prompt.split("\n\n")
        assert all(e.partition(": ")[2] == e[1] for e in examples) and last[:2] not in str(examples)
    turns = load_task(path, few=Shots(2, "turns"))
    assert all(len(item.turns) == 5 for item in turns.items)
    for count, told in ((5, "its 5 rows are all taken by 5 shots"), (6, "6 shots asked for, 5")):
        with pytest.raises(UserError, match=f"^t: {told}"):
            load_task(path, few=Shots(count))


@pytest.mark.parametrize("texts", [("be brief",), ("", "be brief"), ("be brief", "be kind")])
def test_a_system_turn_stands_once_before_examples(tmp_path, texts):
    """One of an example that is not the item's own stays with it."""
    rows = []
    for n in range(6):
        text = texts[n % len(texts)]
        system = [{"role": "system", "content": text}] if text else []
        rows.append(
            {"messages": [*system, {"role": "user", "content": f"q{n}"}], "answer": f"a{n}"}
        )
    path = write(tmp_path / "t.jsonl", *rows)
    alone = {item.prompt[-1][1]: item.prompt for item in load_task(path).items}
    for item in load_task(path, few=Shots(2)).items:
        own = alone[item.prompt[-1][1]]
        lead = own[:-1]
        (_, one), (_, two) = [turn for turn in item.prompt[:-1] if turn[0] == "user"]
        want = [*lead]
        for name in (one, two):
            kept = alone[name] if alone[name][:-1] != lead else alone[name][-1:]
            want += [*kept, ("assistant", name.replace("q", "a"))]
        assert list(item.prompt) == [*want, own[-1]] and item.own == own


def test_answers_with_empty_lines_are_not_cut_where_an_example_would_follow(tmp_path):
    rows = [{"prompt": f"q{i}", "answer": f"first {i}\n\nsecond"} for i in range(4)]
    path = write(tmp_path / "t.jsonl", *rows)
    with pytest.raises(UserError, match=r"^t: some of its answers hold an empty line.*as=turns"):
        load_task(path, few=Shots(1))
    task = load_task(path, few=Shots(1, "turns"))
    report = evaluate(Oracle(task), [task], progress=False)
    assert report.results[0].score == 1.0 and report.results[0].cut == 0


def test_shots_of_the_demonstration_are_not_asked():
    plain, shot = (load_task("demo_knowledge", few=Shots(n)) for n in (0, 2))
    assert len(shot.items) == len(plain.items) - 2 and shot.shots == 2 and shot.split == "dev"
    assert all(len(item.prompt.split("\n\n")) >= 3 for item in shot.items)


def test_a_split_of_what_has_none():
    with pytest.raises(UserError, match="has no splits, of which 'test' was asked for"):
        load_task("mine.jsonl", split="test")
    with pytest.raises(UserError, match="demo_alignment has no split 'test'; it has dev"):
        load_task("demo_alignment", split="test")


@pytest.mark.parametrize("wrong", [{"count": -1}, {"form": "poem"}])
def test_shots_that_there_are_not(wrong):
    with pytest.raises(UserError, match="shots: "):
        Shots(**wrong)


# Prompts that fit.


class Characters:
    """A token a character, and two around each turn."""

    def prompt(self, turns):
        return list("".join(f"<{t['content']}>" for t in turns))


def test_prompts_are_cut_in_their_text_alone(tmp_path):
    upstream.write("pubmedqa", tmp_path)
    whole = load_task("pubmedqa@test", root=tmp_path)
    longest = max(len(i.prompt) for i in whole.items)
    fit = Fitter(Characters(), longest)
    task = load_task("pubmedqa@test", root=tmp_path, fit=fit)
    for item in task.items:  # five letters of "maybe", a space and an end
        assert len(item.prompt) + 2 + 5 + 2 <= longest and item.prompt.endswith("(yes/no/maybe):")
    assert task.shortened == fit.shortened == len(task.items)
    same = load_task("pubmedqa@test", root=tmp_path, fit=Fitter(Characters(), longest + 9))
    assert same.items == whole.items and same.shortened == 0


def test_what_cannot_be_cut_is_refused(tmp_path):
    upstream.write("medqa", tmp_path)
    with pytest.raises(UserError, match=r"medqa: a prompt of \d+ tokens cannot be cut below"):
        load_task("medqa@test", root=tmp_path, fit=Fitter(Characters(), 60))
    fits = load_task("medqa@test", root=tmp_path, fit=Fitter(Characters(), 150))
    assert fits.shortened == 0
    few = Shots(2)
    with pytest.raises(UserError, match="does not fit a context of 150"):
        load_task("medqa@test", root=tmp_path, few=few, fit=Fitter(Characters(), 150))
    written = Fitter(Characters(), 400, written_choices=512)
    with pytest.raises(UserError, match="with 512 for the answer"):
        load_task("medqa@test", root=tmp_path, fit=written)


def test_written_answers_leave_their_room(tmp_path):
    upstream.write("meqsum", tmp_path)
    task = load_task("meqsum", root=tmp_path, fit=Fitter(Characters(), 64 + 30))
    assert all(len(item.prompt) + 2 <= 30 for item in task.items) and task.shortened


def test_a_metric_of_a_user_s_card_is_known_before_its_rows_are_read(monkeypatch):
    cards = {"mine": dataclasses.replace(medical.SETS["medqa"], name="mine", also=("acuracy",))}
    monkeypatch.setattr(registry, "SETS", cards)
    with pytest.raises(UserError, match="metric 'acuracy' is not one of accuracy"):
        load_task("mine@test")


def test_metrics_of_all_cards_are_known():
    for entry in medical.SETS.values():
        for name in (entry.metric, *entry.also):
            assert not metrics.find(name).ranked or entry.kind == "choice"


def test_the_page_on_tasks_names_every_set_and_suite():
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, entry in medical.SETS.items():
        assert f"| `{name}` | {entry.title} |" in text
        assert f"| {', '.join(entry.splits)} | {entry.licence} | {entry.checked} |" in text
    for name, entry in suites().items():
        assert f"| `suite:{name}` | {len(entry['tasks'])} | {entry['about']} |" in text


def test_entities_without_places_refuse_a_metric_of_places(tmp_path, monkeypatch):
    mine = dataclasses.replace(
        medical.SETS["medqa"],
        name="mine",
        folder=("mine",),
        files={"test": ("ner.jsonl",)},
        form="entities",
        read={"text": "q", "mentions": "m", "types": ["Sign"]},
        metric="entity_f1",
    )
    monkeypatch.setattr(registry, "SETS", {"mine": mine})
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "ner.jsonl"
    write(path, {"q": "no finding", "m": []}, {"q": "fever and cough", "m": ["fever", "cough"]})
    task = load_task("mine", root=tmp_path)
    assert [item.answer for item in task.items] == ["none", "Sign: fever; cough"]
    for change in ({"metric": "span_f1"}, {"also": ("span_f1",)}):
        monkeypatch.setitem(registry.SETS, "mine", dataclasses.replace(mine, **change))
        with pytest.raises(UserError, match="'span_f1' needs places in a text"):
            load_task("mine", root=tmp_path)
    monkeypatch.setitem(registry.SETS, "mine", dataclasses.replace(mine, also=("kappa_linear",)))
    with pytest.raises(
        UserError, match="mine: metric 'kappa_linear' needs choices, which its rows"
    ):
        load_task("mine", root=tmp_path)
