"""The public Python API on the tiny recipe, against the commands and against what lies below."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import medmoe_jax
from medmoe_jax.api.tasks import stage_evaluator
from medmoe_jax.cli.main import main
from medmoe_jax.errors import ParameterError, UserError
from medmoe_jax.evaluation import records, ways
from medmoe_jax.training.config import source
from medmoe_jax.training.kept import keep, kept
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import several, tiny

ROOT = Path(__file__).parents[2]
PROMPTS = [row["prompt"] for row in tiny.alignment_rows()[:3]]


@pytest.fixture(scope="module")
def workdir():
    """In which the tiny recipe was trained."""
    return tiny.trained()[1]


@pytest.fixture(scope="module")
def model(workdir):
    """The last stage."""
    return medmoe_jax.load(workdir)


@pytest.fixture
def items(tmp_path):
    """A file of a task."""
    rows = tiny.alignment_rows()
    return str(
        tiny.write_rows(
            tmp_path / "formats.jsonl",
            [
                {"prompt": row["prompt"], "answer": row["response"], "choices": ["yes", "no"]}
                for row in rows
            ],
        )
    )


def test_the_package_alone_imports_no_jax():
    code = """
import sys, medmoe_jax
assert {"load", "train", "evaluate", "config", "__version__"} <= set(dir(medmoe_jax))
assert not {"jax", "numpy", "ml_collections"} & set(sys.modules)
try:
    medmoe_jax.lode
except AttributeError as error:
    assert str(error) == "module 'medmoe_jax' has no attribute 'lode'"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there():
    assert all(getattr(medmoe_jax, name).__doc__ for name in medmoe_jax.__all__)


def test_the_kept_configuration_is_the_one_it_was_trained_with(workdir):
    assert kept(workdir).to_dict() == tiny.medcare_config().to_dict()
    assert kept(workdir).is_locked


def test_a_kept_configuration_that_was_changed_is_refused(workdir, tmp_path):
    text = (workdir / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace('"global_batch": 8', '"global_batch": 9'))
    for use in (medmoe_jax.load, lambda folder: keep(tiny.medcare_config(), folder)):
        with pytest.raises(UserError, match=r"run\.json: was changed .*or remove the file"):
            use(tmp_path)


def test_commands_and_python_give_the_same(workdir, model, items, tmp_path, capsys):
    """Without a `--config`: the work directory says it."""
    there = f"--workdir={workdir}"
    asked = [{"prompt": prompt, "completion": "yes"} for prompt in PROMPTS]
    given = str(tiny.write_rows(tmp_path / "asked.jsonl", asked))
    out = tmp_path / "out.jsonl"
    files = [f"--input={given}", f"--output={out}"]

    def rows():
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert main(["score", there, *files]) == 0
    scores = model.score(PROMPTS, [["yes", "no"]] * 3)
    # The command scores one completion of each prompt, Python two: they are rounded differently.
    for one, row in zip(scores, rows(), strict=True):
        assert one[0].logprob == pytest.approx(row["logprob"], rel=1e-5)
        assert one[0].tokens == row["tokens"]
    assert model.score(PROMPTS[0], ["yes", "no"]) == scores[0]
    assert main(["generate", there, "--max-tokens=8", "--temperature=1", "--seed=3", *files]) == 0
    drawn = model.generate(PROMPTS, 8, temperature=1.0, seed=3)
    assert drawn == [row["response"] for row in rows()]
    assert main(["eval", there, f"--tasks={items}", f"--output={tmp_path}", "--limit=8"]) == 0
    told = medmoe_jax.evaluate(model, Path(items), limit=8)
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(json.dumps(told.report.to_dict())) == report
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(json.dumps(told.records)) == [json.loads(line) for line in lines]
    assert told["formats"].score == np.mean([record["right"] for record in told.records])
    assert "formats" in repr(told) and "95% interval" in told._repr_html_()
    with pytest.raises(KeyError):
        told["medqa"]
    capsys.readouterr()


def test_an_output_holds_files_of_one_evaluation_alone(model, items, tmp_path, monkeypatch):
    """Where one cannot ask any task, or ends early, nothing of the one before stays beside it."""
    out = tmp_path / "out"
    medmoe_jax.evaluate(model, items, limit=2, output=out)
    before = {path.name for path in out.iterdir()}
    assert before == {"report.json", "records.jsonl", "report.html"}
    (out / "notes.txt").write_text("mine")
    long = {"prompt": "Which drug?", "answer": "no", "choices": ["aspirin " * 2000, "no"]}
    file = str(tiny.write_rows(tmp_path / "long.jsonl", [long]))
    assert not medmoe_jax.evaluate(model, file, output=out).records
    report = json.loads((out / "report.json").read_text())
    assert not report["results"] and [one["task"] for one in report["failures"]] == ["long"]
    assert {path.name for path in out.iterdir()} == before - {"report.html"} | {"notes.txt"}
    with pytest.raises(UserError, match=r"records\.jsonl: there is no record in it"):
        records.read(out / "records.jsonl")
    medmoe_jax.evaluate(model, items, limit=2, output=out)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ways, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        medmoe_jax.evaluate(model, items, limit=2, output=out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_output_that_is_no_folder_is_told_before_anything_is_read(workdir, items, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="file: is not a folder"):
            medmoe_jax.evaluate(workdir, [items, "none.jsonl"], output=output)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_training_leaves_no_array_behind(tmp_path, monkeypatch):
    """Though what was raised is kept, as a notebook keeps it."""
    seen = []

    def interrupted(*_):
        seen.extend(jax.live_arrays())
        raise KeyboardInterrupt

    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    monkeypatch.setattr("medmoe_jax.training.train.compile_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        medmoe_jax.train(tiny.medcare_config(), tmp_path / "w")
    assert {id(array) for array in seen} - before
    seen.clear()
    gc.collect()
    assert kept.tb and not {id(array) for array in jax.live_arrays()} - before


def test_stages_banks_and_bases(workdir, model):
    """A bank left out at once or later; the base of a run and the same base by itself."""
    first = medmoe_jax.load(workdir, stage="aggregate")
    assert set(first.banks) == {"attention", "noise", "knowledge"} and first.stage == "aggregate"
    assert set(model.banks) == {"knowledge", "alignment"}
    without = first.without("noise")
    assert set(without.banks) == {"attention", "knowledge"} and "noise" in first.banks
    loaded = medmoe_jax.load(workdir, stage="aggregate", off=["noise"])
    expected = loaded.score(PROMPTS[0], ["yes", "no"])
    assert without.score(PROMPTS[0], ["yes", "no"]) == expected
    assert first.score(PROMPTS[0], ["yes", "no"]) != expected
    fields = {"base.tokenizer": str(tiny.tokenizer().path), "data.template": "user_assistant"}
    alone = medmoe_jax.load(tiny.base_path(), overrides=fields)
    assert alone.banks == () and alone.stage == ""
    bare = medmoe_jax.load(workdir, stage="base").score(PROMPTS, [["yes"]] * 3)
    assert np.allclose(
        [one.logprob for (one,) in alone.score(PROMPTS, [["yes"]] * 3)],
        [one.logprob for (one,) in bare], rtol=1e-5,
    )  # fmt: skip
    plain = medmoe_jax.load(
        tiny.base_path(), overrides={"base.tokenizer": str(tiny.tokenizer().path)}
    )
    assert plain.run.setup.config.data.template == "plain"


def test_a_chat_remembers(model):
    """Answers are those to the whole conversation as one prompt; streamed or not."""
    with model.chat("Be short.", max_tokens=8) as chat:
        turns = [{"role": "system", "content": "Be short."}]
        for question in PROMPTS[:2]:
            turns.append({"role": "user", "content": question})
            (answer,) = model.generate([turns], 8)
            said = "".join(chat.stream(question))
            assert said == answer
            turns.append({"role": "assistant", "content": answer})
        assert chat.turns == turns[1:]
        chat.forget()
        chat.tell("")
        assert chat.say(PROMPTS[0]) == model.generate(PROMPTS[0], 8)
    with pytest.raises(ParameterError, match="max_tokens: 128 leave no room"):
        model.chat(max_tokens=128)


def test_a_chat_that_is_not_closed_leaves_nothing_behind(model):
    def decoders():
        gc.collect()
        return [one for one in threading.enumerate() if one.name == "decoder"]

    assert not decoders()
    chat = model.chat(max_tokens=8)
    answer = chat.stream(PROMPTS[0])
    next(answer)  # one that is broken off
    chat.say(PROMPTS[0])
    (thread,) = decoders()
    del chat, answer
    gc.collect()
    thread.join(timeout=60)
    assert not decoders()


def test_train_resumes_and_tells_what_it_left(workdir, capsys):
    config = medmoe_jax.config(tiny.medcare_config(), {"run.log_every": 3})
    done = medmoe_jax.train(config, workdir)
    assert done.stages == ("aggregate", "align")
    assert "stage 'align' is finished: skipped" in capsys.readouterr().err
    assert [row["step"] for row in done.metrics["align"]] == list(range(1, tiny.STEPS + 1))
    assert done.manifests["align"].after == "aggregate"
    assert done.manifests["align"].metrics["train"]["loss"] == done.metrics["align"][-1]["loss"]
    assert done.scores == {"aggregate": {}, "align": {}}
    setup, _ = tiny.trained()
    trained = open_trained(Run(setup, workdir), "aggregate")
    loaded = done.load("aggregate").trained
    assert np.array_equal(loaded.banks["noise"]["mlp.up"]["lora_a"],
                          trained.banks["noise"]["mlp.up"]["lora_a"])  # fmt: skip
    with pytest.raises(UserError, match=r"data\.seed: 0 then, 4 now"):
        medmoe_jax.train(tiny.medcare_config(), workdir, {"data.seed": 4})


def test_fields_are_set_and_the_given_configuration_stays():
    given = tiny.medcare_config()
    changed = medmoe_jax.config(
        given,
        {
            "stages.align.learning_rate": 1,
            "run.mesh": {"data": 2},
            "data.sources": {"more": source("rows.jsonl")},
            "data.template_options.enable_thinking": False,
        },
    )
    assert changed.stages.align.learning_rate == 1.0 and changed.run.mesh.to_dict() == {"data": 2}
    assert changed.data.sources.more.path == "rows.jsonl" and changed.is_locked
    assert changed.data.template_options.to_dict() == {"enable_thinking": False}
    assert given.to_dict() == tiny.medcare_config().to_dict()
    by_name = medmoe_jax.config("medcare:qwen2-1.5b", {"run.tasks": ["cmedtc"]})
    assert by_name.run.tasks == ("cmedtc",) and by_name.base.path.endswith("Qwen2-1.5B")


def test_variants_are_stages_that_differ_in_what_was_said():
    given = tiny.medcare_config()
    found = {"weak": 0.1, "strong": 10.0}
    weights = {name: {"losses.orthogonality.weight": w} for name, w in found.items()}
    swept = medmoe_jax.variants(given, "align", weights)
    assert swept.stages.order == ("aggregate", "align", "weak", "strong")
    for name, weight in (("align", 1.0), *found.items()):
        fields = swept.stages[name].to_dict()
        assert fields["losses"]["orthogonality"].pop("weight") == weight
        expected = given.stages.align.to_dict()
        del expected["losses"]["orthogonality"]["weight"]
        assert fields == expected
    assert swept.is_locked and given.to_dict() == tiny.medcare_config().to_dict()
    for stage, changes, words in (
        ("algin", {}, "stage: 'algin' is none of aggregate, align"),
        ("order", {}, "stage: 'order' is none of aggregate, align"),
        ("align", {"aggregate": {}}, "changes: the recipe has a stage 'aggregate' already"),
        ("align", {"weight_0.1": {}}, "changes: 'weight_0.1' holds a dot"),
        ("align", {"a": {"lerning_rate": 1.0}}, "lerning_rate: .*did you mean 'learning_rate'"),
    ):
        with pytest.raises(UserError, match=words):
            medmoe_jax.variants(given, stage, changes)


def test_a_table_has_a_column_for_each_key():
    table = medmoe_jax.Table(
        [{"stage": "a", "loss": 0.123456}, {"stage": "x" * 90, "bank parameters": 1234567}]
    )
    lines = repr(table).splitlines()
    assert lines[0].split() == ["stage", "loss", "bank", "parameters"]
    assert lines[2].split() == ["a", "0.1235"] and lines[3].split() == ["x" * 90, "1234567"]
    page = table._repr_html_()
    assert page.count("<tr>") == 3 and '<td class="number">0.1235</td>' in page
    assert medmoe_jax.Table([]).columns == ()


def test_the_keys_of_a_table_may_be_anything():
    """Such as layers by their number."""
    table = medmoe_jax.Table([{0: 1.5, ("a", 1): "x", None: "y"}, {0: 2.0, True: 3}])
    assert table.columns == (0, ("a", 1), None, True)
    lines = repr(table).splitlines()
    assert lines[0].split() == ["('a',", "1)", "None", "0", "True"]
    assert lines[2].split() == ["x", "y", "1.5"] and lines[3].split() == ["2", "3"]
    headings = re.findall(r"<th\b[^>]*>([^<]*)</th>", table._repr_html_())
    assert headings == ["0", "(&#x27;a&#x27;, 1)", "None", "True"]


def test_the_tasks_of_a_run_are_those_of_its_start(workdir, items, tmp_path):
    """A file that changes or goes while a stage trains stops nothing and changes no score."""
    config = medmoe_jax.config(tiny.medcare_config(), {"run.tasks": (items,), "run.task_limit": 8})
    shutil.copytree(workdir, tmp_path / "w")
    run = Run(open_setup(config), tmp_path / "w")
    evaluate = stage_evaluator(run, lambda: False)
    expected = medmoe_jax.evaluate(workdir, items, guided=False, limit=8)["formats"]
    Path(items).unlink()
    found = evaluate(open_trained(run, "align"))
    assert found == {"formats": {k: getattr(expected, k) for k in ("score", "low", "high")}}


def test_a_finished_run_is_a_table_of_its_stages(workdir):
    done = medmoe_jax.train(tiny.medcare_config(), workdir)
    first, last = done.rows
    assert (first["stage"], last["stage"], last["steps"]) == ("aggregate", "align", tiny.STEPS)
    assert last["loss"] == done.metrics["align"][-1]["loss"]
    # Rank 2 on the three sites of two layers: A and B of (16 and 24) + (16 and 24) + (24 and 16).
    assert last["bank parameters"] == 2 * 2 * 3 * (16 + 24)
    assert f'<td>align</td><td class="number">{tiny.STEPS}</td>' in done._repr_html_()


@pytest.mark.slow
def test_routing_by_language(workdir, model, tmp_path):
    """As the command tells it."""
    rows = [{**row, "language": ("en", "de")[n % 2]} for n, row in enumerate(tiny.alignment_rows())]
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    routed = medmoe_jax.load(workdir, stage="aggregate").routing(file, limit=4)
    out = f"--out={tmp_path / 'out'}"
    command = ["analyze", "routing", f"--workdir={workdir}", "--stage=aggregate", "--limit=4"]
    assert main([*command, f"--data={file}", out]) == 0
    assert json.loads((tmp_path / "out" / "routing.json").read_text()) == routed.to_dict()
    assert repr(routed).startswith("Routing(de, en; noise/mlp.")
    assert len(routed.rows) == 2 * 3 and routed.rows[0]["language"] == "de"
    for row in routed.rows:
        share = routed.to_dict()["gates"][row["gate"]]["share"][row["language"]]
        assert [row[str(e)] for e in range(4)] == pytest.approx(np.mean(share, axis=0), abs=1e-6)
    assert set(routed.figures()) == set(routed.pictures) and "<iframe" in routed._repr_html_()
    with pytest.raises(UserError, match="no bank that takes part has a router"):
        model.routing(file)
    with pytest.raises(UserError, match="data: 'nowhere' is no file and no source of the config"):
        model.routing("nowhere")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run.log_evry": 3}, "run.log_evry: the configuration has no such field; did you mean"),
        ({"run.log_every": "often"}, "run.log_every: "),
        ({"data.length": 1.5}, "data.length: "),
        ({"base.path": "az://box/x"}, "base.path: 'az://box/x' is a place that cannot"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        medmoe_jax.config("medcare", fields)


def test_bad_sources(tmp_path):
    (tmp_path / "old" / "stages").mkdir(parents=True)
    for given, words in (
        ("org/none", "no work directory and no base is there; a model on the hub is 'hf://org/n"),
        (tmp_path / "none", "no work directory and no base is there"),
        (tmp_path, "base.path: "),
        (tmp_path / "old", "does not say what it was trained with (no run.json)"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            medmoe_jax.load(given)
    with pytest.raises(UserError, match="config: no file and no recipe is called 'medcara'"):
        medmoe_jax.train("medcara", tmp_path / "w")
    with pytest.raises(UserError, match="workdir: is empty"):
        medmoe_jax.train(tiny.medcare_config(), "")
    assert not (tmp_path / "w").exists()


ANSWERED = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def test_bad_questions(model, workdir, items):
    for ask, words in (
        (lambda: model.generate("x", 0), "max_tokens: 0 is below 1"),
        (lambda: model.generate("x", temperature=-1.0), "temperature: -1.0 is below 0"),
        (lambda: model.generate("x", temperature="1"), "temperature: '1' is not a number"),
        (lambda: model.generate("x", True), "max_tokens: True is not a number"),
        (lambda: model.generate("x", None), "max_tokens: None is not a number"),
        (lambda: model.generate("x", seed=float("inf")), "seed: inf is not a finite number"),
        (lambda: medmoe_jax.evaluate(model, items, limit="2"), "limit: '2' is not a number"),
        (lambda: model.generate(["x", 3]), "prompts: prompt 1 is neither a text nor a list"),
        (lambda: model.generate([{"role": "user", "content": "x"}]), "a list of turns is one"),
        (lambda: model.generate(["x", []]), "prompts: prompt 1: there is no turn"),
        (lambda: model.generate([ANSWERED]), "prompt 0: the last one is of the role 'assistant'"),
        (lambda: model.score([ANSWERED], [["y"]]), "the last one is of the role 'assistant'"),
        (lambda: model.generate(["x", "a\ud83d"]), "prompt 1: holds '\\ud83d', half of a"),
        (lambda: model.generate("x", stops="END"), "stops: needs a list of texts, found 'END'; wr"),
        (lambda: model.generate("x", stops=None), "stops: needs a list of texts, found None"),
        (lambda: model.generate("x", stops=["END", 5]), "stops: needs a list of texts, found 5 in"),
        (
            lambda: medmoe_jax.load(workdir, off="noise"),
            "off: needs a list of texts, found 'noise'",
        ),
        (lambda: medmoe_jax.evaluate(workdir, items, off="noise"), "off: needs a list of texts"),
        (lambda: model.score("x", []), "options: prompt 0: needs at least one text"),
        (lambda: model.score("x", [1]), "options: prompt 0: needs a list of texts, found 1 in it"),
        (
            lambda: model.score(["x"], ["yes"]),
            "options: prompt 0: needs a list of texts, found 'ye",
        ),
        (lambda: model.score(["x", "y"], [["yes"]]), "options: 1 lists for 2 prompts"),
        (lambda: model.without("ghost"), "there is no bank 'ghost'"),
        (lambda: medmoe_jax.load(workdir, stage="algin"), "stage: 'algin' is none of base, agg"),
        (lambda: medmoe_jax.evaluate(model, []), "tasks: none is named"),
        (lambda: medmoe_jax.evaluate(model, items, limit=0), "limit: 0 is below 1"),
        (lambda: medmoe_jax.evaluate(model, items, stage="align"), "model: a loaded one has"),
        (lambda: medmoe_jax.evaluate(model, "no_such"), "no_such"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            ask()


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_runs(workdir, items, tmp_path, monkeypatch, capsys):
    """Every block of docs/python.md, one after the other, in a folder that holds what it names."""
    (tmp_path / "mine.py").write_text(several.CONFIG)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(workdir)
    (tmp_path / "questions.jsonl").write_text(Path(items).read_text())
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = BLOCK.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(blocks) >= 6 and "questions" in printed and "noise" in printed
