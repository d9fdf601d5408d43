"""Ranks allocated while a stage trains: what the step hands over, meshes, accumulation, resume."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmoe_jax.adapters.adalora import Allocator, BudgetSchedule
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.base.execution import Execution
from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import BANK_RULES, BASE_RULES, shardings, state_shardings
from medmoe_jax.training import config as sections
from medmoe_jax.training.allocation import AllocationState, allocating
from medmoe_jax.training.optimiser import make_optimiser, schedule
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.step import Objective, TrainState, gradients, train_step
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny
from tests.crash import Stop, crash_in_batch
from tests.training.test_step import CONFIG, uneven_batch

pytestmark = pytest.mark.slow

SKILL = BankSpec("skill", ("attn.o", "mlp.up"), 0, 2, rank=3, alpha=6.0, learned_scale=True)
PLAIN = BankSpec("plain", ("attn.q", "mlp.up"), 1, 2, rank=2)
STEPS = 7
PLAN = BudgetSchedule(Allocator("skill", 1, t_init=1, t_final=2, every=2), SKILL, STEPS)
TERM = Orthonormality("skill", weight=0.05)
RULES = BANK_RULES + BASE_RULES
FIELDS = {"learning_rate": 0.05, "warmup": 0.0, "eps": 1e-2, "clip": 0.4}


def make_step(execution=Execution(), accumulation=1):
    """`(optimiser, train_step)` with the stage's own optimiser."""
    objective = Objective(
        AdaptedConfig(CONFIG, (SKILL, PLAIN), execution), (TERM,), (SKILL, PLAIN), accumulation
    )
    section = sections.stage(**FIELDS)
    optimiser = make_optimiser(section, schedule(section, STEPS), {"skill": PLAN})
    return objective, optimiser, jax.jit(functools.partial(train_step, objective, optimiser))


def mesh_of(sizes=(), devices=1):
    axes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **dict(sizes)}
    return make_mesh(axes, jax.devices()[:devices])


def trees_of(mesh):
    banks = naive.random_banks((SKILL, PLAIN), CONFIG, size=2.0)
    trainable = {"banks": banks, "base": {}}
    frozen = {"base": naive.random_params(CONFIG), "banks": {}}
    return [
        jax.device_put(jax.device_get(t), shardings(t, mesh, RULES)) for t in (trainable, frozen)
    ]


def allocation(state):
    return optax.tree.get(state.optimiser, AllocationState.__name__)


@functools.cache
def run(sizes=(), devices=1, accumulation=1, remat="none", unroll=1):
    """Every state of a run on a mesh, on the host, and the losses."""
    mesh = mesh_of(sizes, devices)
    execution = Execution(remat=remat, unroll=unroll, activations=batch_sharding(mesh, 3))
    _, optimiser, step = make_step(execution, accumulation)
    trainable, frozen = trees_of(mesh)
    placed = state_shardings(jax.eval_shape(optimiser.init, trainable), mesh, RULES)
    state = TrainState(
        jnp.int32(0), trainable, jax.jit(optimiser.init, out_shardings=placed)(trainable)
    )
    batch = jax.device_put(uneven_batch(), batch_sharding(mesh))
    states, losses = [], []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        states.append(jax.device_get((state.trainable, allocation(state))))
        losses.append(float(metrics["loss"]))
    return states, losses, shard_shapes(allocation(state))


def shard_shapes(tree):
    return jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), tree)


def scales(trainable):
    return np.concatenate([p["scale"].ravel() for p in trainable["banks"]["skill"].values()])


def test_importance_is_of_the_updated_weights_and_the_clipped_gradient():
    """After one step, from the gradient of the whole loss, accumulated and clipped by hand."""
    objective, _, _ = make_step(accumulation=4)
    trainable, frozen = trees_of(mesh_of())
    grads, _ = jax.jit(functools.partial(gradients, objective))(
        trainable, frozen, uneven_batch(), jnp.int32(0)
    )
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 2 * FIELDS["clip"]
    after, memory = run(accumulation=4)[0][0]
    memory = memory.banks["skill"]
    for site in SKILL.sites:
        for leaf in ("lora_a", "lora_b", "scale"):
            clipped = grads["banks"]["skill"][site][leaf] * FIELDS["clip"] / norm
            importance = np.abs(np.asarray(after["banks"]["skill"][site][leaf] * clipped))
            assert naive.rel(memory.sensitivity[site][leaf], 0.15 * importance) < 1e-4
            assert naive.rel(memory.uncertainty[site][leaf], 0.15 * 0.85 * importance) < 1e-4
            stale = np.abs(trainable["banks"]["skill"][site][leaf] * clipped)
            assert naive.rel(stale, importance) > 0.01
    assert jax.tree.structure(memory.sensitivity) == jax.tree.structure(
        {s: {k: 0 for k in ("lora_a", "lora_b", "scale")} for s in SKILL.sites}
    )


def test_a_run_of_allocations():
    """Λ is cleared at updates 2 and 4, grows back between, and stays 0 from update 5 on."""
    states, losses, _ = run()
    zeros = [int((scales(trainable) == 0).sum()) for trainable, _ in states]
    cut = [12 - PLAN.budget(t) for t in range(1, STEPS + 1)]
    assert zeros == [0, cut[1], 0, cut[3], 8, 8, 8] and 0 < cut[1] < cut[3]
    assert losses[-1] < losses[0]
    final = scales(states[4][0]) == 0
    for trainable, memory in states[4:]:
        np.testing.assert_array_equal(scales(trainable) == 0, final)
        assert sum(int(k.sum()) for k in memory.banks["skill"].kept.values()) == 4
    # Only Λ is touched: the other bank and A, B move on.
    for bank, site, leaf in (("plain", "attn.q", "lora_b"), ("skill", "mlp.up", "lora_a")):
        a, b = (trainable["banks"][bank][site][leaf] for trainable, _ in states[-2:])
        assert np.all(a != b)


def agree(got, want):
    for (trainable, memory), (want_trainable, want_memory) in zip(got[0], want[0], strict=True):
        assert naive.tree_rel(trainable, want_trainable) < 1e-3
        for site, kept in want_memory.banks["skill"].kept.items():
            np.testing.assert_array_equal(memory.banks["skill"].kept[site], kept)
        assert naive.tree_rel(memory.inner, want_memory.inner) < 1e-3
        for part in ("sensitivity", "uncertainty"):
            pair = (getattr(m.banks["skill"], part) for m in (memory, want_memory))
            assert naive.tree_rel(*pair) < 1e-3
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sizes": (("data", 2), ("fsdp", 4)), "devices": 8}, id="data2-fsdp4"),
        pytest.param({"sizes": (("fsdp", 4), ("tensor", 2)), "devices": 8}, id="fsdp4-tensor2"),
        pytest.param({"accumulation": 4}, id="accumulation4"),
        pytest.param({"remat": "full", "unroll": 2}, id="remat-unrolled"),
    ],
)
def test_runs_agree(options):
    """Weights, importance and the very same triplets kept, at every step."""
    agree(run(**options), run())


def test_importance_lies_in_the_shards_of_its_parameter():
    _, _, shapes = run(sizes=(("fsdp", 4), ("tensor", 2)), devices=8)
    trainable, _ = trees_of(mesh_of((("fsdp", 4), ("tensor", 2)), 8))
    want = shard_shapes(trainable["banks"]["skill"])
    assert shapes.banks["skill"].sensitivity == shapes.banks["skill"].uncertainty == want
    assert want["mlp.up"]["lora_a"] == (2, 16 // 4, 1, 3)


def test_the_updates_of_any_optimiser():
    """Λ is brought to exactly zero from whatever the optimiser makes of it."""
    optimiser = allocating(optax.sgd(0.1), {"skill": PLAN})
    banks = naive.random_banks((SKILL,), CONFIG)
    params = {"banks": banks, "base": {"final_norm": jnp.ones(3)}}
    grads = jax.tree.map(jnp.cos, params)
    state = optimiser.init(params)
    update = jax.jit(optimiser.update)
    for _ in range(2):
        before = params
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    kept = state.banks["skill"].kept
    for site in SKILL.sites:
        p, old, g = (t["banks"]["skill"][site] for t in (params, before, grads))
        want = np.where(kept[site], old["scale"] - 0.1 * g["scale"], 0.0)
        np.testing.assert_allclose(p["scale"], want, rtol=1e-6)
        assert np.array_equal(p["scale"] == 0, ~kept[site]) and not kept[site].all()
        np.testing.assert_allclose(p["lora_a"], old["lora_a"] - 0.1 * g["lora_a"], rtol=1e-6)
    assert float(params["base"]["final_norm"][0]) == pytest.approx(1 - 0.2 * np.cos(1))


def skill_config(**fields):
    """One stage that trains a skill with AdaLoRA on the tiny base."""
    config = tiny.medcare_config()
    config.stages.order = ("learn",)
    config.stages.learn = sections.stage(
        banks={
            "skill": sections.bank(
                sites=("attn.v", "mlp.*"), rank=3, alpha=6.0, learned_scale=True, dropout=0.1
            )
        },
        losses={"orthonormal": sections.orthonormality("skill", weight=0.1)},
        allocators={
            "ranks": sections.allocator("skill", 1, t_init=2, t_final=3, every=2, **fields)
        },
        mixture={"knowledge": 1.0},
        learning_rate=3e-2,
        steps=tiny.STEPS,
    )
    config.run.save_every = 5
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("skill")
    train(Run(open_setup(skill_config()), workdir))
    return workdir


def lines(workdir):
    """The log, less what the machine's clock enters."""
    rows = read_metrics(StageFolder.of(workdir, "learn").metrics)
    return [{k: v for k, v in row.items() if "second" not in k and "wait" not in k} for row in rows]


def test_what_a_stage_leaves(finished, capsys):
    """Budget, kept triplets and mean Λ in the log; ranks in the manifest and in the weights."""
    rows = lines(finished)
    plan = BudgetSchedule(
        Allocator("skill", 1, 2, 3, 2), open_setup(skill_config()).stages[0].added[0], 12
    )
    logged = [row for row in rows if "allocation/skill/budget" in row]
    assert [row["step"] for row in logged] == [2, 4, 6, 8, 10, 12]
    budgets = [row["allocation/skill/budget"] for row in logged]
    assert budgets == [plan.budget(row["step"]) for row in logged]
    assert budgets[0] == 24 and budgets[-1] == 8
    assert [row["allocation/skill/kept"] for row in logged] == budgets
    assert all(row["allocation/skill/mean_scale"] > 0 for row in logged)
    assert all(row["orthonormality/skill"] > 0 for row in rows)
    assert all(row["orthonormality/skill/gradient_norm"] > 0 for row in rows)
    assert logged[-1]["orthonormality/skill/largest"] >= rows[-1]["orthonormality/skill"]
    banks = open_trained(Run(open_setup(skill_config()), finished), "learn").banks
    manifest = json.loads(StageFolder.of(finished, "learn").manifest.read_text())
    ranks = manifest["metrics"]["ranks"]["skill"]
    assert set(ranks) == {"attn.v", "mlp.gate", "mlp.up", "mlp.down"}
    for site, by_layer in ranks.items():
        assert by_layer == (np.asarray(banks["skill"][site]["scale"]) != 0).sum(-1).tolist()
    assert np.sum(list(ranks.values())) == 8
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("fields", [{"patience": 1}, {"final": "best"}], ids=str)
def test_a_stage_that_ends_early_or_with_its_best_has_the_ranks_asked_for(tmp_path, fields):
    """Scores only fall, from before the ranks are chosen on, with update 9."""
    config = skill_config()
    config.stages.learn.evaluation = sections.evaluation(every=1, tasks=("t",), best="t", **fields)
    run = Run(open_setup(config), tmp_path)
    train(run, score_tasks=lambda prepared: lambda step, state: {"t": -step})
    manifest = json.loads(StageFolder.of(tmp_path, "learn").manifest.read_text())
    assert manifest["metrics"]["best"]["step"] == 9
    assert manifest["steps"] == (9 if "final" in fields else 10)
    assert np.sum(list(manifest["metrics"]["ranks"]["skill"].values())) == 8


def test_resume_bit_for_bit(finished, tmp_path, monkeypatch):
    """Stopped while ranks shrink (after update 5) and after the freeze (after update 10)."""
    for number in (8, 7):  # the first run dies at batch 8; the second, from 6 on, at batch 12
        with monkeypatch.context() as patch, pytest.raises(Stop):
            crash_in_batch(patch, number)
            train(Run(open_setup(skill_config()), tmp_path))
    steps = StageFolder.of(tmp_path, "learn").steps
    assert {int(p.name) for p in steps.iterdir() if p.name.isdigit()} == {5, 10}
    train(Run(open_setup(skill_config()), tmp_path))
    assert lines(tmp_path) == lines(finished)
    setup = open_setup(skill_config())
    banks = [open_trained(Run(setup, w), "learn").banks for w in (tmp_path, finished)]
    jax.tree.map(np.testing.assert_array_equal, *banks)


def test_a_run_too_short_for_its_phases(tmp_path):
    """Where the steps come from epochs, as soon as they are known."""
    config = skill_config()
    config.stages.learn.steps, config.stages.learn.epochs = 0, 1.0
    config.stages.learn.allocators.ranks.t_init = 500
    setup = open_setup(config)
    with pytest.raises(
        UserError, match=r"stages\.learn\.allocators\.ranks\.t_init: 500 \+ t_final"
    ):
        train(Run(setup, tmp_path))
