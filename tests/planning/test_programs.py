"""The programs' shapes against those of a real run, and what cannot be planned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import apollo_moe, medcare
from medmoe_jax.base import trees
from medmoe_jax.base.presets import preset
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.topology import CHIPS, Topology
from medmoe_jax.planning import programs
from medmoe_jax.planning.programs import open_abstract, start
from medmoe_jax.training import transitions
from medmoe_jax.training.optimiser import make_optimiser, schedule
from medmoe_jax.training.parts import first_state, split
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.stage import chain
from tests import tiny

HERE = Topology("here", CHIPS["v5e"], tuple(jax.devices()))


def kinds(tree):
    """`{path: (shape, dtype, spec)}`, on however many dimensions the spec says something."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", ["aggregate", "align"])
def test_a_step_is_planned_in_the_shapes_that_a_run_has(name):
    setup = open_setup(tiny.medcare_config())
    abstract = open_abstract(setup.config, HERE)
    at = start(abstract, name)
    state, frozen, batch = programs.training(abstract, at).arguments

    roster, banks, base = {}, {}, setup.load_base()
    for real in chain(setup.stages, name):
        roster, banks, base = transitions.start(
            real, roster, banks, base, setup.base.config, setup.shardings
        )
    assert at.roster == roster
    optimiser = make_optimiser(real.config, schedule(real.config, tiny.STEPS))
    frozen_now, trainable = split(real, roster, banks, base)
    want_state, want_frozen = first_state(setup, optimiser, trainable, frozen_now)
    assert kinds(state) == kinds(want_state)
    assert kinds(frozen) == kinds(want_frozen)
    rows = setup.config.data.global_batch
    assert {name: leaf.shape for name, leaf in batch.items()} == dict.fromkeys(
        ("tokens", "loss_mask", "segment_ids", "positions"), (rows, setup.config.data.length)
    )


def published(base="qwen2-0.5b", module=medcare):
    """A published recipe, of which nothing is on disk."""
    config = module.get_config(base)
    config.data.global_batch, config.run.accumulation = 8, 1
    return config


def test_a_published_base_needs_no_files():
    config = published()
    setup = open_abstract(config, HERE)
    assert setup.base.config == preset("qwen2-0.5b")
    at = start(setup, "align")
    assert {n: s for n, (_, s) in at.roster.items()} == {
        "attention": "merged", "knowledge": "frozen", "alignment": "train",
    }  # fmt: skip
    assert set(at.trainable["banks"]) == {"alignment"}
    config.base.quantise = "int8"
    base = open_abstract(config, HERE).base.abstract(jnp.bfloat16)
    assert base["layers"]["mlp"]["up"]["kernel"].codes.dtype == jnp.int8


def test_bytes_of_a_device():
    setup = open_abstract(published(), HERE)
    at = start(setup, "aggregate")
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(at.base))
    assert programs.bytes_of(at.base) == pytest.approx(whole / 8, rel=0.01)  # norms are everywhere


def test_experts_of_languages_and_a_base_that_trains():
    setup = open_abstract(published(module=apollo_moe), HERE)
    at = start(setup, "mixture")
    _, _, batch = programs.training(setup, at).arguments
    assert "language_ids" in batch
    assert dict(trees.flatten(at.trainable["base"])).keys() == dict(trees.flatten(at.base)).keys()


def test_answering_programs_hold_whole_rows():
    setup = open_abstract(published(), HERE)
    at = start(setup, "aggregate")
    score, generate = programs.scoring(setup, at), programs.decoding(setup, at)
    assert (score.rows, generate.rows, generate.turns) == (16, 16, programs.NEW_TOKENS)
    assert score.turns == 28  # 6,144 tokens of a device, by 220: no more logits exist at once
    rows = [x for x in jax.tree.leaves(score.arguments) if x.shape[:1] == (16,)]
    # Trees, and the expert of each row's language, as the engine has them.
    assert {x.shape for x in rows} == {(16, setup.config.data.length), (16, 1)}
    assert all(x.sharding.shard_shape(x.shape)[0] == 2 for x in rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages.order": ()}, "stages.order is empty"),
        ({"data.length": 0}, "data.length: 0 is below 1"),
        ({"data.global_batch": 12}, "data.global_batch: 12 rows do not divide over 8 devices"),
        ({"run.mesh.data": 3}, "run.mesh"),
        ({"run.mesh.tensor": 8}, "run.mesh.tensor: 8 does not divide the 14 attention heads"),
        ({"run.mesh.sequence": 3}, "run.mesh"),
        (
            {"data.length": 1028, "run.mesh.sequence": 8},
            "run.mesh.sequence: 8 does not divide the 1028 tokens of a row (data.length)",
        ),
        ({"base.path": ""}, "base: give either base.path"),
        ({"base.preset": "qwen2-0.5b"}, "base: give either base.path"),
        ({"base.dtype": "float16"}, "base.dtype: 'float16' is none of float32, bfloat16"),
        ({"base.quantise": "int3"}, "base.quantise: 'int3' is none of int8, nf4"),
        ({"run.accumulation": 0}, "run.accumulation: 0 is below 1"),
        ({"run.remat": "some"}, "run.remat: 'some' is none of"),
        ({"run.attention": "cudnn"}, "run.attention: 'cudnn' cannot run this: it needs NVIDIA"),
    ],
)
def test_what_cannot_be_planned(fields, message):
    config = published()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as caught:
        open_abstract(config, HERE)
    assert message in str(caught.value)


def test_an_unknown_stage_is_named():
    with pytest.raises(UserError, match="stage: 'algin' is none of aggregate, align"):
        start(open_abstract(published(), HERE), "algin")


def test_a_stage_of_epochs_is_planned_without_its_data():
    setup = open_abstract(published(), HERE)
    assert not setup.config.stages.aggregate.steps
    state = programs.training(setup, start(setup, "aggregate")).arguments[0]
    assert np.prod(state.step.shape) == 1
