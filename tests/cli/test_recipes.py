"""The published recipes at a tiny size: trained, stopped, resumed, evaluated, exported."""

import json
from pathlib import Path

import pytest

from configs import sa_mdkif
from medmoe_jax.cli.main import main
from tests import tiny
from tests.crash import Stop, crash_in_batch

CONFIG = """from configs import {file}
from tests.cli import test_recipes

def get_config():
    return test_recipes.at_tiny_size({file}.get_config({argument!r}))
"""
# Recipe: its argument, its stages, and the bank that depends on the token at the end, if any.
RECIPES = {
    "medcare": ("qwen1.5-1.8b", 2, None),
    "ming_moe": ("qwen1.5-1.8b", 1, "experts"),
    "apollo_moe": ("qwen2-0.5b", 1, "experts"),
    "sa_mdkif": ("qwen1.5-1.8b", 3, None),
}
STEPS = 4


def at_tiny_size(config):
    """The same stages on the tiny base and data, with small ranks and few steps."""
    config.base.path = str(tiny.base_path())
    config.base.tokenizer = str(tiny.tokenizer().path)
    config.base.dtype = "float32"
    config.data.template = "user_assistant"
    config.data.length, config.data.global_batch, config.data.shards = 48, 8, 4
    for i, source in enumerate(config.data.sources.values()):
        source.path = str(tiny.data(("knowledge", "alignment")[i % 2]))
        source.prompt = "{text}"  # the skills' own are longer than a tiny row
    for name in config.stages.order:
        stage = config.stages[name]
        stage.steps, stage.epochs = STEPS, 0.0
        stage.learning_rate = 1e-2 if stage.train_base else 0.2
        for one in stage.banks.values():
            one.rank, one.alpha = 2, 4.0
        for one in stage.allocators.values():
            one.target_rank, one.t_init, one.t_final, one.every = 1, 1, 1, 1
    config.run.accumulation, config.run.remat = 1, "none"
    config.run.save_every = 2
    config.run.mesh.update({"data": -1, "fsdp": 1})  # what compiles soonest
    return config


@pytest.fixture(params=list(RECIPES))
def recipe(request, tmp_path):
    """`(--config=, stages, bank that does not fold)`.

    Every stage is compiled: two skills stand for twelve.
    """
    argument, stages, routed = RECIPES[request.param]
    file = tmp_path / f"{request.param}.py"
    file.write_text(CONFIG.format(file=request.param, argument=argument))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sa_mdkif, "SKILLS", dict(list(sa_mdkif.SKILLS.items())[:2]))
        yield f"--config={file}", stages, routed


@pytest.mark.slow
def test_a_recipe_runs_from_end_to_end(recipe, tmp_path, capsys, monkeypatch):
    config, stages, routed = recipe
    here = [config, f"--workdir={tmp_path / 'w'}"]
    crash_in_batch(monkeypatch, STEPS * (stages - 1) + 4)
    with pytest.raises(Stop):
        main(["train", *here])
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["train", *here]) == 0
    notes = capsys.readouterr().err
    assert notes.count("is finished: skipped") == stages - 1
    assert f"continues after step 2 of {STEPS}" in notes

    tasks = tiny.write_rows(
        tmp_path / "tasks.jsonl",
        [
            {"prompt": row["prompt"], "answer": row["response"], "choices": ["yes", "no"]}
            for row in tiny.alignment_rows()[:8]
        ],
    )
    assert main(["eval", *here, f"--tasks={tasks}"]) == 0
    (result,) = json.loads((tmp_path / "w" / "report.json").read_text())["results"]
    assert result["n"] == 8 and 0.0 <= result["score"] <= 1.0

    export = ["export", *here, "--format=hf", f"--output={tmp_path / 'out'}"]
    capsys.readouterr()
    if routed:
        assert main(export) == 1
        error = capsys.readouterr().err
        assert f"bank '{routed}' has gate" in error and "depend on the token" in error
        assert f"--off={routed} leaves it out" in error
        return
    assert main(export) == 0
    rows = [{"prompt": "aspirin: yes or no, pain?", "completion": "yes"}]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    beside, folded, bare = (
        score(rows, tmp_path / "scored.jsonl", *model)
        for model in (
            here,
            [*here, "--stage=base", f"--config.base.path={tmp_path / 'out'}"],
            [*here, "--stage=base"],
        )
    )
    assert folded == pytest.approx(beside, rel=1e-4) and abs(bare - beside) > 1e-2


def score(rows: Path, out: Path, *arguments) -> float:
    """The log-probability of the one row's completion."""
    assert main(["score", *arguments, f"--input={rows}", f"--output={out}"]) == 0
    return json.loads(out.read_text())["logprob"]
