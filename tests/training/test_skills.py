"""The recipe of skills, and mixing weights fitted on a task's rows, against float64 sums."""

import json
import shutil

import numpy as np
import pytest

from configs import sa_mdkif
from medmoe_jax.base.presets import preset
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import LeaseError, only_writer
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.rows import RowReader
from medmoe_jax.errors import UserError
from medmoe_jax.training.fit import fit_stage
from medmoe_jax.training.fit_methods import METHODS, by_gradient
from medmoe_jax.training.recipe import parse
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import naive, skills, tiny
from tests.forged import forge

pytestmark = pytest.mark.slow

NAMES = tuple(skills.table())
ROWS = [
    {"prompt": f"{drug}: yes or no, {use}?", "response": answer}
    for drug, use, answer in (
        ("aspirin", "pain", "yes"),
        ("insulin", "fever", "no"),
        ("codeine", "cough", "yes it is"),
        ("quinine", "sugar", "no"),
        ("lithium", "mania", "yes"),
    )
]


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(skills.randomised(), tmp_path / "w")


@pytest.fixture
def rows(tmp_path):
    return tiny.write_rows(tmp_path / "task.jsonl", ROWS)


def test_twelve_skills_each_alone_then_one_gate():
    config, decoder = sa_mdkif.get_config(), preset("qwen1.5-1.8b")
    *learned, task = parse(config, decoder)
    assert tuple(s.name for s in learned) == tuple(sa_mdkif.SKILLS) and len(learned) == 12
    for i, stage in enumerate(learned):
        (bank,), before = stage.added, [s.name for s in learned[:i]]
        assert (bank.name, bank.experts, bank.gate, bank.learned_scale) == (
            stage.name,
            1,
            "always",
            True,
        )
        assert len(bank.sites) == 7 and (bank.start, bank.stop) == (0, decoder.n_layers)
        assert stage.after == (before[-1] if before else "")
        assert dict(stage.states) == ({before[-1]: "off"} if before else {})
        assert [t.name for t in stage.regularisers] == [f"orthonormality/{stage.name}"]
        (ranks,) = stage.allocators.values()
        assert ranks.target_rank < bank.rank and ranks.bank == bank.name
        for name in stage.mixture:
            source, (paths, prompt) = config.data.sources[name], sa_mdkif.SKILLS[stage.name]
            assert source.path in paths and source.prompt == prompt
    assert len({prompt for _, prompt in sa_mdkif.SKILLS.values()}) == 12
    assert task.after == learned[-1].name and not task.added and not task.states
    ((of, gate),) = task.stack.values()
    assert of == tuple(sa_mdkif.SKILLS) and gate["gate"] == "skill"
    assert [t.name for t in task.regularisers] == ["sparsity/skills"]


@pytest.mark.parametrize("gate", sa_mdkif.GATES)
def test_every_gate_and_task(gate):
    config = sa_mdkif.get_config(f"qwen2-0.5b,{gate},triage,coding")
    assert config.stages.order[12:] == ("triage", "coding")
    *_, last, triage, coding = parse(config, preset("qwen2-0.5b"))
    assert triage.after == coding.after == last.name
    assert dict(coding.mixture) == {"coding": 1.0}
    ((_, fields),) = coding.stack.values()
    assert fields["mix_per_layer"] == gate.startswith("per_layer")
    assert fields["mix_softmax"] == gate.endswith("softmax")
    assert fields["gate"] == ("token" if gate == "token" else "skill")
    assert bool(coding.regularisers) == (gate in ("global", "per_layer"))


@pytest.mark.parametrize("steps", [4, 59, 600])
def test_a_skill_takes_any_number_of_steps(steps):
    """Its ranks shrink by then, of few steps after each."""
    config = sa_mdkif.get_config("qwen2-0.5b,none")
    config.stages.coding = sa_mdkif.learn("coding", "", steps, mixture={"conversation": 1.0})
    config.stages.order = ("coding",)
    (stage,) = parse(config, preset("qwen2-0.5b"))
    assert stage.allocators["ranks"].every == {4: 1, 59: 1, 600: 10}[steps]


def test_the_skills_alone():
    assert sa_mdkif.get_config("qwen2-0.5b,none").stages.order == tuple(sa_mdkif.SKILLS)


@pytest.mark.parametrize("argument", ["gpt", "qwen2-0.5b,all", "qwen2-0.5b,none,triage"])
def test_arguments_that_name_nothing(argument):
    with pytest.raises(ValueError, match=f"'{argument}': give BASE, .* GATE one of global, "):
        sa_mdkif.get_config(argument)


def test_a_skill_without_data():
    config = skills.config(tasks=())
    with pytest.raises(ValueError, match="skill 'coding' has no data"):
        sa_mdkif.add_skills(config, {"coding": ((), "{text}")})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("t_init", 3, r"t_init: 3 \+ t_final 3 leave none of the run's 6 steps"),
        ("target_rank", 0, "target_rank: 0 is below 1"),
        ("target_rank", 4, "target_rank: 4 is above the rank 3"),
    ],
)
def test_allocations_that_do_not_fit(field, value, message):
    config = skills.config()
    config.stages.both.allocators.ranks.update({"t_final": 3, field: value})
    with pytest.raises(UserError, match=rf"stages\.both\.allocators\.ranks\.{message}"):
        open_setup(config)


def test_sparsity_of_weights_that_sum_to_one():
    config = skills.config("softmax")
    config.stages.one.losses = skills.config().stages.one.losses
    with pytest.raises(UserError, match=r"stages\.one\.losses: .*'skills' pass through a softmax"):
        open_setup(config)


def naive_loss(setup, workdir, rows, weights, penalty):
    """Mean −log p a target, every skill's own bank beside the base with its Λ times its weight."""
    trained = open_trained(Run(setup, workdir), NAMES[-1])
    weights_LxE = np.broadcast_to(weights, (setup.base.config.n_layers, len(NAMES)))
    banks = naive.f64({name: trained.banks[name] for name in NAMES})
    for e, name in enumerate(NAMES):
        for leaves in banks[name].values():
            leaves["scale"] = leaves["scale"] * weights_LxE[:, e, None, None]
    linear = naive.adapted([trained.roster[name][0] for name in NAMES], banks)
    encoder, length = Encoder(setup.tokenizer, setup.template), setup.config.data.length
    total = count = 0.0
    for row in rows:
        encoded = encoder(RowReader()(row)).cut(length)
        n = len(encoded.tokens)
        batch = {
            "tokens": encoded.tokens[None],
            "loss_mask": encoded.loss_mask[None],
            "segment_ids": np.ones((1, n), np.int32),
            "positions": np.arange(n)[None],
        }
        total += naive.nll(setup.base.config, trained.base, batch, linear)
        count += encoded.loss_mask[1:].sum()
    return total / count + penalty * np.abs(weights).mean()


MESHES = {
    "data8": {"data": 8},
    "fsdp2-sequence2-tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    ("method", "gate", "mesh"),
    [
        ("gradient", "per_layer", "fsdp2-sequence2-tensor2"),
        ("cma", "global", "data8"),
    ],
)
def test_what_a_fit_reports_is_the_loss_of_the_weighted_skills(method, gate, mesh, workdir, rows):
    config = skills.config(gate)
    config.run.mesh.update(MESHES[mesh])
    config.run.score_batch = 2  # several micro-batches where the mesh lets it
    setup = open_setup(config)
    fit = fit_stage(Run(setup, workdir), "one", rows, method, steps=6)
    weights = np.asarray(fit.weights)
    assert fit.skills == list(NAMES) and fit.rows == len(ROWS)
    assert weights.shape == (2 if gate == "per_layer" else 1, 3)
    want = naive_loss(setup, workdir, ROWS, weights, 0.05)
    start = naive_loss(setup, workdir, ROWS, 0 * weights, 0.0)
    assert abs(fit.loss - want) < 1e-5 * want and abs(fit.loss_before - start) < 1e-5 * start
    assert fit.loss < start - 0.02
    assert abs(naive_loss(setup, workdir, ROWS, weights, 0.0) - want) > 1e-3
    for e in range(3):
        without = weights * (np.arange(3) != e)
        assert abs(naive_loss(setup, workdir, ROWS, without, 0.05) - want) > 1e-3, NAMES[e]
    kept = open_trained(Run(setup, workdir), "one")
    np.testing.assert_allclose(kept.banks["skills"]["mix"]["weight"], weights, rtol=1e-6)
    manifest = Manifest.read(StageFolder.of(workdir, "one").manifest)
    ops = {operation["op"]: operation for operation in manifest.operations}
    assert ops["stack"]["of"] == list(NAMES) and ops["fit"]["method"] == method
    assert list(manifest.banks) == ["skills"] and manifest.steps == 6


def test_both_methods_find_the_same_weights(workdir, rows):
    """Two searches that share nothing but the loss; softmax, so that weights are shares."""
    config = skills.config("softmax")
    config.stages.one.learning_rate = 0.2
    setup = open_setup(config)
    gradient = fit_stage(Run(setup, workdir), "one", rows, "gradient", steps=80)
    evolution = fit_stage(Run(setup, workdir), "two", rows, "cma", steps=60)
    gain = gradient.loss_before - gradient.loss
    assert gain > 0.02 and gradient.loss_before == evolution.loss_before
    assert abs(gradient.loss - evolution.loss) < 0.05 * gain
    for fit in (gradient, evolution):
        assert np.sum(fit.weights) == pytest.approx(1.0, abs=1e-5) and min(fit.weights[0]) >= 0
    np.testing.assert_allclose(gradient.weights, evolution.weights, atol=0.05)


def test_the_best_weights_on_the_way_are_kept(workdir, rows, monkeypatch):
    """Steps so long that the last one is not the best; losses as float64 sums."""
    config = skills.config()
    config.stages.one.learning_rate = 2.0
    setup, trail = open_setup(config), []

    def followed(problem, seed):
        for values, found in by_gradient(problem, seed):
            trail.append(np.array(found["banks"]["skills"]["mix"]["weight"]))
            yield values, found

    monkeypatch.setitem(METHODS, "gradient", followed)
    fit = fit_stage(Run(setup, workdir), "one", rows, "gradient", steps=6)
    losses = [naive_loss(setup, workdir, ROWS, weights, 0.05) for weights in trail]
    best = int(np.argmin(losses))
    assert len(losses) == 6 and losses[-1] > losses[best] + 1e-3
    np.testing.assert_array_equal(fit.weights, trail[best])
    assert fit.loss == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("method", ["gradient", "cma"])
def test_a_search_that_finds_nothing_better_ends_where_it_began(method, workdir, rows):
    """The start is the best where any weight costs more than the skills may bring."""
    config = skills.config()
    config.stages.one.losses.sparsity.weight = 1e3
    fit = fit_stage(Run(open_setup(config), workdir), "one", rows, method, steps=2)
    assert fit.weights == [[0.0] * len(NAMES)] and fit.loss == fit.loss_before


def test_a_fit_is_its_seed_and_settings(rows, tmp_path):
    def weights(folder, seed, disturbance):
        np.random.seed(disturbance)
        work = shutil.copytree(skills.randomised(), tmp_path / folder)
        run = Run(open_setup(skills.config()), work)
        return fit_stage(run, "one", rows, "cma", 3, seed).weights

    first = weights("a", 0, 1)
    assert weights("b", 0, 2) == first
    assert weights("c", 1, 1) != first


def test_a_finished_fit_is_shown_again_and_another_is_refused(workdir, rows):
    setup = open_setup(skills.config())
    fit = fit_stage(Run(setup, workdir), "one", rows, "cma", steps=2)
    written = StageFolder.of(workdir, "one").manifest.stat().st_mtime_ns
    assert fit_stage(Run(setup, workdir), "one", rows, "cma", steps=2) == fit
    assert StageFolder.of(workdir, "one").manifest.stat().st_mtime_ns == written
    with only_writer(workdir), pytest.raises(LeaseError, match="writes into"):
        fit_stage(Run(setup, workdir), "two", rows, "cma", steps=2)
    with pytest.raises(UserError, match=r"imported\.steps: 2 then, 3 now"):
        fit_stage(Run(setup, workdir), "one", rows, "cma", steps=3)


def test_skills_of_equal_shapes_are_not_taken_for_each_other(workdir, rows, tmp_path):
    def swap(part):
        facts, verdict = (StageFolder.of(workdir, s).path / part for s in ("facts", "verdict"))
        facts.rename(tmp_path / "aside")
        verdict.rename(facts)
        (tmp_path / "aside").rename(verdict)

    setup = open_setup(skills.config())
    for part, words in (
        ("final", "facts/final is not what .*manifest.json names"),
        ("manifest.json", "facts/manifest.json is of another stage"),
        ("recipe.json", "facts/recipe.json is of stage 'verdict' and not of 'facts'"),
        ("", "facts/recipe.json is of stage 'verdict' and not of 'facts'"),
    ):
        swap(part)
        with pytest.raises(UserError, match=f"{words}.*or remove"):
            fit_stage(Run(setup, workdir), "one", rows, "cma", 2)
        swap(part)
    folder = StageFolder.of(workdir, "one")
    fit_stage(Run(setup, workdir), "one", rows, "cma", 2)
    forge(folder, manifest=lambda told: told["metrics"]["fit"].update(loss=0.0))
    assert fit_stage(Run(setup, workdir), "one", rows, "cma", 2).loss == 0.0  # the forger's
    told = json.loads(folder.manifest.read_text())
    told["metrics"]["fit"]["loss"] = 1.0
    folder.manifest.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"one/manifest\.json: was changed after"):
        fit_stage(Run(setup, workdir), "one", rows, "cma", 2)


def test_rows_that_are_cut_before_their_answers(workdir, tmp_path):
    rows = [{"prompt": "aspirin " * 60, "response": "yes"}]
    path = tiny.write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(UserError, match="task 'one': no token of its rows is a target"):
        fit_stage(Run(open_setup(skills.config()), workdir), "one", path)
    assert not StageFolder.of(workdir, "one").path.exists()


@pytest.mark.parametrize("method", ["gradient", "cma"])
def test_a_loss_that_is_not_finite(method, workdir, rows, monkeypatch):
    setup = open_setup(skills.config())
    real = setup.load_base

    def spoilt():
        base = real()
        return {**base, "final_norm": base["final_norm"] * np.float32("nan")}

    monkeypatch.setattr(type(setup), "load_base", lambda _: spoilt())
    with pytest.raises(UserError, match="stage 'one': the loss is nan"):
        fit_stage(Run(setup, workdir), "one", rows, method)
    assert not StageFolder.of(workdir, "one").path.exists()
