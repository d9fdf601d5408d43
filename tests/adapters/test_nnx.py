"""The adapted decoder as an NNX module: gradient and optimiser see the banks only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medmoe_jax.adapters.model import AdaptedConfig, AdaptedDecoder
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.module import Decoder
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
