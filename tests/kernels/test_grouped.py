"""Grouped products: both backends against a loop over rows in float64."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.kernels import grouped, grouped_blocks, grouped_tpu, tiles

BACKENDS = ("xla", "interpret")
# Rows of each expert, and rows of padding after them.
SIZES = {
    "uneven, empty and padding": ((7, 0, 20, 1, 9), 8),
    "one takes all": ((0, 45, 0), 0),
    "no row has an expert": ((0, 0), 20),
    "one expert, on the borders of tiles": ((32,), 0),
}


def naive_product(x, w, sizes):
    """`y`, and a function of dy to `(dx, dw)`; w is `[E, D, O]`."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    y = np.zeros((len(x), w.shape[2]))
    for m, e in enumerate(owner):
        y[m] = x[m] @ w[e]

    def gradients(dy):
        dx, dw = np.zeros_like(x), np.zeros_like(w)
        for m, e in enumerate(owner):
            dx[m] = w[e] @ dy[m]
            dw[e] += np.outer(x[m], dy[m])
        return dx, dw

    return y, gradients


def naive_matmul(x, w, sizes, dy):
    y, gradients = naive_product(x, w, sizes)
    dx, dw = gradients(dy)
    return {"y": y, "dx": dx, "dw": dw}


def naive_lora(x, a, b, weight, sizes, dy):
    h, h_gradients = naive_product(x, a.transpose(0, 2, 1), sizes)
    y, y_gradients = naive_product(h * weight[:, None], b, sizes)
    dh, db = y_gradients(dy)
    dx, da = h_gradients(dh * weight[:, None])
    return {"y": y, "dx": dx, "da": da.transpose(0, 2, 1), "db": db, "dweight": (dh * h).sum(1)}


def lora_problem(sizes, padding, D, r, O, seed=0):
    """`x, a, b, weight, sizes, dy` in float64."""
    rng = np.random.default_rng(seed)
    M, E = sum(sizes) + padding, len(sizes)
    shapes = (M, D), (E, r, D), (E, r, O), (M,), (M, O)
    x, a, b, weight, dy = (rng.normal(size=shape) for shape in shapes)
    return x, a, b, weight, np.asarray(sizes), dy


def matmul_problem(sizes, padding, D, O):
    """`x, w, sizes, dy` in float64."""
    x, a, b, _, sizes, dy = lora_problem(sizes, padding, D, 3, O)
    return x, np.einsum("erd,ero->edo", a, b), sizes, dy


def poisoned(array, rows):
    """The same with NaN after `rows` rows: padding may hold anything."""
    array = array.copy()
    array[rows:] = np.nan
    return array


def run_lora(x, a, b, weight, sizes, dy, backend, dtype=jnp.float32, plain=None):
    """What `naive_lora` gives, by the kernel or by `plain`; x and dy in `dtype`, else float32."""
    sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def run(x, a, b, weight, dy):
        def f(x, a, b, weight):
            if plain is not None:
                return plain(x, a, b, weight)
            return grouped.grouped_lora(x, a, b, weight, sizes, backend=backend)

        y, vjp = jax.vjp(f, x, a, b, weight)
        return dict(zip(("y", "dx", "da", "db", "dweight"), (y, *vjp(dy)), strict=True))

    return run(
        *(
            jnp.asarray(v, t)
            for v, t in zip(
                (x, a, b, weight, dy),
                (dtype, jnp.float32, jnp.float32, jnp.float32, dtype),
                strict=True,
            )
        )
    )


def run_matmul(x, w, sizes, dy, backend, dtype=jnp.float32):
    """What `naive_matmul` gives, by the kernel; x and dy in `dtype`, w float32."""
    sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes, backend=backend), x, w)
        return dict(zip(("y", "dx", "dw"), (y, *vjp(dy)), strict=True))

    return run(jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(dy, dtype))


def error(actual, expected) -> float:
    """max |a − b| / max |b|; where all of b is zero, max |a|."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0)


def assert_equal(actual, expected):
    for name, value in expected.items():
        assert error(actual[name], value) <= (1e-5 if name == "y" else 1e-4), name
        # Zero means zero: padding, and experts without rows.
        assert not np.asarray(actual[name])[~value.any(axis=tuple(range(1, value.ndim)))].any(), (
            name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SIZES)
def test_lora_and_its_gradients_equal_a_loop(case, backend):
    x, a, b, weight, sizes, dy = lora_problem(*SIZES[case], D=24, r=4, O=40)
    rows = sum(sizes)
    actual = run_lora(
        poisoned(x, rows), a, b, poisoned(weight, rows), sizes, poisoned(dy, rows), backend
    )
    assert_equal(actual, naive_lora(x, a, b, weight, sizes, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_fill_no_whole_pack(backend):
    # Rank 48: two a pack, three packs, the sixth expert is not there.
    arrays = lora_problem((7, 0, 20, 1, 9), 3, D=24, r=48, O=40)
    assert_equal(run_lora(*arrays, backend), naive_lora(*arrays))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["uneven, empty and padding", "one takes all"])
def test_full_experts_and_their_gradients_equal_a_loop(case, backend):
    x, w, sizes, dy = matmul_problem(*SIZES[case], D=24, O=40)
    rows = sum(sizes)
    actual = run_matmul(poisoned(x, rows), w, sizes, poisoned(dy, rows), backend)
    assert_equal(actual, naive_matmul(x, w, sizes, dy))


def test_blocks_in_every_dimension_with_tails(monkeypatch):
    x, w, sizes, dy = matmul_problem((7, 0, 20, 1), 4, D=200, O=300)
    monkeypatch.setattr(grouped_tpu, "SMALLEST", tiles.SMALLEST._replace(blocks=220_000))
    for K, N in ((200, 300), (300, 200)):
        for plan in (grouped_tpu.product_tiling, grouped_tpu.gradient_tiling):
            chosen, _ = plan(grouped_tpu.GroupedShape(len(x), K, N, len(sizes), 4, 4))
            assert chosen == (8, 128, 128)
    assert_equal(run_matmul(x, w, sizes, dy, "interpret"), naive_matmul(x, w, sizes, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(backend):
    arrays = lora_problem((7, 0, 20, 1, 9), 8, D=96, r=4, O=40)
    x, dy = (np.asarray(jnp.bfloat16(v), np.float64) for v in (arrays[0], arrays[5]))
    arrays = (x, *arrays[1:5], dy)
    owner = jnp.asarray(np.repeat(np.arange(5), (7, 0, 20, 1, 9)))

    def plain(x, a, b, weight):
        a, b, weight = (v.astype(jnp.bfloat16) for v in (a, b, weight))
        h = jnp.einsum("md,mrd->mr", x[:37], a[owner]) * weight[:37, None]
        return jnp.pad(jnp.einsum("mr,mro->mo", h, b[owner]), ((0, 8), (0, 0)))

    expected = naive_lora(*arrays)
    ours = run_lora(*arrays, backend, jnp.bfloat16)
    theirs = run_lora(*arrays, backend, jnp.bfloat16, plain)
    for name, value in expected.items():
        assert error(ours[name], value) <= 2 * error(theirs[name], value), name
    assert ours["y"].dtype == ours["dx"].dtype == jnp.bfloat16
    assert ours["da"].dtype == ours["db"].dtype == ours["dweight"].dtype == jnp.float32
    # Sums over rows are rounded once, to the bank's own float32.
    assert (ours["da"] != ours["da"].astype(jnp.bfloat16)).any()


VISITS = jax.jit(grouped_tpu.make_visits, static_argnums=(1, 2))


@pytest.mark.parametrize("seed", range(20))
def test_visits_give_every_row_once_to_its_own_group(seed):
    rng = np.random.default_rng(seed)
    G, rows, tile = (7, 133, 8) if seed % 2 else (5, 96, 16)
    # Half of the time every border is one of a tile.
    unit = rng.choice([1, tile])
    sizes = np.diff(np.sort(rng.integers(0, rows + 1, G)) // unit * unit, prepend=0)
    visits = VISITS(jnp.asarray(sizes, jnp.int32), rows, tile)
    count = -(-rows // tile)
    group, tile_V, low, high = (np.asarray(v) for v in visits)
    assert len(group) == count + G
    owner = np.full(count * tile, -1)
    for g, t, start, end in zip(group, tile_V, low, high, strict=True):
        covered = slice(t * tile + start, t * tile + end)
        assert 0 <= start <= end <= tile and (owner[covered] == -1).all()
        owner[covered] = g
    expected = np.repeat(np.arange(G), sizes)
    np.testing.assert_array_equal(owner[: len(expected)], expected)
    assert (owner[len(expected) :] == -1).all()
    # A block of the result is left once and not come back to; every one is met.
    np.testing.assert_array_equal(np.unique(tile_V), np.arange(count))
    np.testing.assert_array_equal(np.unique(group), np.arange(G))
    assert (np.diff(tile_V) >= 0).all() and (np.diff(group) >= 0).all()


def declared_cost(function, *shapes):
    """`(flops, bytes)` over all Pallas calls of the traced function."""
    total = np.zeros(2, np.int64)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                cost = equation.params["cost_estimate"]
                total[:] += (cost.flops, cost.bytes_accessed)
            else:
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*shapes).jaxpr)
    return tuple(total)


def lora_step(M, D, O, E, r, dtype=jnp.bfloat16):
    """The forward and backward pass on "pallas", and the shapes of its arguments."""

    def step(x, a, b, weight, sizes, dy):
        def f(x, a, b, weight):
            return grouped.grouped_lora(x, a, b, weight, sizes, backend="pallas")

        y, vjp = jax.vjp(f, x, a, b, weight)
        return y, vjp(dy)

    shapes = ((M, D), dtype), ((E, r, D), jnp.float32), ((E, r, O), jnp.float32)
    shapes += ((M,), jnp.float32), ((E,), jnp.int32), ((M, O), dtype)
    return step, [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def lora_cost(M, D, O, E, r):
    """`(flops, bytes)` of the six kernel calls of `lora_step`, from their block sizes alone."""
    P = grouped._experts_a_pack(E, r)
    S, R = tiles.ceil_div(E, P), P * r
    costs = [
        plan(grouped_tpu.GroupedShape(M, K, N, S, 2, result))[1]
        for plan, K, N, result in (
            (grouped_tpu.product_tiling, D, R, 2),  # h
            (grouped_tpu.product_tiling, R, O, 2),  # y
            (grouped_tpu.product_tiling, O, R, 2),  # dh
            (grouped_tpu.product_tiling, R, D, 2),  # dx
            (grouped_tpu.gradient_tiling, R, D, 4),
            (grouped_tpu.gradient_tiling, R, O, 4),
        )
    ]
    return sum(cost.flops for cost in costs), sum(cost.bytes_accessed for cost in costs)


@pytest.mark.parametrize("M, D, O, E, r", [(4096, 512, 1024, 8, 16), (1000, 896, 4864, 9, 48)])
def test_the_kernels_declare_the_cost_of_their_blocks(M, D, O, E, r):
    step, shapes = lora_step(M, D, O, E, r)
    assert declared_cost(step, *shapes) == lora_cost(M, D, O, E, r)


def test_the_cost_of_a_small_product_by_hand():
    # 64 rows of 4 groups: 16 tiles of 4 rows are too many borders, so 8 tiles of 8, 12 visits.
    shape = grouped_tpu.GroupedShape(M=64, K=128, N=128, G=4, itemsize=2, out_itemsize=4)
    tile, cost = grouped_tpu.product_tiling(shape)
    assert tile == (8, 128, 128)
    assert cost.flops == 2 * 12 * 8 * 128 * 128
    assert cost.bytes_accessed == 2 * (64 * 128 + 4 * 128 * 128 + 64 * 128)
    tile, cost = grouped_tpu.gradient_tiling(shape)
    assert tile == (8, 128, 128)
    assert cost.flops == 2 * 12 * 8 * 128 * 128
    assert cost.bytes_accessed == 2 * (64 * 128 + 64 * 128) + 4 * 4 * 128 * 128


# From one full pack on: the fewest experts of rank 4 that fill the matrix unit are 32.
@pytest.mark.parametrize("r, few", [(4, 32), (16, 8), (64, 8), (128, 8)])
@pytest.mark.parametrize("M", [16384, 32768, 65536])
@pytest.mark.parametrize("D, O", [(2048, 5504), (4096, 11008), (13696, 5120), (3584, 18944)])
def test_work_grows_at_most_a_quarter_from_8_to_512_experts(D, O, M, r, few):
    def work(E):
        flops, moved = lora_cost(M, D, O, E, r)
        bank = E * r * (D + O)  # Read forward and backward, and its gradient written.
        return np.array([flops, moved - bank * (2 + 2 + 4)])

    assert (work(512) <= 1.25 * work(few)).all(), work(512) / work(few)


@pytest.mark.parametrize("E", [8, 64])
def test_the_twin_computes_at_most_twice_the_rows(E):
    rng = np.random.default_rng(0)
    rows = grouped_blocks.block_rows(2048, E)
    for share in (np.ones(E) / E, rng.dirichlet(np.full(E, 0.3))):
        sizes = rng.multinomial(2048, share)
        assert np.ceil(sizes / rows).sum() * rows <= 2 * 2048


@pytest.mark.shipped
def test_no_buffer_has_rows_and_experts_and_width():
    M, D, O, E, r = 256, 64, 64, 64, 4
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(M, np.ones(E) / E)
    x, a, b, weight, _, dy = lora_problem(sizes, 0, D, r, O)

    def step(x, a, b, weight, sizes, dy):
        def f(*operands):
            return grouped.grouped_lora(*operands, sizes, backend="xla")

        return jax.vjp(f, x, a, b, weight)[1](dy)

    arrays = (*map(jnp.float32, (x, a, b, weight)), jnp.int32(sizes), jnp.float32(dy))
    memory = jax.jit(step).lower(*arrays).compile().memory_analysis()
    rows_and_bank = 4 * (M * (D + O) + E * r * (D + O))
    assert memory.temp_size_in_bytes < 2 * rows_and_bank < 4 * M * E * D // 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "gpu"}, "backend 'gpu' is none of xla, pallas, interpret"),
        ({"x": ((45, 24), jnp.int32)}, "x_MxD is int32; kernels take float32 and bfloat16"),
        ({"x": ((0, 24), jnp.float32)}, r"x_MxD has shape \(0, 24\)"),
        ({"x": ((45, 25), jnp.float32)}, "x_MxD has width 25, a_ExrxD expects 24"),
        ({"a": ((4, 4, 24), jnp.float32)}, "a_ExrxD has 4 experts, sizes_E has 5"),
        ({"b": ((5, 8, 40), jnp.float32)}, "a_ExrxD has rank 4, b_ExrxO 8"),
        ({"weight": ((44,), jnp.float32)}, r"weight_M has shape \(44,\); x_MxD has 45 rows"),
        ({"sizes": ((5,), jnp.float32)}, "sizes_E is float32; give the number of rows"),
    ],
)
def test_what_does_not_fit_together_is_an_error_that_names_it(change, message):
    shapes = {"x": (45, 24), "a": (5, 4, 24), "b": (5, 4, 40), "weight": (45,)}
    arguments = {name: (shape, jnp.float32) for name, shape in shapes.items()}
    arguments = {**arguments, "sizes": ((5,), jnp.int32), "backend": "pallas"} | change
    backend = arguments.pop("backend")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda *operands: grouped.grouped_lora(*operands, backend=backend),
            *(jax.ShapeDtypeStruct(*shape) for shape in arguments.values()),
        )


def test_what_fits_no_vmem_is_an_error(monkeypatch):
    monkeypatch.setattr(grouped_tpu, "SMALLEST", tiles.SMALLEST._replace(blocks=100_000))
    x, w, sizes, _ = matmul_problem((3, 4), 0, D=200, O=300)
    with pytest.raises(UserError, match=r"no blocks of a grouped \[200, 300\] product fit"):
        grouped.grouped_matmul(
            jnp.float32(x), jnp.float32(w), jnp.asarray(sizes), backend="interpret"
        )
