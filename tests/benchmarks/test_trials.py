"""The trials: equal arms, rows that do not leak, losses and tables against independent figures."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import trial_rows, trial_tables, trials
from configs import trial_base, trial_families, trial_mixture, trial_skills
from medmoe_jax.adapters.bank import abstract, count
from medmoe_jax.api.opening import language_model
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.data.medical import Row
from medmoe_jax.data.rows import read_file
from medmoe_jax.routing.languages import read_languages
from medmoe_jax.training.recipe import parse
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import tiny

STORIES = DecoderConfig(
    vocab_size=512, d_model=64, n_layers=5, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=172,
    max_positions=512,
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        (trial_mixture, {"experts": 161_240, "lora": 161_840}),
        (
            trial_families,
            {"last": 114_304, "everywhere": 115_840, "dense": 115_600, "dense_last": 113_280},
        ),
    ],
    ids=["mixture", "families"],
)
def test_arms_train_as_many_parameters_as_the_config_says(module, counts):
    found = {
        stage.name: sum(count(abstract(spec, STORIES)) for spec in stage.added)
        for stage in parse(module.get_config(), STORIES)
    }
    assert found == counts
    assert max(counts.values()) < 1.03 * min(counts.values())
    assert all(f"{number:,}" in module.__doc__ for number in counts.values())


def test_skills_are_stacked_whole_and_routed_by_their_gate_alone():
    stages = {stage.name: stage for stage in parse(trial_skills.get_config(), STORIES)}
    names = list(trial_skills.SKILLS)
    assert len(names) == 12
    for before, name in zip(["", *names], names, strict=False):
        assert stages[name].after == before and set(stages[name].mixture) == {name}
        assert stages[name].states == ({before: "off"} if before else {})
    for task in trial_skills.TASKS:
        assert task not in trial_skills.SKILLS.values()
        for rows in trial_skills.ROWS:
            routed, plain = stages[f"route_{task}_{rows}"], stages[f"lora_{task}_{rows}"]
            assert routed.stack["skills"][0] == tuple(names) and not routed.added
            assert plain.after == "" and plain.mixture == routed.mixture


def test_the_table_of_families_has_every_language_of_the_trial():
    languages = read_languages(str(trial_families.TABLE))
    assert len(languages.experts) == trial_families.FAMILIES
    assert {*trial_families.TICO, "ja", "vi"} <= set(languages.ids)


@pytest.mark.data
def test_rows_of_the_families_and_of_the_base(data_dir, monkeypatch, tmp_path):
    """The held-out language is in no training row, no row stands on both sides, and all fit."""
    monkeypatch.setenv("MEDMOE_DATA", str(data_dir))
    for name in ("TRAIN", "TICO_TRAIN", "TICO_HELD", "OTHER_HELD"):
        monkeypatch.setattr(trial_rows, name, 4)
    trial_rows.write("families", tmp_path / "rows", 0)
    train, scored = (
        {file.stem: list(read_file(file)) for file in (tmp_path / "rows" / part).iterdir()}
        for part in ("train", "scored")
    )
    for module in (trial_families, trial_base):
        sources = module.get_config(str(tmp_path)).data.sources
        assert {name: source.path for name, source in sources.items()} == {
            name: str(tmp_path / "rows" / "train" / f"{name}.jsonl") for name in train
        }
    families = read_languages(str(trial_families.TABLE))
    # No training rows in Japanese: what the folder holds of it are test questions.
    assert set(scored) == {*families.experts, trial_families.HELD_OUT} - {"japonic"}
    for name, rows in scored.items():
        inside = {name} if name == trial_families.HELD_OUT else {
            code for code, expert in families.ids.items() if families.experts[expert] == name
        }  # fmt: skip
        assert {row["language"] for row in rows} <= inside
    rows = [row for some in train.values() for row in some]
    assert len({row["language"] for row in rows}) >= 12
    assert trial_families.HELD_OUT not in {row["language"] for row in rows}
    prompts = {row["conversations"][0]["content"] for row in rows}
    assert not prompts & {
        r["conversations"][0]["content"] for some in scored.values() for r in some
    }


def test_draws_are_seeded_and_without_repeats():
    rows = [Row(str(i), "", (), "en", "x", "generate", (0, 1)) for i in range(50)]
    one = trial_rows.draw(rows, 20, 3)
    assert one == trial_rows.draw(rows, 20, 3) != trial_rows.draw(rows, 20, 4)
    assert len(set(one)) == 20 and one[:5] == trial_rows.draw(rows, 20, 3)[:5]
    assert len(trial_rows.draw(rows, 99, 0)) == 50


def test_a_seed_reaches_every_stage_and_an_arm_brings_what_it_builds_on():
    config = trials.seeded(trial_skills.get_config(), 5, ["conversation", "lora_cmedic_16"])
    order = ("question_answering", "multiple_choice", "conversation", "lora_cmedic_16")
    assert config.stages.order == order and config.data.seed == 5
    assert {config.stages[name].seed for name in order} == {5}
    whole = trials.seeded(trial_skills.get_config(), 0, [])
    assert len(whole.stages.order) == 12 + 2 * 3 * len(trial_skills.TASKS)


def _run(folder):
    trials.main(["run", "tiny", "--seeds", "0", "--arms", "aggregate", "--workdir", str(folder)])
    return json.loads((folder / "results" / "trial_tiny.json").read_text())


@pytest.mark.slow
def test_a_run_trains_scores_and_is_not_repeated(tmp_path, monkeypatch):
    """Its losses are the cached scorer's: −Σ log p over Σ tokens, of each group of rows."""
    rows = {"knowledge": tiny.knowledge_rows()[:7], "alignment": tiny.alignment_rows()}
    module = SimpleNamespace(get_config=lambda folder="": tiny.medcare_config())
    monkeypatch.setitem(trial_rows.TRIALS, "tiny", trial_rows.Trial(module, lambda *_: ({}, {})))
    monkeypatch.setitem(trial_tables.TABLES, "tiny", lambda results: str(results["arms"]))
    monkeypatch.setattr(trials, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trials, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("before\n<!-- tiny -->\nold\n<!-- end of tiny -->\nafter\n")
    scored = tmp_path / "tiny" / "seed0" / "rows" / "scored"
    scored.mkdir(parents=True)
    for name, some in rows.items():
        tiny.write_rows(scored / f"{name}.jsonl", some)
    results = _run(tmp_path)
    assert _run(tmp_path) == results
    setup = trials.open_setup(trials.seeded(tiny.medcare_config(), 0, ["aggregate"]))
    for stage, found in (("", results["base"]), ("aggregate", results["arms"]["aggregate"])):
        trained = open_trained(Run(setup, tmp_path / "tiny" / "seed0"), stage)
        model = language_model(setup, trained)
        for name, some in rows.items():
            pairs = model.score([r["prompt"] for r in some], [r["response"] for r in some])
            want = -sum(total for total, _ in pairs) / sum(tokens for _, tokens in pairs)
            assert found["0"]["loss"][name] == pytest.approx(want, rel=1e-4)
    figures = results["arms"]["aggregate"]["0"]
    assert figures["parameters"] == sum(count(params) for params in trained.banks.values())
    assert figures["steps"] == tiny.STEPS
    assert figures["loss"]["knowledge"] < 0.9 * results["base"]["0"]["loss"]["knowledge"]
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page


def _arm(parameters, **by_seed):
    return {
        seed[1:]: {"loss": dict(zip("ab", losses, strict=True)), "parameters": parameters}
        for seed, losses in by_seed.items()
    }


def test_the_table_of_the_mixture():
    """Means, n − 1 deviations and differences seed by seed, worked by hand."""
    results = {
        "base": {s: {"loss": {"a": 5.0, "b": 7.0}} for s in "012"},
        "arms": {
            "experts": _arm(10, s0=(1.0, 3.0), s1=(2.0, 3.0), s2=(3.0, 3.0)),
            "lora": _arm(1100, s0=(1.5, 2.0), s1=(2.5, 2.0), s2=(3.5, 2.0)),
        },
    }
    assert trial_tables.mixture(results).split("\n") == [
        "| task | base | LoRA | MING-MOE | MING-MOE − LoRA |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a | 5.000 | 2.500 ± 1.000 | 2.000 ± 1.000 | -0.500 ± 0.000 |",
        "| b | 7.000 | 2.000 ± 0.000 | 3.000 ± 0.000 | +1.000 ± 0.000 |",
        "| **mean** | 6.000 | 2.250 ± 0.500 | 2.500 ± 0.500 | +0.250 ± 0.000 |",
        "| trainable parameters | 0 | 1,100 | 10 |  |",
        "| seeds |  | 3 | 3 |  |",
    ]


def test_the_table_of_families_sets_the_held_out_language_apart():
    def loss(x, y, apart):
        return {"loss": {"u": x, "v": y, trial_families.HELD_OUT: apart}, "parameters": 1}

    results = {
        "base": {"0": loss(4.0, 4.0, 9.0)},
        "arms": {"last": {"0": loss(1.0, 2.0, 8.0)}, "dense": {"0": loss(2.0, 2.0, 6.0)}},
    }
    lines = trial_tables.families(results).split("\n")
    assert lines[4].startswith("| **mean** | 4.000 | 2.000 | – | 1.500 | – | -0.500 | – | – |")
    assert lines[5].startswith(f"| {trial_families.HELD_OUT}, never trained on | 9.000 | 6.000 |")


def test_the_best_skill_is_picked_on_the_rows_that_the_router_sees():
    """Not on the held-out ones, where another skill is better."""
    task, few = "cmedic", "16"
    names = list(trial_skills.SKILLS)

    def loss(held, seen):
        picks = {f"pick_{t}_{n}": seen for t in trial_skills.TASKS for n in trial_skills.ROWS}
        return {"loss": {**dict.fromkeys(trial_skills.TASKS, held), **picks}, "parameters": 1}

    arms = {name: {"0": loss(2.0, 3.0)} for name in names}
    arms[names[4]] = {"0": loss(2.5, 1.0)}
    arms[names[7]] = {"0": loss(1.0, 2.0)}
    arms[f"route_{task}_{few}"] = {"0": loss(1.25, 0.0)}
    arms[f"lora_{task}_{few}"] = {"0": loss(1.5, 0.0)}
    arms[f"route_{task}_all"] = {"0": {**loss(1.0, 0.0), "mix": [0.5] * 11 + [-0.25]}}
    results = {"base": {"0": loss(6.0, 6.0)}, "arms": arms}
    assert trial_tables.best_skill(results, task, few) == {"0": names[4]}
    text = trial_tables.skills(results)
    assert f"| {task} | {few} | 6.000 | 2.500 | 1.250 | 1.500 | -1.250 | -0.250 | 1 |" in text
    assert f"| {names[11]} | 2.000 | – | 2.000 | -0.250 |" in text


def test_mixing_weights_stand_in_the_order_of_the_skills():
    """A file holds `mix/skills/10` before `mix/skills/2`."""
    by_text = dict(sorted((f"mix/skills/{n}", float(n)) for n in range(12)))
    assert trials.mixing_weights({"loss": 1.0, **by_text}) == list(range(12))
