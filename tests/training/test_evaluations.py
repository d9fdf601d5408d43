"""A stage that is scored while it trains: what it ends with, and that it ends so after a crash."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from medmoe_jax.api import opening
from medmoe_jax.checkpoints.files import read_json, read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.cli.main import main
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import evaluation, source
from medmoe_jax.training.hooks.protocol import Hook
from medmoe_jax.training.run import Run, open_data
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import open_trained
from tests import tiny
from tests.crash import Stop, crash_in_batch
from tests.several import Several

pytestmark = pytest.mark.slow

EVERY = 3
# Scores of the second stage: the best is that of step 6, and the next is no better.
ALIGN = {3: 0.25, 6: 0.75, 9: 0.75}
HELD_OUT = [
    {"prompt": "aspirin: yes or no, clots?", "response": "no"},
    {"prompt": "What is heparin for? In one word.", "response": "clots"},
    {"prompt": "lithium: yes or no, mania?", "response": "yes, it is"},
]


def scored_config(folder):
    """Both stages are scored, each in its way; the first by the loss on held-out rows."""
    config = tiny.medcare_config()
    rows = tiny.write_rows(folder / "held_out.jsonl", HELD_OUT)
    config.data.sources.unseen = source(str(rows))
    config.stages.aggregate.evaluation = evaluation(
        every=EVERY, sources=("unseen",), best="loss", final="best"
    )
    config.stages.align.evaluation = evaluation(
        every=EVERY, tasks=("t",), best="t", patience=1, final="best"
    )
    config.stages.aggregate.learning_rate = 2.0  # so that the loss goes up again
    return config


class Kept(Hook):
    """Copies of what each scored step has left."""

    def __init__(self, prepared, kept):
        self.prepared, self.kept = prepared, kept

    def on_step(self, progress):
        if progress.step % EVERY == 0:
            banks = self.prepared.banks(progress.state)
            self.kept[progress.stage, progress.step] = jax.device_get(banks)
        return {}


def scorer(prepared):
    return lambda step, state: {"t": ALIGN[step], "mean": ALIGN[step]}


def run_all(workdir, folder, kept):
    run = Run(open_setup(scored_config(folder)), workdir)
    train(run, more_hooks=lambda p: [Kept(p, kept)], score_tasks=scorer)
    return run


def evaluated(workdir, name):
    rows = read_metrics(StageFolder.of(workdir, name).metrics)
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("eval/")} for r in rows}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(run, banks after every scored step, folder)."""
    folder, kept = tmp_path_factory.mktemp("scored"), {}
    return run_all(folder / "w", folder, kept), kept, folder


def test_a_stage_ends_with_its_best_step(undisturbed):
    run, kept, _ = undisturbed
    losses = {s: m["eval/loss"] for s, m in evaluated(run.workdir, "aggregate").items() if m}
    assert list(losses) == [3, 6, 9, 12]
    best = min(losses, key=losses.get)
    # On some processors the last loss is the best; the scores of the second stage are given.
    for name, step in (("aggregate", best), ("align", 6)):
        trained = open_trained(run, name)
        jax.tree.map(np.testing.assert_array_equal, dict(trained.banks), kept[name, step])
        manifest = read_json(run.stage(name).folder.manifest)
        assert manifest["steps"] == step == manifest["metrics"]["best"]["step"]
        assert manifest["metrics"]["train"]["step"] == step
    # A second score of 0.75 is no better than the first, and ends the stage.
    assert [s for s, m in evaluated(run.workdir, "align").items() if m] == [3, 6, 9]


def test_the_loss_is_that_of_the_rows_alone(undisturbed):
    """Against the engine, which scores completions with a cache."""
    run, _, _ = undisturbed
    model = opening.language_model(run.setup, open_trained(run, "aggregate"))
    pairs = model.score(*zip(*((r["prompt"], r["response"]) for r in HELD_OUT), strict=True))
    total, tokens = (sum(part) for part in zip(*pairs, strict=True))
    step = read_json(run.stage("aggregate").folder.manifest)["steps"]
    found = evaluated(run.workdir, "aggregate")[step]["eval/loss"]
    np.testing.assert_allclose(found, -total / tokens, rtol=1e-5)


def test_crashes_between_evaluations_change_nothing(undisturbed, tmp_path, monkeypatch):
    run, _, folder = undisturbed
    for batch in (8, 6 + 8):  # of the first stage; of the second, as six of the first are left
        with monkeypatch.context() as patch, pytest.raises(Stop):
            crash_in_batch(patch, batch)
            run_all(tmp_path, folder, {})
    again = run_all(tmp_path, folder, {})
    for name in ("aggregate", "align"):
        assert evaluated(tmp_path, name) == evaluated(run.workdir, name)
        ends = [read_json(one.stage(name).folder.manifest)["metrics"] for one in (run, again)]
        assert ends[0]["best"] == ends[1]["best"] and ends[0]["rows"] == ends[1]["rows"]
        banks = [open_trained(one, name).banks for one in (run, again)]
        jax.tree.map(np.testing.assert_array_equal, *map(dict, banks))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"tasks": ("t",)}, "every is 0"),
        ({"every": 2}, "nothing to score"),
        ({"every": 2, "sources": ("unsen",)}, "no source 'unsen'; did you mean 'unseen'"),
        ({"every": 2, "sources": ("alignment",)}, "'alignment' is trained on"),
        ({"every": 2, "sources": ("unseen",), "best": "mean"}, "'mean' is none of loss"),
        ({"every": 2, "sources": ("unseen",), "patience": 1}, "patience needs evaluation.best"),
        ({"every": 2, "sources": ("unseen",), "final": "first"}, "final: 'first' is none of"),
        ({"every": -2}, ".every: -2 is below 0"),
    ],
)
def test_fields_that_do_not_fit(tmp_path, fields, said):
    config = scored_config(tmp_path)
    config.stages.align.evaluation = evaluation(**fields)
    with pytest.raises(UserError, match=rf"stages\.align\.evaluation.*{re.escape(said)}"):
        open_setup(config)


def claim(config, workdir):
    stage = Run(open_setup(config), workdir).stage("aggregate")
    data = open_data(stage.setup, stage.recipe)
    stage.claim(data.digests)
    data.stream.close()


def test_what_only_tells_may_change_and_what_decides_may_not(undisturbed):
    run, _, folder = undisturbed
    config = scored_config(folder)
    config.stages.aggregate.evaluation.final = "last"
    with pytest.raises(UserError, match=r"stage.evaluation.final: 'best' then, 'last' now"):
        claim(config, run.workdir)
    _, workdir = tiny.trained()  # by a recipe without evaluations
    config = tiny.medcare_config()
    config.data.sources.unseen = source(str(folder / "held_out.jsonl"))
    config.stages.aggregate.evaluation = evaluation(every=5, sources=("unseen",))
    claim(config, workdir)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`medmoe train` of four steps, scored on a file of tasks and on rows, but for its place."""
    folder = tmp_path_factory.mktemp("command")
    rows = tiny.write_rows(folder / "held_out.jsonl", HELD_OUT)
    items = [
        {"prompt": f"{drug}: yes or no, fever?", "answer": "no", "choices": ["yes", "no"]}
        for drug in tiny.DRUGS
    ]
    tiny.write_rows(folder / "items.jsonl", items)
    fields = f'every=2, tasks=("{folder}/items.jsonl",), sources=("unseen",), best="items"'
    (folder / "recipe.py").write_text(f"""
from medmoe_jax.training.config import evaluation, source
from tests import tiny

def get_config():
    config = tiny.medcare_config()
    config.stages.order = ("aggregate",)
    config.stages.aggregate.steps = 4
    config.data.sources.unseen = source("{rows}")
    config.stages.aggregate.evaluation = evaluation({fields})
    return config
""")
    return ["train", f"--config={folder / 'recipe.py'}"]


@pytest.fixture(scope="module")
def told(command, tmp_path_factory):
    """A work directory in which the command has run."""
    workdir = tmp_path_factory.mktemp("told") / "w"
    assert main([*command, f"--workdir={workdir}"]) == 0
    return workdir


def reports_of(workdir):
    folder = StageFolder.of(workdir, "aggregate")
    return [read_json(folder.evaluation(step) / "report.json")["results"] for step in (2, 4)]


def test_the_command_scores_tasks_as_eval_does(command, told, tmp_path, capsys):
    found = evaluated(told, "aggregate")
    for step, (result,) in zip((2, 4), reports_of(told), strict=True):
        score = found[step]["eval/items"]
        assert score == found[step]["eval/mean"] == result["score"] and result["n"] == 8
    (items,) = (Path(command[1].removeprefix("--config=")).parent).glob("items.jsonl")
    asked = ["eval", command[1], f"--workdir={told}", f"--tasks={items}", "--bare"]
    assert main([*asked, f"--output={tmp_path}"]) == 0
    assert read_json(tmp_path / "report.json")["results"] == reports_of(told)[1]
    capsys.readouterr()
    field = "--config.stages.aggregate.evaluation"
    for more, said in (
        ([f"{field}.tasks=('cmedtk',)"], "did you mean cmedtc"),
        ([f"{field}.best=itens"], "'itens' is no score; did you mean 'items'"),
    ):
        assert main([*command, f"--workdir={tmp_path / 'new'}", *more]) == 1
        line = capsys.readouterr().err
        assert "error: stages.aggregate.evaluation." in line and said in line
    assert not (tmp_path / "new" / "stages").exists()


def test_a_task_that_cannot_be_asked_ends_no_training(command, told, tmp_path, capsys):
    """An answer longer than the context; alone, or deciding which step is best, it is an error."""
    long = [{"prompt": "Which drug?", "answer": "no", "choices": ["aspirin " * 2000, "no"]}]
    long = tiny.write_rows(tmp_path / "long.jsonl", long)
    (items,) = (Path(command[1].removeprefix("--config=")).parent).glob("items.jsonl")
    field = "--config.stages.aggregate.evaluation"
    asked = [*command, f"--workdir={tmp_path / 'w'}", f"{field}.tasks=('{long}','{items}')"]
    assert main(asked) == 0
    assert "task 'long' cannot be scored: " in " ".join(capsys.readouterr().err.split())
    assert reports_of(tmp_path / "w") == reports_of(told)
    assert evaluated(tmp_path / "w", "aggregate") == evaluated(told, "aggregate")
    for more, said in (
        ([f"{field}.best=long"], "evaluation.best: 'long' is none of loss, items, mean"),
        (
            [f"{field}.tasks=('{long}',)", f"{field}.best=loss"],
            "stages.aggregate.evaluation: none of its tasks can be scored",
        ),
    ):
        assert main([*asked, f"--workdir={tmp_path / said[-4:]}", *more]) == 1
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.processes
def test_two_processes_score_alike(command, told, tmp_path):
    """All take part, the first one writes."""
    with Several(tmp_path, [[*command, f"--workdir={tmp_path / 'w'}"]] * 2) as both:
        assert both.statuses() == [0, 0], both.printed(0) + both.printed(1)
    assert reports_of(tmp_path / "w") == reports_of(told)
    two, one = (evaluated(workdir, "aggregate") for workdir in (tmp_path / "w", told))
    for step in (2, 4):
        assert two[step].keys() == one[step].keys() == {"eval/items", "eval/mean", "eval/loss"}
        np.testing.assert_allclose([*two[step].values()], [*one[step].values()], rtol=1e-5)
