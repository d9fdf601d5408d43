"""Banks trained one by one become one bank whose gate alone trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.lifecycle import active_banks
from medmoe_jax.adapters.model import AdaptedConfig, hidden
from medmoe_jax.base import trees
from medmoe_jax.errors import UserError
from medmoe_jax.training import recipe as recipe_lib
from medmoe_jax.training import transitions
from medmoe_jax.training.config import bank, recipe, sparsity, stacked, stage
from medmoe_jax.training.parts import split
from medmoe_jax.training.step import Objective, gradients, nll
from tests import naive
from tests.naive import rel

SKILL = {"sites": ("attn.q", "mlp.down"), "learned_scale": True}


def config_of(**gate):
    config = recipe()
    config.data.sources = ConfigDict({"rows": {}})
    common = {"mixture": {"rows": 1.0}, "steps": 4}
    config.stages.order = ("one", "two", "route")
    config.stages.one = stage(banks={"one": bank(rank=2, alpha=3.0, **SKILL)}, **common)
    config.stages.two = stage(
        after="one",
        states={"one": "off"},
        banks={"two": bank(rank=3, alpha=2.0, **SKILL)},
        **common,
    )
    config.stages.route = stage(
        after="two", stack={"skills": stacked(("one", "two"), **gate)}, **common
    )
    return config


@functools.cache
def members():
    """The two skills at random values, with the base."""
    stages = recipe_lib.parse(config_of(), naive.TINY)
    specs = [stage.added[0] for stage in stages[:2]]
    return naive.random_banks(specs, naive.TINY), naive.random_params(naive.TINY)


def started(**gate):
    """`(stage, roster, banks, base)` at the start of `route`."""
    stages = recipe_lib.parse(config_of(**gate), naive.TINY)
    banks, base = members()
    roster = {}
    for s in stages[:2]:
        roster = transitions.next_roster(s, roster)
    return stages[2], *transitions.start(stages[2], roster, banks, base, naive.TINY)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    ids = jnp.ones((2, 6), jnp.int32)
    return {
        "tokens": jnp.asarray(rng.integers(0, naive.TINY.vocab_size, (2, 6)), jnp.int32),
        "loss_mask": ids,
        "segment_ids": ids,
        "positions": jnp.tile(jnp.arange(6, dtype=jnp.int32)[None], (2, 1)),
    }


def forward(specs, banks, base):
    b = batch()
    config = AdaptedConfig(naive.TINY, specs)
    args = (b["tokens"], b["segment_ids"], b["positions"])
    return hidden(config, base, banks, *args)[0]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_a_mixture_of_skills_is_the_weighted_sum_of_their_deltas(per_layer, softmax):
    _, roster, banks, base = started(mix_per_layer=per_layer, mix_softmax=softmax)
    spec, state = roster["skills"]
    assert list(roster) == ["skills"] and state == "gate" and spec.experts == 2
    weight_NxE = jnp.asarray([[1.4, -0.7], [0.2, 0.9], [-1.1, 0.4]][: 3 if per_layer else 1])
    assert banks["skills"]["mix"]["weight"].shape == weight_NxE.shape
    banks["skills"]["mix"]["weight"] = weight_NxE
    mix_NxE = np.asarray(weight_NxE, np.float64)
    if softmax:
        mix_NxE = np.exp(mix_NxE) / np.exp(mix_NxE).sum(1, keepdims=True)
    mix_LxE = np.broadcast_to(mix_NxE, (3, 2))

    want = base
    alone, _ = members()
    for site in SKILL["sites"]:
        kernel = np.asarray(trees.get(base, f"layers.{site}.kernel"), np.float64)
        for e, (name, s) in enumerate((("one", 3.0 / 2), ("two", 2.0 / 3))):
            p = naive.f64(alone[name][site])
            delta = np.einsum("lder,ler,lero->ldo", p["lora_a"], p["scale"], p["lora_b"])
            kernel = kernel + s * mix_LxE[:, e, None, None] * delta
        changed = [(f"layers.{site}.kernel", jnp.asarray(kernel, jnp.float32))]
        want = trees.overlay(want, trees.unflatten(changed))
    want, bare = (forward((), {}, tree) for tree in (want, base))
    got = forward(active_banks(roster), banks, base)
    assert rel(got, want) < 1e-5 and rel(bare, want) > 0.1
    assert rel(forward((), {}, lifecycle.fold(roster, banks, base)), want) < 1e-5


@pytest.mark.slow
def test_only_the_gate_trains():
    stage, roster, banks, base = started()
    banks["skills"]["mix"]["weight"] = jnp.asarray([[0.8, -0.5]])
    frozen, trainable = split(stage, roster, banks, base)
    assert [path for path, _ in trees.flatten(trainable)] == ["banks.skills.mix.weight"]
    assert trees.overlay(frozen["banks"], trainable["banks"]).keys() == banks.keys()
    objective = Objective(
        AdaptedConfig(naive.TINY, active_banks(roster)),
        regularisers=(recipe_lib.REGULARISERS["sparsity"]("skills", weight=0.3),),
        specs=active_banks(roster),
    )
    grads, metrics = gradients(objective, trainable, frozen, batch(), jnp.int32(0))
    assert rel(metrics["sparsity/skills"], 0.65) < 1e-6

    @jax.jit
    def loss(weight_1xE):
        one = {"banks": {"skills": {"mix": {"weight": weight_1xE}}}, "base": {}}
        total, (count, _) = nll(objective.model, one, frozen, batch())
        return total / count + 0.3 * jnp.mean(jnp.abs(weight_1xE))

    here, step = banks["skills"]["mix"]["weight"], 1e-2
    got = grads["banks"]["skills"]["mix"]["weight"]
    for e in range(2):
        move = jnp.zeros((1, 2)).at[0, e].set(step)
        slope = (loss(here + move) - loss(here - move)) / (2 * step)
        assert abs(slope - got[0, e]) < 2e-3 * max(1.0, abs(float(slope)))
        assert abs(slope) > 0.02


def test_a_token_router_over_skills_has_fresh_routers():
    stage, roster, banks, base = started(gate="token", top_k=1)
    frozen, trainable = split(stage, roster, banks, base)
    leaves = dict(trees.flatten(trainable["banks"]["skills"]["attn.q"]))
    assert set(leaves) == {"router.kernel", "router.bias"}
    assert leaves["router.kernel"].shape == (3, naive.TINY.d_model, 2)
    assert np.abs(leaves["router.kernel"]).max() > 0
    assert "router" not in frozen["banks"]["skills"]["attn.q"]


REFUSED = {
    "unknown": ({"stack": {"s": stacked(("one", "ghost"))}}, "there is no bank 'ghost'"),
    "empty": ({"stack": {"s": stacked(())}}, "stack 's': `of` names no bank"),
    "taken": ({"stack": {"two": stacked(("one",))}}, "bank 'two' is there already"),
    "no_gate": ({"states": {"two": "gate"}}, "bank 'two' has no gate to train"),
    "sparsity": ({"losses": {"l": sparsity("two")}}, "bank 'two' has gate 'always', not 'skill'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    fields, message = REFUSED[name]
    config = config_of()
    config.stages.route = stage(after="two", mixture={"rows": 1.0}, steps=2, **fields)
    with pytest.raises(UserError, match=r"stages\.route.*" + message):
        recipe_lib.parse(config, naive.TINY)
