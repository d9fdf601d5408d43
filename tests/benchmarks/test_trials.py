"""The trials: equal arms, rows that do not leak, losses and tables against independent figures."""

import functools
from types import SimpleNamespace

import pytest

from benchmarks import trial_figures, trial_rows, trial_settings, trial_tables, trials
from benchmarks.trials import Job
from configs import trial_families, trial_medcare, trial_mixture, trial_skills
from medmoe_jax.adapters.bank import abstract, count
from medmoe_jax.api.opening import language_model
from medmoe_jax.base.presets import PRESETS
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.medical import Row
from medmoe_jax.data.sources import RowFitter
from medmoe_jax.data.templates import load_template
from medmoe_jax.data.tokenizers import load
from medmoe_jax.routing.languages import read_languages
from medmoe_jax.training.recipe import parse
from medmoe_jax.training.run import Run
from medmoe_jax.training.trained import open_trained
from tests import tiny

SMOL, GEMMA = PRESETS["smollm2-135m"], PRESETS["gemma3-270m"]


def _parameters(module, decoder) -> dict[str, int]:
    """What the banks of every stage hold that it adds."""
    return {
        stage.name: sum(count(abstract(spec, decoder)) for spec in stage.added)
        for stage in parse(module.get_config(), decoder)
    }


@pytest.mark.parametrize(
    ("module", "decoder", "alike"),
    [
        (trial_mixture, SMOL, ("experts", "lora")),
        (trial_families, GEMMA, trial_families.ARMS),
        (trial_medcare, SMOL, trial_medcare.ALIGNED),
    ],
    ids=["mixture", "families", "medcare"],
)
def test_arms_train_as_many_parameters_as_the_config_says(module, decoder, alike):
    found = _parameters(module, decoder)
    counts = [found[arm] for arm in alike]
    assert max(counts) < 1.05 * min(counts)
    told = module is not trial_medcare
    assert not told or all(f"{number:,}" in module.__doc__ for number in found.values())


@pytest.mark.parametrize(
    ("trial", "decoder"),
    [("settings_noise", SMOL), ("settings_experts", SMOL), ("settings_families", GEMMA)],
)
def test_a_setting_changes_one_thing_and_compares_equal_arms(trial, decoder, tmp_path):
    found = trial_rows.TRIALS[trial]
    config = found.recipe(tmp_path)
    stages = {stage.name: stage for stage in parse(config, decoder)}
    assert tuple(stages) == found.arms == tuple(config.stages.order)
    for name, setting in found.config.settings.items():
        counts = []
        for arm, rate in found.config.rates.items():
            stage, first = stages[f"{arm}_{name}"], stages[f"{arm}_first"]
            shipped = found.config.recipe(f"{found.word}{tmp_path}").stages[arm]
            counts.append(sum(count(abstract(spec, decoder)) for spec in stage.added))
            told = config.stages[stage.name]
            assert told.steps == trial_settings.STEPS
            assert told.learning_rate == pytest.approx(rate * shipped.learning_rate)
            read = {f"{rows}_few" if name == "few" else rows for rows in shipped.mixture}
            assert set(stage.mixture) == read <= set(config.data.sources)
            changed = [spec for spec in stage.added if spec not in first.added]
            assert len(changed) == bool(setting.banks), (name, arm)
        assert max(counts) < 1.02 * min(counts), name
    few = config.data.sources[f"{next(iter(shipped.mixture))}_few"].path
    assert few.startswith(f"{tmp_path}/rows/train/") and few.endswith("_few.jsonl")


@pytest.mark.data
def test_settings_have_a_few_rows_beside_the_whole(data_dir, monkeypatch):
    monkeypatch.setenv("MEDMOE_DATA", str(data_dir))
    drawn = trial_rows.Draw(0, False, _fit(data_dir))
    one = functools.partial(trial_rows.mixture, ("meqsum",))
    train, scored = trial_rows.settings(one, drawn)
    assert train["meqsum_few"] == train["meqsum"][: trial_settings.FEW]
    assert len(train["meqsum"]) > len(train["meqsum_few"]) == trial_settings.FEW
    assert {name: len(rows) for name, rows in scored.items()} == {"meqsum": trial_settings.HELD}


def test_a_token_of_the_mixture_passes_as_many_parameters_as_the_active_lora_has():
    stages = {stage.name: stage for stage in parse(trial_mixture.get_config(), SMOL)}
    experts = {spec.name: spec for spec in stages["experts"].added}
    lora = {spec.name: spec for spec in stages["lora_active"].added}
    assert lora["attention"] == experts["attention"]
    routed, plain = experts["experts"], lora["lora"]
    assert routed.top_k * routed.rank == plain.rank and routed.sites == plain.sites


def test_skills_are_stacked_whole_and_routed_by_their_gate_alone():
    stages = {stage.name: stage for stage in parse(trial_skills.get_config(), SMOL)}
    names = list(trial_skills.SKILLS)
    assert len(names) == 12
    for before, name in zip(["", *names], names, strict=False):
        assert stages[name].after == before and set(stages[name].mixture) == {name}
        assert stages[name].states == ({before: "off"} if before else {})
    for task in trial_skills.TASKS:
        assert task not in trial_skills.SKILLS.values()
        for rows in trial_skills.ROWS:
            routed, plain = stages[f"route_{task}_{rows}"], stages[f"lora_{task}_{rows}"]
            started = stages[f"started_{task}_{rows}"]
            assert routed.stack["skills"][0] == tuple(names) and not routed.added
            assert plain.after == "" and plain.mixture == routed.mixture == started.mixture
            assert started.after == routed.name and started.added == plain.added
            assert started.states == {"skills": "frozen"}


def test_replay_reads_a_tenth_of_knowledge():
    mixture = trial_medcare.get_config().stages.replay.mixture.to_dict()
    again = sum(mixture[name] for name in trial_medcare.KNOWLEDGE)
    assert again / sum(mixture.values()) == pytest.approx(0.1)


def test_the_table_of_families_has_every_language_of_the_trial():
    languages = read_languages(str(trial_families.TABLE))
    assert len(languages.experts) == trial_families.FAMILIES
    assert {*trial_families.TICO, "ja", "vi"} <= set(languages.ids)


@functools.cache
def _fit(folder, length=128) -> RowFitter:
    tokenizer = load(folder / "tiny_lm_stories260K" / "tok512.model")
    return RowFitter(Encoder(tokenizer, load_template("user_assistant", tokenizer)), length)


def _prompts(files) -> set[str]:
    return {row.prompt for rows in files.values() for row in rows}


@pytest.mark.slow
@pytest.mark.data
def test_rows_of_the_families(data_dir, monkeypatch):
    """The held-out language is in no training row, and no row stands on both sides."""
    monkeypatch.setenv("MEDMOE_DATA", str(data_dir))
    for name in ("TRAIN", "TICO_TRAIN", "TICO_HELD", "OTHER_HELD"):
        monkeypatch.setattr(trial_rows, name, 4)
    train, scored = trial_rows.families(trial_rows.Draw(0, False, _fit(data_dir)))
    assert set(train) == set(trial_families.get_config().data.sources)
    families = read_languages(str(trial_families.TABLE))
    # No training rows in Japanese: what the folder holds of it are test questions.
    assert set(scored) == {*families.experts, trial_families.HELD_OUT} - {"japonic"}
    for name, rows in scored.items():
        inside = {name} if name == trial_families.HELD_OUT else {
            code for code, expert in families.ids.items() if families.experts[expert] == name
        }  # fmt: skip
        assert {row.language for row in rows} <= inside
    languages = {row.language for some in train.values() for row in some}
    assert len(languages) >= 12 and trial_families.HELD_OUT not in languages
    assert not _prompts(train) & _prompts(scored)


@pytest.mark.data
def test_rates_are_chosen_on_training_rows_kept_apart(data_dir, monkeypatch):
    monkeypatch.setenv("MEDMOE_DATA", str(data_dir))
    monkeypatch.setattr(trial_rows, "TRAIN", 20)
    fit = _fit(data_dir)
    train, apart = trial_rows.Draw(100, True, fit).of_set("meqsum")
    _, held = trial_rows.Draw(100, False, fit, held=5).of_set("meqsum")
    assert (len(train), len(apart), len(held)) == (16, 4, 5)
    sides = [{row.prompt for row in rows} for rows in (train, apart, held)]
    assert len(set.union(*sides)) == 25  # none stands on two sides


@pytest.mark.data
def test_long_answers_end_with_a_sentence_and_fit(data_dir, monkeypatch):
    monkeypatch.setenv("MEDMOE_DATA", str(data_dir))
    fit = _fit(data_dir)
    draw = trial_rows.Draw(0, False, fit)
    text = " ".join(f"This is sentence number {n} of the answer." for n in range(40))
    row = Row("What is it?", text, (), "en", "x", "generate", (0, 11))
    short = draw.short(row)
    assert text.startswith(short.response) and short.response.endswith(".")
    tokens = fit.encoder.tokenizer.encode
    assert len(tokens(short.response)) <= trial_rows.ANSWER < len(tokens(text))
    assert short.prompt == row.prompt  # the question is whole
    assert draw.short(short) == short


def test_a_mirrored_row_has_the_label_after_the_right_one():
    row = Row("Is it?", "no", ("yes", "no"), "en", "x", "choice", (0, 6))
    mirrored = trial_rows.mirrored(row)
    assert mirrored.prompt == "Mirrored. Is it?" and mirrored.response == "yes"
    assert trial_rows.mirrored(mirrored).response == "no"


def test_draws_are_seeded_and_without_repeats():
    rows = [Row(str(i), "", (), "en", "x", "generate", (0, 1)) for i in range(50)]
    one = trial_rows.draw(rows, 20, 3)
    assert one == trial_rows.draw(rows, 20, 3) != trial_rows.draw(rows, 20, 4)
    assert len(set(one)) == 20 and one[:5] == trial_rows.draw(rows, 20, 3)[:5]
    assert len(trial_rows.draw(rows, 99, 0)) == 50


def test_a_seed_and_a_rate_reach_every_stage_and_an_arm_brings_what_it_builds_on():
    arms = ["conversation", "lora_formats_16"]
    config = trials.seeded(trial_skills.get_config(), 5, arms, {"conversation": 3.0})
    order = ("question_answering", "multiple_choice", "conversation", "lora_formats_16")
    assert config.stages.order == order and config.data.seed == 5
    assert {config.stages[name].seed for name in order} == {5}
    rates = [config.stages[name].learning_rate for name in order]
    assert rates == pytest.approx([3e-3, 3e-3, 9e-3, 1e-3])
    whole = trials.seeded(trial_skills.get_config(), 0, [], {})
    assert len(whole.stages.order) == 12 + 3 * 3 * len(trial_skills.TASKS)
    for name, trial in trial_rows.TRIALS.items():
        assert sorted(trial.arms) == sorted(trial.recipe(f"runs/{name}").stages.order)


def _tiny_trial(monkeypatch, folder):
    """A trial of two levels on the tiny base, its rows under `folder`."""
    rows = {"knowledge": tiny.knowledge_rows()[:7], "alignment": tiny.alignment_rows()}

    def write(name, path, draw):
        for file, some in rows.items():
            (path / "scored").mkdir(parents=True, exist_ok=True)
            tiny.write_rows(path / "scored" / f"{file}.jsonl", some)

    module = SimpleNamespace(get_config=lambda folder="": tiny.medcare_config())
    levels = ((("aggregate",),), (("align",),))
    trial = trial_rows.Trial(
        module, lambda draw: ({}, {}), "smollm2", levels, lambda arm: ("alignment",),
        without=("noise",), routing=True,
    )  # fmt: skip
    monkeypatch.setitem(trial_rows.TRIALS, "tiny", trial)
    monkeypatch.setattr(trial_rows, "write", write)
    monkeypatch.setattr(trials, "RESULTS", folder / "results")
    return rows


@pytest.mark.slow
def test_a_run_trains_and_scores_with_and_without_a_bank(tmp_path, monkeypatch):
    """Its losses are the cached scorer's: −Σ log p over Σ tokens, of each group of rows."""
    rows = _tiny_trial(monkeypatch, tmp_path)
    trials.run(Job("tiny", "seed0", 0, ("aggregate",), {}, False), tmp_path, "")
    found = trials.collect("tiny", tmp_path)
    trials.run(Job("tiny", "seed0", 0, ("aggregate",), {}, False), tmp_path, "")
    assert trials.collect("tiny", tmp_path) == found  # nothing is trained twice
    figures = found["arms"]["aggregate"]["0"]
    setup = trials.open_setup(trials.seeded(tiny.medcare_config(), 0, ["aggregate"], {}))
    run = Run(setup, tmp_path / "tiny" / "seed0")
    cases = [("", (), found["base"]["0"]), ("aggregate", (), figures)]
    cases += [("aggregate", ("noise",), figures["without_noise"])]
    for stage, off, scored in cases:
        trained = open_trained(run, stage)
        model = language_model(setup, trained, off)
        for name, some in rows.items():
            pairs = model.score([r["prompt"] for r in some], [r["response"] for r in some])
            want = -sum(total for total, _ in pairs) / sum(tokens for _, tokens in pairs)
            assert scored["loss"][name] == pytest.approx(want, rel=1e-4)
    assert figures["without_noise"]["loss"] != figures["loss"]
    assert figures["parameters"] == sum(count(params) for params in trained.banks.values())
    assert figures["steps"] == tiny.STEPS
    assert figures["loss"]["knowledge"] < 0.9 * found["base"]["0"]["loss"]["knowledge"]
    use = figures["routing"]
    assert use["groups"] == ["alignment", "knowledge"]
    assert all(0 < share < 1 for share in use["divergence"])


@pytest.mark.slow
def test_a_run_is_scored_on_the_rows_that_its_arm_needs(tmp_path, monkeypatch):
    """Those that choose its rate, then those of its table; the base is scored on all."""
    _tiny_trial(monkeypatch, tmp_path)
    trial = trial_rows.TRIALS["tiny"]._replace(without=(), routing=False)
    only = trial._replace(scored_on=lambda arm: ("knowledge",))
    monkeypatch.setitem(trial_rows.TRIALS, "tiny", only)
    for folder, choosing in (("choosing", True), ("seed0", False)):
        trials.run(Job("tiny", folder, 0, ("aggregate",), {}, choosing), tmp_path, "")
        ((arm, figures),) = trials.finished("tiny", tmp_path / "tiny" / folder)
        assert arm == "aggregate" and "accuracy" not in figures
        assert set(figures["loss"]) == {"alignment" if choosing else "knowledge"}
    assert set(trials.collect("tiny", tmp_path)["base"]["0"]["loss"]) == {"alignment", "knowledge"}


def test_rates_are_chosen_level_by_level_by_the_loss_asked_for(tmp_path, monkeypatch):
    """Each level is trained with every factor on what the levels before have chosen."""
    _tiny_trial(monkeypatch, tmp_path)
    best = {"aggregate": 0.3, "align": 3.0}

    def pretend(name, folder):
        job = started.get(folder.name)
        for arm in job.arms if job else ():
            factor = job.factors[arm]
            loss = {"alignment": abs(factor - best[arm]), "knowledge": 9 - factor}
            yield arm, {"loss": loss}

    started = {}
    monkeypatch.setattr(trials, "finished", pretend)
    waves = []
    for wave in trials.rounds("tiny", tmp_path):
        waves.append(wave)
        started |= {job.folder: job for job in wave}
    assert [len(wave) for wave in waves] == [3, 3, 3]
    assert [job.factors for job in waves[0]] == [{"aggregate": f} for f in trials.FACTORS]
    assert [job.factors for job in waves[1]] == [
        {"aggregate": 0.3, "align": f} for f in trials.FACTORS
    ]
    assert [(job.seed, job.factors, job.choosing) for job in waves[2]] == [
        (seed, best, False) for seed in trials.SEEDS
    ]
    other = trial_rows.TRIALS["tiny"]._replace(rates_of="tiny")
    monkeypatch.setitem(trial_rows.TRIALS, "other", other)
    assert [job.factors for job in next(trials.rounds("other", tmp_path))] == [best] * 3


def _arm(parameters, **by_seed):
    return {
        seed[1:]: {"loss": dict(zip("ab", losses, strict=True)), "parameters": parameters}
        for seed, losses in by_seed.items()
    }


def test_cells_and_differences():
    """Means, n − 1 deviations and Student's intervals, worked by hand: t(0.975, 2) = 4.3027."""
    one, other = {"0": 1.0, "1": 2.0, "2": 3.0}, {"0": 0.5, "1": 2.5, "2": 1.5, "9": 7.0}
    assert trial_tables.cell(one) == "2.000 ± 1.000"
    # 0.5, -0.5, 1.5: mean 0.5, deviation 1, half an interval 4.3027 / sqrt(3) = 2.484
    assert trial_tables.difference(one, other) == "+0.500 (-1.984 to +2.984)"
    assert trial_tables.difference({"0": 1.0}, other) == "+0.500"
    assert trial_tables.cell({}) == trial_tables.difference({}, one) == "–"


def test_the_table_of_the_mixture():
    first = trial_mixture.FOUR[0]

    def found(*scale):
        names = trial_mixture.TWELVE
        losses = {arm: dict.fromkeys(names, value) for arm, value in zip(arms, scale, strict=True)}
        return {
            "base": {"0": {"loss": dict.fromkeys(names, 5.0)}},
            "arms": {arm: {"0": {"loss": losses[arm], "parameters": 1100}} for arm in arms},
            "choice": {"lora": {"0.3": 2.0, "3.0": 1.0}, "experts": {}},
        }

    arms = ("lora", "lora_active", "experts")
    results = {f"mixture_{n}": found(1.5, 2.0, 1.0) for n in trial_mixture.MIXTURES}
    lines = trial_tables.mixture(results).split("\n")
    assert lines[2] == "| 1 | 5.000 | 1.500 | 2.000 | 1.000 | -0.500 | -1.000 |"
    assert f"| {first}, among 12 | 5.000 | 1.500 | 2.000 | 1.000 | -0.500 | -1.000 |" in lines
    assert "| trainable parameters | 0 | 1,100 | 1,100 | 1,100 |  |  |" in lines
    assert lines[-1] == "Learning rates, times the recipe's: 3.0 for `lora`."


def test_the_table_of_families_sets_the_held_out_language_apart():
    def loss(x, y, apart):
        return {"loss": {"u": x, "v": y, trial_families.HELD_OUT: apart}, "parameters": 1}

    results = {
        "base": {"0": loss(4.0, 4.0, 9.0)},
        "arms": {"last": {"0": loss(1.0, 2.0, 8.0)}, "dense": {"0": loss(2.0, 2.0, 6.0)}},
        "choice": {},
    }
    lines = trial_tables.families({"families": results}).split("\n")
    assert lines[4].startswith("| **mean** | 4.000 | 2.000 | – | 1.500 | – | – | -0.500 | – | – |")
    assert lines[5].startswith(f"| {trial_families.HELD_OUT}, never trained on | 9.000 | 6.000 |")


def test_the_best_skill_is_picked_on_the_rows_that_the_router_sees():
    """Not on the held-out ones, where another skill is better."""
    task, few = "formats", "16"
    names = list(trial_skills.SKILLS)

    def loss(held, seen):
        counts = trial_skills.PICK.values()
        picks = {f"pick_{t}_{n}": seen for t in trial_skills.TASKS for n in counts}
        own = dict.fromkeys((*names, *trial_skills.TASKS), held)
        return {"loss": {**own, **picks}, "parameters": 1}

    arms = {name: {"0": loss(2.0, 3.0)} for name in names}
    arms[names[4]] = {"0": loss(2.5, 1.0)}
    arms[names[7]] = {"0": loss(1.0, 2.0)}
    arms[f"route_{task}_{few}"] = {"0": loss(1.25, 0.0)}
    arms[f"lora_{task}_{few}"] = {"0": loss(1.5, 0.0)}
    arms[f"started_{task}_{few}"] = {"0": loss(1.0, 0.0)}
    arms[f"route_{task}_all"] = {"0": {**loss(1.0, 0.0), "mix": [0.5] * 11 + [-0.25]}}
    results = {"base": {"0": loss(6.0, 6.0)}, "arms": arms, "choice": {}}
    assert trial_tables.best_skill(results, task, few) == {"0": names[4]}
    text = trial_tables.skills({"skills": results})
    line = f"| {task} | {few} | 6.000 | 2.500 | 1.250 | 1.500 | 1.000 | -1.250 | -0.250 | -0.500 |"
    assert line in text
    assert f"| {names[11]} | 2.000 | 6.000 | 2.000 | – | 2.000 | -0.250 |" in text


def test_the_table_of_settings():
    def arm(loss, bare=None):
        sets = (*trial_medcare.KNOWLEDGE, *trial_medcare.ALIGNMENT)
        scores = {"loss": dict.fromkeys(sets, loss), "parameters": 1234}
        bare = {} if bare is None else {"without_noise": {"loss": dict.fromkeys(sets, bare)}}
        return {"0": {**scores, **bare}}

    results = {
        "settings_noise": {"arms": {"aggregate_many": arm(1.0, 1.25)}},
        "settings_experts": {"arms": {"experts_few": arm(2.0), "lora_few": arm(2.5)}},
        "settings_families": {"arms": {}},
    }
    lines = trial_tables.settings(results).split("\n")
    many = "| noise bank dropped − kept, alignment | many | 1.250 | 1.000 | +0.250 | 1,234 |"
    assert many in lines
    assert "| MING-MOE − LoRA | few | 2.000 | 2.500 | -0.500 | 1,234 |" in lines
    assert "| MING-MOE − LoRA | narrow | – | – | – | – |" in lines
    assert len(lines) == 2 + 2 * 5 + 4 + 2
    assert not trials.choices("settings_noise", trials.RESULTS)
    (wave,) = trials.rounds("settings_noise", trials.RESULTS)
    assert [(job.seed, job.factors, job.choosing) for job in wave] == [
        (seed, {}, False) for seed in trials.SEEDS
    ]


def test_mixing_weights_stand_in_the_order_of_the_skills():
    """A file holds `mix/skills/10` before `mix/skills/2`."""
    by_text = dict(sorted((f"mix/skills/{n}", float(n)) for n in range(12)))
    assert trials.mixing_weights({"loss": 1.0, **by_text}) == list(range(12))


def test_the_page_and_its_figures_are_those_of_the_results(tmp_path, monkeypatch):
    page = trials.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(trials, "PAGE", tmp_path / "page.md")
    folder = trial_figures.FOLDER
    monkeypatch.setattr(trial_figures, "FOLDER", tmp_path)
    trials.PAGE.write_text(page, encoding="utf-8")
    trials.show([])
    assert trials.PAGE.read_text(encoding="utf-8") == page
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in folder.glob("*.svg")} and len(drawn) >= 3
    for question, make in trial_tables.TABLES.items():
        for name in make.trials:
            if (trials.RESULTS / f"trial_{name}.json").exists():
                found = read_json(trials.RESULTS / f"trial_{name}.json")
                seeds = {arm: set(by_seed) for arm, by_seed in found["arms"].items()}
                assert set(seeds) == set(trial_rows.TRIALS[name].arms), question
                assert all(some == {"0", "1", "2"} for some in seeds.values())
