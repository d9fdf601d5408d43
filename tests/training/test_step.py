"""One optimiser step against float64 twins, hand-written AdamW and other meshes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.orthogonality import Orthogonality
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import RULES, shardings, state_shardings
from medmoe_jax.training import config as sections
from medmoe_jax.training.leaves import split_base
from medmoe_jax.training.optimiser import make_optimiser, schedule
from medmoe_jax.training.step import (
    Objective,
    TrainState,
    gradients,
    micro_batches,
    nll,
    rows_hash,
    train_step,
)
from tests import naive

pytestmark = pytest.mark.slow

CONFIG = DecoderConfig(
    vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=16, tied=True
)
SPECS = (
    BankSpec("attention", ("attn.q", "attn.o"), 0, 2, rank=2, alpha=4.0),
    BankSpec("noise", ("mlp.up",), 0, 2, experts=4, rank=2, alpha=4.0, gate="token", top_k=2),
    BankSpec("knowledge", ("mlp.up", "mlp.down"), 0, 2, rank=4, alpha=8.0),
    BankSpec("alignment", ("mlp.down",), 0, 1, rank=4, alpha=8.0),
)
APART = Orthogonality("alignment", "knowledge", weight=3.0)
TRAINED = ("embed", "layers.attn_norm", "layers.mlp.gate.kernel")
FROZEN_BANKS = ("knowledge",)


def make_objective(specs=SPECS, execution=Execution(), **fields):
    return Objective(AdaptedConfig(CONFIG, specs, execution), specs=specs, **fields)


@functools.cache
def trees_of_step():
    """`(trainable, frozen)`: three banks and some base leaves train."""
    banks = naive.random_banks(SPECS, CONFIG)
    frozen_base, trained = split_base(naive.random_params(CONFIG), TRAINED)
    frozen = {"base": frozen_base, "banks": {k: banks[k] for k in FROZEN_BANKS}}
    moving = {k: v for k, v in banks.items() if k not in FROZEN_BANKS}
    return {"banks": moving, "base": trained}, frozen


@functools.cache
def uneven_batch():
    """Eight packed rows, of which some have many targets and one none at all."""
    rows = ((5, 4), (9,), (3, 3, 3), (2, 2), (8,), (4,), (6, 3), (2,))
    batch = naive.random_batch(CONFIG, rows=rows, length=10)
    mask = np.zeros_like(batch["loss_mask"])
    for row, count in enumerate((1, 9, 2, 1, 8, 0, 3, 1)):
        mask[row, 1 : count + 1] = 1
    return {**batch, "loss_mask": mask}


def unpacked(batch):
    """The same samples, one to a row, by hand."""
    samples = []
    for b in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            at = batch["segment_ids"][b] == segment
            samples.append((batch["tokens"][b, at], batch["loss_mask"][b, at]))
    length = max(len(ids) for ids, _ in samples)
    out = {k: np.zeros((len(samples), length), np.int32) for k in batch}
    for i, (ids, mask) in enumerate(samples):
        n = len(ids)
        out["tokens"][i, :n], out["loss_mask"][i, :n] = ids, mask
        out["segment_ids"][i, :n], out["positions"][i, :n] = 1, range(n)
    return out


def targets(batch):
    """Number of targets of each row: masked tokens that do not start a sample."""
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    return (batch["loss_mask"][:, 1:] * same * (batch["segment_ids"][:, 1:] > 0)).sum(1)


def naive_nll(trainable, batch):
    _, frozen = trees_of_step()
    base = trees.overlay(naive.f64(frozen["base"]), trainable["base"])
    banks = {**naive.f64(frozen["banks"]), **trainable["banks"]}
    return naive.nll(CONFIG, base, unpacked(batch), naive.adapted(SPECS, banks))


def naive_apart(trainable):
    """Mean |A_of A_against^T| summed over the one shared site and layer."""
    _, frozen = trees_of_step()
    a = np.asarray(trainable["banks"]["alignment"]["mlp.down"]["lora_a"], np.float64)[0, :, 0]
    k = np.asarray(frozen["banks"]["knowledge"]["mlp.down"]["lora_a"], np.float64)[0, :, 0]
    return np.mean([[abs(a[:, i] @ k[:, j]) for j in range(4)] for i in range(4)])


@functools.cache
def computed(accumulation=1, regularisers=(APART,)):
    trainable, frozen = trees_of_step()
    objective = make_objective(regularisers=regularisers, accumulation=accumulation)
    run = jax.jit(functools.partial(gradients, objective))
    return jax.device_get(run(trainable, frozen, uneven_batch(), jnp.int32(0)))


def test_gradients_are_those_of_the_token_weighted_mean_plus_the_term():
    """Loss and every leaf's gradient against float64, with the tied embedding and a norm."""
    trainable, _ = trees_of_step()
    batch = uneven_batch()
    grads, metrics = computed()
    count = targets(batch).sum()
    assert metrics["target_tokens"] == count
    f64 = naive.f64(trainable)
    assert metrics["loss"] == pytest.approx(naive_nll(f64, batch) / count, rel=1e-5)
    assert metrics["orthogonality/alignment-knowledge"] == pytest.approx(naive_apart(f64), rel=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    naive.check_gradient(
        lambda tree: naive_nll(tree, batch) / count + APART.weight * naive_apart(tree),
        trainable,
        grads,
        np.random.default_rng(0),
        tolerance=2e-4,
    )


def test_a_mean_of_row_means_is_another_number():
    """So that the tests with this batch can fail."""
    batch, (trainable, _) = uneven_batch(), trees_of_step()
    one = {k: v[1:2] for k, v in batch.items()}
    other = {k: v[3:4] for k, v in batch.items()}
    values = [naive_nll(naive.f64(trainable), b) / targets(b).sum() for b in (one, other)]
    assert abs(values[0] - values[1]) > 0.1


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    grads, metrics = computed()
    others, more = computed(accumulation)
    assert naive.tree_rel(others, grads) < 1e-4
    assert more["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert more["target_tokens"] == metrics["target_tokens"]
    for key, stats in metrics["router"].items():
        assert naive.tree_rel(more["router"][key], stats) < 1e-4
        np.testing.assert_allclose(more["router"][key].use_E, stats.use_E)
        np.testing.assert_allclose(more["router"][key].tokens, stats.tokens)


@functools.cache
def routed(accumulation, of=1, first=0, **losses):
    """`computed` with losses on the routers, of every so-manieth row from that one on."""
    trainable, frozen = trees_of_step()
    specs = tuple(s.replace(**losses) if s.gate == "token" else s for s in SPECS)
    objective = make_objective(specs, accumulation=accumulation)
    batch = {key: value[first::of] for key, value in uneven_batch().items()}
    run = jax.jit(functools.partial(gradients, objective))
    return jax.device_get(run(trainable, frozen, batch, jnp.int32(0)))


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_leaves_a_loss_of_all_tokens(accumulation):
    """Micro-batches of one row each included, of which one has no target."""
    grads, metrics = routed(1, z_loss=0.5)
    others, more = routed(accumulation, z_loss=0.5)
    assert metrics["router_loss"] > 0.1
    assert more["router_loss"] == pytest.approx(metrics["router_loss"], rel=1e-5)
    assert naive.tree_rel(others, grads) < 1e-4
    plain, _ = routed(1, z_loss=0.0)
    assert naive.tree_rel(plain, grads) > 1e-3


def test_each_micro_batch_is_balanced_by_itself():
    """And weighed by its tokens, not by its targets."""
    _, metrics = routed(4, balance_loss=0.5)
    tokens = [(uneven_batch()["segment_ids"][i::4] > 0).sum() for i in range(4)]
    alone = [routed(1, 4, i, balance_loss=0.5)[1]["router_loss"] for i in range(4)]
    assert metrics["router_loss"] == pytest.approx(np.average(alone, weights=tokens), rel=1e-5)
    _, whole = routed(1, balance_loss=0.5)
    assert abs(metrics["router_loss"] - whole["router_loss"]) > 1e-4


def test_every_device_has_a_share_of_every_micro_batch():
    """Rows stay where they are: a device makes its part of each from its own rows."""
    spread = batch_sharding(make_mesh({"fsdp": 8}, jax.devices()))
    batch = {"tokens": jax.device_put(np.arange(16 * 4).reshape(16, 4), spread)}
    cut = jax.jit(functools.partial(micro_batches, count=2)).lower(batch).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", cut.as_text())
    made = cut(batch)["tokens"]
    assert {shard.data.shape for shard in made.addressable_shards} == {(2, 1, 4)}
    np.testing.assert_array_equal(made[1, :, 0], np.arange(4, 64, 8))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_term_enters_once(accumulation):
    """The step's gradient with the term, less the one without, is the term's own."""
    with_term, metrics = computed(accumulation)
    without, _ = computed(accumulation, regularisers=())
    trainable, frozen = trees_of_step()
    a = np.asarray(trainable["banks"]["alignment"]["mlp.down"]["lora_a"], np.float64)[0, :, 0]
    k = np.asarray(frozen["banks"]["knowledge"]["mlp.down"]["lora_a"], np.float64)[0, :, 0]
    want = APART.weight * k @ np.sign(a.T @ k).T / 16
    got = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, with_term, without)
    part = got["banks"]["alignment"]["mlp.down"].pop("lora_a")
    assert naive.rel(part[0, :, 0], want) < 1e-4
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(got)) < 1e-5
    assert metrics[f"{APART.name}/gradient_norm"] == pytest.approx(np.linalg.norm(want), rel=1e-4)


def state_of(optimiser, trainable):
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.int32(0), trainable, optimiser.init(trainable))


def test_only_the_trainable_tree_moves():
    trainable, frozen = trees_of_step()
    before = jax.device_get(frozen)
    section = sections.stage(learning_rate=1e-2)
    optimiser = make_optimiser(section, schedule(section, 4))
    run = jax.jit(functools.partial(train_step, make_objective(regularisers=(APART,)), optimiser))
    state, metrics = run(state_of(optimiser, trainable), frozen, uneven_batch())
    assert state.step == 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.trainable):
        old = trainable
        for key in path:
            old = old[key.key]
        assert not np.array_equal(leaf, old), path
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    paths = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert not any("knowledge" in path for path in paths)
    assert metrics["tokens"] == (uneven_batch()["segment_ids"] > 0).sum()


def test_banks_that_draw_b_add_nothing_and_move_a_alone():
    """`init="b"`: the first Adam step is the same whatever order the rows are added up in."""
    mlp = ("mlp.gate", "mlp.up", "mlp.down")
    specs = (
        BankSpec("plain", ("attn.q", "mlp.down"), 0, 1, rank=2, init="b"),
        BankSpec("routed", ("mlp.up",), 0, 1, experts=2, rank=2, gate="token", init="b"),
        BankSpec("inside", mlp, 1, 2, form="ffn_lora", experts=2, gate="token", rank=2, init="b"),
    )
    keys = dict(zip(specs, jax.random.split(jax.random.key(0), 3), strict=True))
    banks = {spec.name: bank_lib.init(spec, CONFIG, key) for spec, key in keys.items()}
    frozen = {"base": naive.random_params(CONFIG), "banks": {}}
    batch = uneven_batch()
    total, _ = nll(AdaptedConfig(CONFIG, specs), {"banks": banks, "base": {}}, frozen, batch)
    bare, _ = nll(AdaptedConfig(CONFIG), {"banks": {}, "base": {}}, frozen, batch)
    assert float(total) == pytest.approx(float(bare), rel=1e-6)

    stage = sections.stage(learning_rate=1e-2, warmup=0.0)
    optimiser = make_optimiser(stage, schedule(stage, 4))
    step = jax.jit(functools.partial(train_step, make_objective(specs), optimiser))
    other = {key: rows[::-1] for key, rows in batch.items()}
    state = state_of(optimiser, {"banks": banks, "base": {}})
    after, again = (step(state, frozen, b)[0].trainable["banks"] for b in (batch, other))
    for name, params in banks.items():
        for site, leaves in params.items():
            if "lora_a" not in leaves:
                continue
            moved = np.asarray(after[name][site]["lora_a"])
            assert np.mean(np.abs(moved) > 0.99e-2) > 0.9, (name, site)
            np.testing.assert_allclose(again[name][site]["lora_a"], moved, atol=1e-5)
            np.testing.assert_array_equal(after[name][site]["lora_b"], leaves["lora_b"])


def test_split_base():
    base = naive.random_params(CONFIG)
    frozen, trained = split_base(base, ("layers.mlp.*", "embed"))
    assert {path for path, _ in trees.flatten(trained)} == {
        "embed",
        "layers.mlp.gate.kernel",
        "layers.mlp.up.kernel",
        "layers.mlp.down.kernel",
    }
    together = dict(trees.flatten(frozen)) | dict(trees.flatten(trained))
    assert together.keys() == dict(trees.flatten(base)).keys()
    assert not dict(trees.flatten(frozen)).keys() & dict(trees.flatten(trained)).keys()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert split_base(half, ("embed",))[1]["embed"].dtype == jnp.float32
    assert set(split_base(base, ("*",))[0]) == {"layers"}
    with pytest.raises(UserError, match="train_base: 'mlp' matches none of embed, final_norm"):
        split_base(base, ("embed", "mlp"))


def test_dropout_follows_step_micro_batch_and_seed():
    specs = tuple(spec.replace(dropout=0.4) for spec in SPECS)
    trainable, frozen = trees_of_step()
    row = {k: np.repeat(v[1:2], 2, axis=0) for k, v in uneven_batch().items()}
    run = jax.jit(gradients, static_argnums=0)

    def loss(step, seed=0, accumulation=2):
        objective = make_objective(specs, seed=seed, accumulation=accumulation)
        return float(run(objective, trainable, frozen, row, jnp.int32(step))[1]["loss"])

    assert loss(3) == loss(3)
    assert len({loss(3), loss(4), loss(3, seed=1), loss(3, accumulation=1)}) == 4
    objective = make_objective(specs)
    single = {k: v[:1] for k, v in row.items()}
    one = jax.jit(nll, static_argnums=0)
    step_key = jax.random.fold_in(jax.random.key(0), 3)
    parts = [
        float(one(objective.model, trainable, frozen, single, jax.random.fold_in(step_key, i))[0])
        for i in range(2)
    ]
    assert abs(parts[0] - parts[1]) > 1e-3
    assert loss(3) == pytest.approx(sum(parts) / targets(row).sum(), rel=1e-5)


def test_rematerialised_dropout_is_the_same():
    specs = tuple(spec.replace(dropout=0.4) for spec in SPECS)
    trainable, frozen = trees_of_step()
    results = []
    for remat in ("none", "full"):
        objective = make_objective(specs, Execution(remat=remat))
        run = jax.jit(functools.partial(gradients, objective))
        results.append(jax.device_get(run(trainable, frozen, uneven_batch(), jnp.int32(1))))
    assert naive.tree_rel(results[1][0], results[0][0]) < 1e-4


def test_schedule():
    section = sections.stage(learning_rate=2.0, warmup=0.25, final_learning_rate=0.1)
    rate = schedule(section, 12)
    want = []
    for step in range(12):
        if step < 3:
            want.append(2.0 * (step + 1) / 3)
        else:
            cosine = (1 + math.cos(math.pi * (step - 3) / 9)) / 2
            want.append(2.0 * (0.1 + 0.9 * cosine))
    np.testing.assert_allclose([float(rate(i)) for i in range(12)], want, rtol=1e-6)
    assert float(rate(12)) == pytest.approx(0.2)
    assert float(schedule(sections.stage(warmup=0.0), 5)(0)) == pytest.approx(2e-4)


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_updates_are_clipped_adamw(clip):
    """Five updates against numpy, given the gradients."""
    fields = {"learning_rate": 0.01, "warmup": 0.4, "weight_decay": 0.1, "b2": 0.99, "eps": 1e-6}
    section = sections.stage(clip=clip, **fields)
    optimiser = make_optimiser(section, schedule(section, 5))
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    state = jax.tree.map(jnp.float32, params)
    moments = optimiser.init(state)
    update = jax.jit(optimiser.update)
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t in range(1, 6):
        g = {k: rng.standard_normal(x.shape) * t for k, x in params.items()}
        steps, moments = update(jax.tree.map(jnp.float32, g), moments, state)
        state = jax.tree.map(jnp.add, state, steps)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        factor = min(1.0, clip / norm) if clip else 1.0
        lr = 0.01 * (t / 2 if t <= 2 else (1 + math.cos(math.pi * (t - 3) / 3)) / 2)
        for k in params:
            m[k] = 0.9 * m[k] + 0.1 * factor * g[k]
            v[k] = 0.99 * v[k] + 0.01 * (factor * g[k]) ** 2
            step = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.99**t)) + 1e-6)
            params[k] = params[k] - lr * (step + 0.1 * params[k])
    for k in params:
        np.testing.assert_allclose(state[k], params[k], rtol=1e-4, atol=1e-6)


def two_steps(sizes, devices):
    """Trainable tree and losses after two steps on a mesh, everything in its shards."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **sizes}, devices)
    execution = Execution(activations=batch_sharding(mesh, 3))
    specs = tuple(spec.replace(dropout=0.2) for spec in SPECS)
    objective = make_objective(specs, execution, regularisers=(APART,), accumulation=1)
    # No division by the square of a gradient: rounding near zero would be blown up.
    section = sections.stage(eps=1e-2, clip=0.0)
    optimiser = make_optimiser(section, schedule(section, 4))
    trainable, frozen = trees_of_step()
    trainable = jax.tree.map(
        lambda x, s: jax.device_put(np.array(x), s), trainable, shardings(trainable, mesh, RULES)
    )
    frozen = jax.device_put(jax.device_get(frozen), shardings(frozen, mesh, RULES))
    placed = state_shardings(jax.eval_shape(optimiser.init, trainable), mesh, RULES)
    moments = jax.jit(optimiser.init, out_shardings=placed)(trainable)
    batch = jax.device_put(uneven_batch(), batch_sharding(mesh))
    run = jax.jit(functools.partial(train_step, objective, optimiser))
    first, metrics = run(TrainState(jnp.int32(0), trainable, moments), frozen, batch)
    second, later = run(first, frozen, batch)
    # After one step from nothing, AdamW's first moment is a tenth of the gradient.
    moment = optax.tree_utils.tree_get(first.optimiser, "mu")
    losses = [float(one["loss"]) for one in (metrics, later)]
    return jax.device_get((moment, second.trainable)), losses


@functools.cache
def one_device():
    return two_steps({}, jax.devices()[:1])


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
    ],
    ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_meshes_agree(sizes):
    """Dropout included: its masks are drawn over the global shape."""
    (grads, after), losses = one_device()
    (other_grads, other_after), other_losses = two_steps(sizes, jax.devices())
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    assert losses[0] != losses[1]
    assert naive.tree_rel(other_grads, grads) < 1e-4
    assert naive.tree_rel(other_after, after) < 1e-4


def test_the_hash_of_rows_sees_every_token_and_mask_but_not_the_rows_order():
    draw = np.random.default_rng(0)
    names = ("tokens", "loss_mask", "segment_ids")
    batch = {name: draw.integers(0, 3, (4, 8)).astype(np.int32) for name in names}
    value = jax.jit(rows_hash)
    whole = int(value(batch))
    assert int(value({name: array[[2, 0, 3, 1]] for name, array in batch.items()})) == whole
    for name in names:
        for row, column in np.ndindex(4, 8):
            other = {key: array.copy() for key, array in batch.items()}
            other[name][row, column] += 1
            assert int(value(other)) != whole
            other[name][row] = np.roll(batch[name][row], column)
            moved = (other[name][row] != batch[name][row]).any()
            assert (int(value(other)) != whole) == moved
