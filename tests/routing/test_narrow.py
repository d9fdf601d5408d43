"""Narrow products: their values, their gradients, and what the compiler makes of these."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from medmoe_jax.routing.narrow import narrow, widen
from tests.naive import rel

B, T, D, R = 2, 192, 640, 8
CASES = {"narrow": (narrow, (D, R)), "widen": (widen, (R, D))}


def _arrays(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, shape[0])), dtype)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ct = jnp.asarray(rng.standard_normal((B, T, shape[1])), dtype)
    return x, w, ct


def _pull(product):
    return jax.jit(lambda x, w, ct: jax.vjp(product, x, w)[1](ct))


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    product, shape = CASES[case]
    x, w, ct = (np.asarray(a, np.float64) for a in _arrays(shape))
    assert rel(product(*_arrays(shape)[:2]), x @ w) < 1e-5
    dx, dw = _pull(product)(*_arrays(shape))
    assert rel(dx, ct @ w.T) < 1e-5
    assert rel(dw, np.einsum("btx,bty->xy", x, ct)) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "x_cut, w_cut",
    [(("data",), ()), ((None, "data"), ()), ((None, None, "data"), ()), ((), (None, "data"))],
)
def test_gradients_on_a_mesh_of_explicit_axes(case, x_cut, w_cut):
    """They lie as what they are the gradients of."""
    product, shape = CASES[case]
    want = _pull(product)(*_arrays(shape))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    cuts = (x_cut, w_cut, x_cut[:2] or (None, None, *w_cut[1:]))
    put = lambda array, cut: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*cut)))  # noqa: E731
    with jax.set_mesh(mesh):
        x, w, ct = map(put, _arrays(shape), cuts)
        got = _pull(product)(x, w, ct)
    assert all(rel(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    for one, like in zip(got, (x, w), strict=True):
        assert one.sharding.is_equivalent_to(like.sharding, one.ndim)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_sums_the_parameters_gradient_in_float32(case):
    product, shape = CASES[case]
    low = _arrays(shape, jnp.bfloat16)
    x, _, ct = (np.asarray(a.astype(jnp.float32), np.float64) for a in low)
    assert product(*low[:2]).dtype == jnp.bfloat16
    dx, dw = _pull(product)(*low)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert rel(dw, np.einsum("btx,bty->xy", x, ct)) < 1e-5


@pytest.mark.shipped
@pytest.mark.parametrize("case", CASES)
def test_the_narrow_array_is_on_the_left(case):
    """The product's own derivative has the wide one there, or transposes it in memory."""
    product, shape = CASES[case]

    def wide_on_the_left(product):
        text = _pull(product).lower(*_arrays(shape)).compile().as_text()
        copied = f"f32[{D},{B * T}]{{1,0}}" in text
        return copied or re.search(rf"= f32\[{D},{R}\]\S* dot\(", text) is not None

    assert wide_on_the_left(jnp.matmul)
    assert not wide_on_the_left(product)
