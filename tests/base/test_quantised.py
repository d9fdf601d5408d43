"""Quantised kernels against loops in float64: values, bounds, bytes, and the product's gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from medmoe_jax.base import decoder, quantised, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.errors import UserError
from tests.naive import rel

L, D, O = 2, 150, 5  # two blocks of 64 rows and a rest of 22
KINDS = sorted(quantised.KINDS)
CONFIG = DecoderConfig(
    vocab_size=8, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128,
    qkv_bias=True, qk_norm=True, post_norms=True,
)  # fmt: skip


def nf4_by_definition():
    """QLoRA's values: eight quantiles of the normal above zero, seven below, and zero."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    return np.sort(np.concatenate([above, below, [0.0]])) / above.max()


def by_hand(kind, kernel_LxDxO):
    """Each weight's nearest representable value, one channel and block at a time."""
    out = np.zeros(kernel_LxDxO.shape)
    block = {"int8": D, "nf4": 64}[kind]
    levels = {"int8": np.arange(-127, 128) / 127, "nf4": np.array(quantised.NF4)}[kind]
    for layer in range(L):
        for column in range(O):
            for first in range(0, D, block):
                w = kernel_LxDxO[layer, first : first + block, column].astype(np.float64)
                grid = levels * np.abs(w).max()
                nearest = np.abs(w[:, None] - grid[None]).argmin(1)
                out[layer, first : first + block, column] = grid[nearest]
    return out


def random_kernel(dtype=np.float32):
    """Channels of unequal size, and one block of zeros."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(L, D, O)) * 4.0 ** np.arange(O)
    kernel[1, :64, 2] = 0
    return kernel.astype(dtype)


def test_nf4_has_the_published_values():
    np.testing.assert_allclose(quantised.NF4, nf4_by_definition(), atol=2e-7)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_at_its_nearest_value(kind, dtype):
    kernel = random_kernel(dtype)
    leaf = jax.jit(quantised.KINDS[kind])(kernel)
    assert (leaf.shape, leaf.dtype) == ((L, D, O), jnp.float32)
    got = np.asarray(leaf.astype(jnp.float32), np.float64)
    exact = kernel.astype(np.float64)
    want = by_hand(kind, exact)
    # A weight half-way between two values may go either way; the error is the least in any case.
    largest = np.abs(exact).max(axis=1, keepdims=True)
    error, least = np.abs(got - exact), np.abs(want - exact)
    assert np.all(error <= least + 1e-6 * largest)
    assert np.mean(np.abs(got - want) > 1e-6 * largest) < 0.01
    # Half the largest distance between two values: 1/254 of int8, 0.152 of nf4.
    assert 0.4 < np.max(error / largest) / {"int8": 1 / 254, "nf4": 0.152}[kind] < 1.001
    assert not got[1, :64, 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_representable_weights_come_back_exactly(kind):
    rng = np.random.default_rng(1)
    scale = 2.0 ** rng.integers(-8, 3, (L, 1, O))
    if kind == "int8":
        kernel = rng.integers(-127, 128, (L, D, O)).astype(np.float32)
        kernel[:, 7] = 127
    else:
        kernel = np.float32(quantised.NF4)[rng.integers(0, 16, (L, D, O))]
        kernel[:, 5::64] = -1
    kernel = (kernel * scale).astype(np.float32)
    once = quantised.KINDS[kind](kernel)
    np.testing.assert_array_equal(once.astype(jnp.float32), kernel)
    again = quantised.KINDS[kind](once.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, again, once)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_rounded_once(kind):
    leaf = quantised.KINDS[kind](random_kernel())
    exact = np.asarray(leaf.astype(jnp.float32))
    np.testing.assert_array_equal(leaf.astype(jnp.bfloat16), exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_a_stack_is_a_leaf(kind):
    leaf = quantised.KINDS[kind](random_kernel())
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, 1, keepdims=False), leaf)
    assert one.shape == (D, O)
    np.testing.assert_array_equal(one.astype(jnp.float32), leaf.astype(jnp.float32)[1])


def test_bytes():
    """One byte a weight, or half of one; and a float32 a channel, or a block of one."""
    kernel = jnp.zeros((3, 128, 40), jnp.bfloat16)
    sizes = {
        kind: sum(x.nbytes for x in jax.tree.leaves(make(kernel)))
        for kind, make in quantised.KINDS.items()
    }
    assert sizes == {"int8": 3 * 40 * (128 + 4), "nf4": 3 * 40 * (64 + 2 * 4)}


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_its_gradient(kind):
    """`x W` and `dy Wᵀ` with the values of the codes; the kernel gets no gradient."""
    leaf = quantised.KINDS[kind](random_kernel()[0])
    values = np.asarray(leaf.astype(jnp.float32), np.float64)
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 3, D)), rng.normal(size=(2, 3, O))
    y, pull = jax.vjp(lambda x: quantised.matmul(x, leaf), jnp.float32(x))
    assert rel(y, x @ values) < 1e-5
    assert rel(pull(jnp.float32(dy))[0], dy @ values.T) < 1e-4
    assert quantised.matmul(jnp.bfloat16(x), leaf).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kernels_are_quantised(kind):
    base = decoder.init(CONFIG, jax.random.key(0), jnp.bfloat16)
    small = quantised.quantise(base, kind)  # not compiled: that would copy what is not quantised
    back = quantised.dequantise(small, jnp.float32)
    found = {path for path, leaf in trees.flatten(small) if isinstance(leaf, quantised.Quantised)}
    assert found == {path for path in decoder.shapes(CONFIG) if path.endswith(".kernel")}
    for path, leaf in trees.flatten(base):
        if path in found:
            want = quantised.KINDS[kind](leaf).astype(jnp.float32)
            np.testing.assert_array_equal(trees.get(back, path), want)
        else:
            assert trees.get(small, path) is leaf and trees.get(back, path) is leaf


def test_kinds_are_checked():
    quantised.check_kind("")
    with pytest.raises(UserError, match=r"^quantise: 'int4' is none of int8, nf4"):
        quantised.check_kind("int4")
