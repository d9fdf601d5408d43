"""Sorting by expert, gathering and adding up against loops, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import permute, permute_tpu
from tests.naive import rel

BACKENDS = ["xla", "interpret"]
sort = jax.jit(permute.sort_by_expert, static_argnums=1, static_argnames="backend")


def _picks(T, K, E, seed=0, empty=()):
    """Different experts of each token, some of them none; the experts in `empty` never."""
    rng = np.random.default_rng(seed)
    choice = [e for e in range(E + 1) if e not in empty]
    return np.stack([rng.permutation(choice)[:K] for _ in range(T)]).astype(np.int32)


def _check_order(order, picks, E):
    """Against Python's stable sort of the pairs."""
    flat = picks.reshape(-1)
    want = sorted(range(flat.size), key=lambda pair: flat[pair])
    assert np.array_equal(order.source_M, want)
    assert np.array_equal(np.asarray(order.position_TxK).reshape(-1)[want], np.arange(flat.size))
    sizes = [int((flat == e).sum()) for e in range(E)]
    assert np.array_equal(order.sizes_E, sizes)
    assert np.array_equal(order.offsets_E, np.cumsum([0, *sizes])[:-1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_a_stable_sort_of_any_picks(values):
    picks = np.array(values, np.int32).reshape(12, 2)
    for backend in BACKENDS:
        _check_order(sort(picks, 3, backend=backend), picks, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, K, E", [(700, 2, 9), (1, 1, 1), (5, 3, 300)])
def test_sorting_over_several_blocks_and_many_experts(backend, T, K, E):
    picks = _picks(T, K, E, empty=(0,) if E > 1 else ())
    _check_order(sort(picks, E, backend=backend), picks, E)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_takes_all(backend):
    picks = np.full((9, 1), 2, np.int32)
    order = sort(picks, 4, backend=backend)
    assert np.array_equal(order.sizes_E, [0, 0, 9, 0])
    assert np.array_equal(order.source_M, np.arange(9))


def _naive(x, y, picks, E):
    """`gather(x)` and `scatter_add(y)`, a pair at a time in float64."""
    K = picks.shape[1]
    flat = picks.reshape(-1)
    x_MxD, y_TxD = np.zeros_like(y), np.zeros_like(x)
    for row, pair in enumerate(sorted(range(flat.size), key=lambda pair: flat[pair])):
        if flat[pair] < E:
            x_MxD[row] = x[pair // K]
            y_TxD[pair // K] += y[row]
    return x_MxD, y_TxD


# T, K, D, E, dtype: bfloat16 rows of which one half is longer, more than one block of rows, and
# widths that fill no tile.
CASES = [
    (11, 2, 128, 3, jnp.float32),
    (19, 3, 384, 4, jnp.bfloat16),
    (11, 2, 200, 3, jnp.float32),
    (11, 2, 64, 3, jnp.bfloat16),
    (11, 2, 192, 3, jnp.bfloat16),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, K, D, E, dtype", CASES)
def test_gather_and_scatter_add_and_their_gradients(backend, T, K, D, E, dtype):
    rng = np.random.default_rng(3)
    picks = _picks(T, K, E, empty=(1,))
    assert (picks == E).any()
    x, dy = (jnp.asarray(rng.standard_normal((T, D)), dtype) for _ in range(2))
    y, dx = (jnp.asarray(rng.standard_normal((T * K, D)), dtype) for _ in range(2))

    @jax.jit
    def run(x, y, dx_MxD, dy_TxD):
        order = permute.sort_by_expert(picks, E, backend=backend)
        x_MxD, back_x = jax.vjp(lambda x: permute.gather(x, order, backend=backend), x)
        y_TxD, back_y = jax.vjp(lambda y: permute.scatter_add(y, order, backend=backend), y)
        return x_MxD, y_TxD, back_x(dx_MxD)[0], back_y(dy_TxD)[0]

    x_MxD, y_TxD, gradient_x, gradient_y = run(x, y, dx, dy)

    def f64(a):
        return np.asarray(a.astype(jnp.float32), np.float64)

    want_x, want_y = _naive(f64(x), f64(y), picks, E)
    # Linear maps: the gradient of either is the other, on the cotangent.
    want_gradient_y, want_gradient_x = _naive(f64(dy), f64(dx), picks, E)
    assert np.array_equal(f64(x_MxD), want_x)
    assert np.array_equal(f64(gradient_y), want_gradient_y)
    rounding = 1e-6 if dtype == jnp.float32 else 2.0**-8
    assert rel(f64(y_TxD), want_y) < rounding
    assert rel(f64(gradient_x), want_gradient_x) < rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_expert_add_nothing(backend):
    """NaN on them must not spread, in value or gradient."""
    rng = np.random.default_rng(4)
    picks = _picks(7, 2, 3)
    order = sort(picks, 3, backend=backend)
    used = int(order.sizes_E.sum())
    assert used < 14
    y = rng.standard_normal((14, 128)).astype(np.float32)
    dy = rng.standard_normal((7, 128)).astype(np.float32)

    @jax.jit
    def run(y, dy):
        out, back = jax.vjp(lambda y: permute.scatter_add(y, order, backend=backend), y)
        return out, back(dy)[0]

    _, want = _naive(np.zeros((7, 128)), y.astype(np.float64), picks, 3)
    dy_MxD, _ = _naive(dy.astype(np.float64), np.zeros((14, 128)), picks, 3)
    out, gradient = run(jnp.asarray(y).at[used:].set(jnp.nan), dy)
    assert rel(out, want) < 1e-6
    assert np.array_equal(gradient, dy_MxD.astype(np.float32))
    assert not gradient[used:].any()


def test_the_kernel_has_no_races(monkeypatch):
    """Rows of the next step travel while those of this one are added."""
    index = jnp.asarray(np.random.default_rng(5).integers(-1, 20, (2, 40)), jnp.int32)
    rows = jnp.asarray(np.random.default_rng(6).standard_normal((20, 128)), jnp.float32)
    monkeypatch.setattr(permute_tpu, "_ROW_BYTES", 20 * 128 * 8)  # five blocks of eight rows
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        out = permute_tpu.sum_rows(rows, index, "pallas")
    assert not interpret_pallas_call.races.races_found
    want = sum(np.where(np.asarray(i)[:, None] >= 0, np.asarray(rows)[i], 0.0) for i in index)
    assert rel(out, want) < 1e-6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda o, b: permute.gather(jnp.ones((6, 128)), o, backend=b), "x_TxD has 6 rows.*of 7"),
        (lambda o, b: permute.scatter_add(jnp.ones((7, 128)), o, backend=b), "y_MxD has 7.*of 14"),
        (lambda o, b: permute.gather(jnp.ones((7, 128), jnp.int8), o, backend=b), "int8"),
        (lambda o, b: permute.sort_by_expert(jnp.ones((7, 2)), 3, backend=b), "give integers"),
        (lambda o, b: permute.sort_by_expert(_picks(7, 2, 3), 3, backend="gpu"), "'gpu' is none"),
        (
            lambda o, b: permute.sort_by_expert(_picks(7, 2, 3), 5000, backend=b),
            "use backend 'xla'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    order = sort(_picks(7, 2, 3), 3, backend="xla")
    with pytest.raises(UserError, match=message):
        call(order, "interpret")
