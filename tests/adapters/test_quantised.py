"""Banks on a quantised base: values, gradients, devices, merging and folding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import bank, lifecycle, model
from medmoe_jax.adapters.model import AdaptedConfig, AdaptedDecoder
from medmoe_jax.base import decoder, quantised
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import RULES, shardings
from tests import naive
from tests.adapters.conftest import SPECS
from tests.adapters.test_model import adapted_nll
from tests.naive import rel, tree_rel

KINDS = sorted(quantised.KINDS)
CONFIG = naive.TINY.replace(d_ff=150, n_layers=2)
# On all layers and on the upper one.
BANKS = (SPECS[0].replace(stop=2), SPECS[2].replace(start=1, stop=2))
BANK_VALUES = naive.random_banks(BANKS, CONFIG)
BATCH = naive.random_batch(CONFIG, rows=((4, 2), (5,), (3,), (6,)) * 2, length=6, seed=4)
REAL = BATCH["segment_ids"] > 0


@functools.cache
def base_of(kind):
    """The quantised base, and the floats it stands for."""
    base = jax.jit(functools.partial(quantised.quantise, kind=kind))(naive.random_params(CONFIG))
    return base, jax.jit(lambda x: quantised.dequantise(x, jnp.float32))(base)


def run(base, specs, banks):
    @jax.jit
    def forward(base, banks):
        ids = (BATCH[k] for k in ("tokens", "segment_ids", "positions"))
        x, _, _ = model.hidden(AdaptedConfig(CONFIG, specs), base, banks, *ids)
        return logits(CONFIG, decoder.head(base), x)

    return np.asarray(forward(base, banks))[REAL]


def gradient(base, execution=Execution()):
    loss = functools.partial(adapted_nll, AdaptedConfig(CONFIG, BANKS, execution))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, _), grads = step(BANK_VALUES, base, BATCH)
    return total, grads


@functools.cache
def float_gradient(kind):
    return gradient(base_of(kind)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_values(kind):
    base, values = base_of(kind)
    got = run(base, BANKS, BANK_VALUES)
    want = naive.logits(CONFIG, values, BATCH, naive.adapted(BANKS, BANK_VALUES))[REAL]
    assert rel(got, want) < 1e-5
    # A base left as it was would be seen.
    plain = naive.random_params(CONFIG)
    unquantised = naive.logits(CONFIG, plain, BATCH, naive.adapted(BANKS, BANK_VALUES))
    assert rel(unquantised[REAL], want) > 1e-3


@pytest.mark.parametrize(("kind", "remat"), [("int8", "none"), ("nf4", "none"), ("nf4", "dots")])
def test_gradient_is_that_of_the_values(kind, remat):
    total, grads = gradient(base_of(kind)[0], Execution(remat=remat))
    want_total, want = float_gradient(kind)
    assert abs(total / want_total - 1) < 1e-5
    assert tree_rel(grads, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices(kind):
    """Codes and scales sharded over their rows and columns."""
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})
    base = base_of(kind)[0]
    base = jax.device_put(base, shardings(base, mesh, RULES))
    down = base["layers"]["mlp"]["down"]["kernel"].codes
    assert down.addressable_shards[0].data.shape[1:] == (down.shape[1] // 2, 4)
    execution = Execution(remat="full", activations=batch_sharding(mesh, 3))
    total, grads = gradient(base, execution)
    want_total, want = float_gradient(kind)
    assert len(total.sharding.device_set) == 8
    assert abs(total / want_total - 1) < 1e-5
    assert tree_rel(grads, want) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_merge_means_freeze_and_folds_later(kind):
    base, values = base_of(kind)
    roster = {s.name: (s.replace(dropout=0.5), "train") for s in BANKS}
    after, merged = lifecycle.merge(roster, BANK_VALUES, base, "attention")
    assert merged is base
    assert after["attention"] == (BANKS[0].replace(dropout=0.0), "frozen")
    assert after["knowledge"] == roster["knowledge"]
    want = naive.logits(CONFIG, values, BATCH, naive.adapted(BANKS, BANK_VALUES))[REAL]
    frozen = run(merged, lifecycle.active_banks(after), BANK_VALUES)
    assert rel(frozen, want) < 1e-5
    folded = lifecycle.fold(after, BANK_VALUES, merged)
    assert folded["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    assert rel(run(folded, (), {}), want) < 1e-5
    for left_out in BANKS:
        rest = naive.adapted([s for s in BANKS if s != left_out], BANK_VALUES)
        assert rel(naive.logits(CONFIG, values, BATCH, rest)[REAL], want) > 0.1


def test_an_nnx_module_on_a_quantised_base():
    base, values = base_of("nf4")
    ids = [BATCH[k] for k in ("tokens", "segment_ids", "positions")]
    config = AdaptedConfig(CONFIG, BANKS)
    got = AdaptedDecoder(config, base, BANK_VALUES)(*ids)
    assert rel(np.asarray(got)[REAL], run(values, BANKS, BANK_VALUES)) < 1e-5


def test_parameters_are_counted_as_weights():
    base, values = base_of("nf4")
    assert (
        bank.count({"base": base})
        == bank.count(values)
        == sum(leaf.size for leaf in jax.tree.leaves(values))
    )


def test_whole_experts_start_from_the_values():
    base, values = base_of("nf4")
    spec = bank.BankSpec(
        "whole", ("mlp.gate", "mlp.up", "mlp.down"), 1, 2, form="ffn", experts=3, gate="token"
    )
    got = bank.init(spec, CONFIG, jax.random.key(0), base)
    want = bank.init(spec, CONFIG, jax.random.key(0), values)
    jax.tree.map(np.testing.assert_array_equal, got, want)
