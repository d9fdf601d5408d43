"""The adapted decoder as an NNX module: what it is told, and whom gradient and optimiser see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medmoe_jax.adapters import foreign, lifecycle, nnx_models
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig, AdaptedDecoder, hidden
from medmoe_jax.adapters.router_loss import router_loss
from medmoe_jax.base import decoder
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from medmoe_jax.base.module import Decoder
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import UserError
from medmoe_jax.routing.telemetry import collect
from tests import naive
from tests.adapters.conftest import SPECS
from tests.naive import TINY, rel, tree_rel

# One of each gate keeps the compilation short.
SOME = (SPECS[0], SPECS[4])


@pytest.fixture(scope="module")
def trained(base, banks, batch):
    """The module before and after two steps of descent on the squared logits."""
    ids = tuple(batch[k] for k in ("tokens", "segment_ids", "positions"))
    banks = {s.name: banks[s.name] for s in SOME}
    model = AdaptedDecoder(AdaptedConfig(TINY, SOME), base, banks)
    optimiser = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser):
        def loss(model):
            z = model(*ids)
            return (z**2).mean(), z

        (value, z), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimiser.update(model, grads)
        return value, z, grads

    return model, [step(model, optimiser) for _ in range(2)], banks


def test_logits(trained, base, batch):
    _, ((_, z, _), _), banks = trained
    real = batch["segment_ids"] > 0
    want = naive.logits(TINY, base, batch, naive.adapted(SOME, banks))
    assert rel(z[real], want[real]) < 1e-5


def test_gradient_and_update_are_the_banks(trained, base):
    model, ((first, _, grads), (second, _, later)), banks = trained
    grads, later = nnx.to_pure_dict(grads), nnx.to_pure_dict(later)
    assert set(grads) == {"banks"}
    assert jax.tree.structure(grads["banks"]) == jax.tree.structure(banks)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    want = jax.tree.map(lambda p, *g: p - 1e-2 * (g[0] + g[1]), banks, grads["banks"],
                        later["banks"])  # fmt: skip
    assert tree_rel(nnx.to_pure_dict(nnx.state(model, nnx.Param))["banks"], want) < 1e-5
    assert second < first
    kept = nnx.to_pure_dict(nnx.state(model))["base"]
    assert tree_rel(kept, base) == 0


LANGUAGES = BankSpec(
    "languages", ("mlp.up",), 1, 3, experts=5, rank=2, gate="language", dropout=0.4,
    router_noise=0.5, balance_loss=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def told(base, batch):
    """A module whose bank needs to be told, its ids, and what it computes in a context."""
    banks = naive.random_banks((LANGUAGES,), TINY)
    ids = tuple(jnp.asarray(batch[k]) for k in ("tokens", "segment_ids", "positions"))
    config = AdaptedConfig(TINY, (LANGUAGES,))

    def want(context):
        x, _, stats = hidden(config, base, banks, *ids, context=context)
        return logits(TINY, decoder.head(base), x), collect(stats)

    return AdaptedDecoder(config, base, banks), ids, want


@pytest.mark.parametrize("languages", [(2, 1), (2,), ()], ids=["rows and tokens", "rows", "none"])
def test_what_gates_and_dropout_need_is_told(told, languages):
    model, ids, want = told
    each = None if not languages else jnp.asarray([3, 0]).reshape(languages)
    everywhere = None if each is None else jnp.broadcast_to(each.reshape(2, 1), ids[0].shape)
    context = Context(None, None, each, jax.random.key(4), training=True)

    @nnx.jit
    def run(model):
        with foreign.given(context):
            return nnx.capture(model, nnx_models.RouterStatistics)(*ids)

    z, seen = run(model)
    want_z, want_stats = want(context._replace(language_ids_BxT=everywhere))
    assert rel(z, want_z) < 1e-5 and tree_rel(foreign.statistics(seen), want_stats) < 1e-5
    assert (want_stats["languages/mlp.up"].forced > 0).all() == bool(languages)
    alone = model(*ids)
    assert rel(alone, want(Context())[0]) < 1e-5 and rel(alone, want_z) > 0.1
    assert not jax.tree.leaves(nnx.state(model, nnx_models.RouterStatistics))


def test_router_losses_of_a_capture_reach_the_router(told):
    model, ids, want = told

    def loss(model):
        _, seen = nnx.capture(model, nnx_models.RouterStatistics)(*ids)
        return router_loss((LANGUAGES,), foreign.statistics(seen))

    value, grads = nnx.value_and_grad(loss)(model)
    assert rel(value, router_loss((LANGUAGES,), want(Context())[1])) < 1e-5
    assert np.any(grads["banks"]["languages"]["mlp.up"]["router"]["kernel"].get_value())


def test_what_does_not_fit_the_tokens_is_named(told):
    model, ids, _ = told
    message = r"language_ids_BxT is \(3,\), but the decoder sees tokens \(2, 7\)"
    misfit = Context(language_ids_BxT=np.zeros(3, int))
    with foreign.given(misfit), pytest.raises(UserError, match=message):
        model(*ids)


@pytest.mark.parametrize("state", ["frozen", "gate"])
def test_banks_that_are_frozen_do_not_train(base, banks, batch, state):
    ids = tuple(batch[k] for k in ("tokens", "segment_ids", "positions"))
    banks = {s.name: banks[s.name] for s in SOME}
    routed = next(s for s in SOME if s.routed)
    roster = lifecycle.set_state({s.name: (s, "train") for s in SOME}, routed.name, state)
    frozen, trained = lifecycle.split(roster, banks)
    model = AdaptedDecoder(AdaptedConfig(TINY, SOME), base, trained, frozen)
    assert rel(model(*ids), AdaptedDecoder(AdaptedConfig(TINY, SOME), base, banks)(*ids)) == 0
    grads = nnx.to_pure_dict(nnx.grad(lambda model: (model(*ids) ** 2).mean())(model))
    assert set(grads) == {"banks"}
    assert jax.tree.structure(grads["banks"]) == jax.tree.structure(trained)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((0, 5), (0, 5), (0, 5)), r"tokens_BxT: int32 \(0, 5\); give whole numbers \[rows, tok"),
        (((2, 0), (2, 0), (2, 0)), r"tokens_BxT: int32 \(2, 0\)"),
        (((5,), (5,), (5,)), r"tokens_BxT: int32 \(5,\)"),
        (((2, 5), (2, 4), (2, 5)), r"segment_ids_BxT: int32 \(2, 4\)"),
        (((2, 5), (2, 5), (5,)), r"positions_BxT: int32 \(5,\); .* one shape"),
    ],
)
def test_inputs_that_are_no_rows_of_tokens(base, banks, shapes, message):
    model = AdaptedDecoder(AdaptedConfig(TINY, SOME), base, {s.name: banks[s.name] for s in SOME})
    with pytest.raises(ValueError, match=message):
        model(*(np.zeros(shape, np.int32) for shape in shapes))
    with pytest.raises(ValueError, match=r"tokens_BxT: float32 \(2, 5\)"):
        model(*(np.zeros((2, 5), np.float32) for _ in range(3)))
    bare = Decoder(TINY, base)
    with pytest.raises(ValueError, match=message):
        bare(*(np.zeros(shape, np.int32) for shape in shapes))
    with pytest.raises(ValueError, match=r"tokens_BxT: int32 \(5,\)"):
        bare(np.zeros(5, np.int32))


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("float16"), "int8", "fast"])
def test_a_dtype_that_nothing_runs_in(dtype):
    with pytest.raises(ValueError, match=r"dtype: .*(float16|int8|fast).* is none of float32"):
        Execution(dtype=dtype)
    for known in (jnp.float32, "float32", np.dtype("float32"), jnp.bfloat16, "bfloat16"):
        assert Execution(dtype=known).dtype == known
