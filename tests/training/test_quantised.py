"""A recipe on a quantised base: training, the merge that waits, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.base import quantised
from medmoe_jax.base.quantised import Quantised
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.errors import UserError
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from medmoe_jax.training.trained import Trained, open_trained
from tests import naive, tiny
from tests.training.test_run import BATCH, run_logits

pytestmark = pytest.mark.slow


def config_of(kind="nf4"):
    config = tiny.medcare_config()
    config.base.quantise = kind
    for stage in config.stages.order:
        config.stages[stage].steps = 3
    config.stages.aggregate.banks.attention.dropout = 0.25
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    setup = open_setup(config_of())
    workdir = tmp_path_factory.mktemp("quantised")
    train(Run(setup, workdir))
    return setup, workdir


def test_a_merged_bank_stays_beside_the_base(done):
    setup, workdir = done
    last = open_trained(Run(setup, workdir), "align")
    spec, state = last.roster["attention"]
    assert (state, spec.dropout) == ("frozen", 0.0)
    manifest = Manifest.read(StageFolder.of(workdir, "align").manifest)
    assert {"op": "merge", "bank": "attention"} in manifest.operations
    assert manifest.banks["attention"].state == "frozen"
    loaded = setup.load_base()
    assert isinstance(last.base["layers"]["attn"]["q"]["kernel"], Quantised)
    jax.tree.map(np.testing.assert_array_equal, last.base, loaded)
    first = open_trained(Run(setup, workdir), "aggregate").banks
    jax.tree.map(np.testing.assert_array_equal, last.banks["attention"], first["attention"])
    assert np.abs(first["attention"]["attn.q"]["lora_b"]).max() > 1e-3


def test_the_model_is_the_one_whose_banks_fold(done):
    """With banks at large random values, and no bank to spare."""
    setup, workdir = done
    roster = open_trained(Run(setup, workdir), "align").roster
    specs = [spec for spec, _ in roster.values()]
    assert {spec.name for spec in specs} == {"attention", "knowledge", "alignment"}
    base, banks = setup.load_base(), naive.random_banks(specs, setup.base.config)
    staged = Trained("", roster, banks, base)
    got = run_logits(setup, staged)[..., :300]
    values = jax.jit(lambda x: quantised.dequantise(x, jnp.float32))(base)
    config = setup.base.config

    def twin(members):
        return naive.logits(config, values, BATCH, naive.adapted(members, banks))[..., :300]

    assert naive.rel(got, twin(specs)) < 1e-5
    folded = Trained("", {}, {}, lifecycle.fold(roster, banks, base))
    assert naive.rel(run_logits(setup, folded)[..., :300], got) < 1e-5
    for left_out in specs:
        assert naive.rel(twin([s for s in specs if s != left_out]), got) > 0.1


def test_another_base_dtype_is_another_base(done):
    _, workdir = done
    with pytest.raises(UserError, match=r"base\.quantise: 'nf4' then, 'int8' now"):
        train(Run(open_setup(config_of("int8")), workdir))
    with pytest.raises(UserError, match=r"trained on another base.* base\.quantise"):
        open_trained(Run(open_setup(config_of("")), workdir), "align")


def test_quantised_leaves_cannot_be_trained():
    config = config_of("int8")
    config.stages.align.train_base = ("final_norm", "layers.mlp_norm", "embed")
    open_setup(config)
    config.stages.align.train_base = ("layers.mlp*",)
    with pytest.raises(UserError, match=r"stages\.align\.train_base: layers\.mlp\.down\.kernel, "):
        open_setup(config)
    config.base.quantise = ""
    open_setup(config)
    config.base.quantise = "int3"
    with pytest.raises(UserError, match=r"base\.quantise: 'int3' is none of int8, nf4"):
        open_setup(config)
