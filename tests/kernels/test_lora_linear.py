"""The linear layer with its low-rank epilogue against float64, forward and gradients."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.base import quantised
from medmoe_jax.errors import UserError
from medmoe_jax.kernels import lora_linear as kernel
from medmoe_jax.kernels import tiles
from medmoe_jax.kernels.dropout import Counter, Dropout, counter, kept
from medmoe_jax.kernels.quantised import storage_of

BACKENDS = ("xla", "interpret")


def problem(T=19, D=24, O=40, R=6, gated=True):
    """`x, w, a, gate, b, dy` in float64."""
    rng = np.random.default_rng(0)
    shapes = (T, D), (D, O), (D, R), (T, R), (R, O), (T, O)
    x, w, a, gate, b, dy = (rng.normal(size=shape) for shape in shapes)
    return x, w, a, gate if gated else None, b, dy


def draw(T=19, D=24, rate=0.3):
    """A draw of dropout, and its mask over 1 − rate in float64."""
    count = counter(jax.random.key(5), (1, T, D))
    mask = np.asarray(kept(count.token[0, :, None], count.column_D[None], rate))
    return Dropout(Counter(count.token[0], count.column_D), rate), mask / (1 - rate)


def naive(x, w, a, gate, b, dy, mask=1.0):
    h, gate_or_1 = (x * mask) @ a, 1.0 if gate is None else gate
    dh = dy @ b.T
    result = {
        "y": x @ w + (h * gate_or_1) @ b,
        "dx": dy @ w.T + mask * ((dh * gate_or_1) @ a.T),
        "da": (x * mask).T @ (dh * gate_or_1),
        "db": (h * gate_or_1).T @ dy,
    }
    return result if gate is None else {**result, "dgate": h * dh}


def run(
    x,
    w,
    a,
    gate,
    b,
    dy,
    backend,
    dtype=jnp.float32,
    plain=None,
    dropout=None,
    memory=tiles.SMALLEST,
):
    """What `naive` gives, by the kernel or by `plain`; x, w and dy in `dtype`, else float32."""
    x, dy = (jnp.asarray(v, dtype) for v in (x, dy))
    w = w if isinstance(w, quantised.Quantised) else jnp.asarray(w, dtype)
    a, b = jnp.float32(a), jnp.float32(b)
    gate = None if gate is None else jnp.float32(gate)

    @jax.jit
    def step(x, w, a, gate, b, dy):
        def f(x, a, gate, b):
            if plain is not None:
                return plain(x, w, a, gate, b)
            told = {"backend": backend, "dropout": dropout, "memory": memory}
            return kernel.lora_linear(x, w, a, gate, b, **told)

        y, vjp = jax.vjp(f, x, a, gate, b)
        dx, da, dgate, db = vjp(dy)
        result = {"y": y, "dx": dx, "da": da, "db": db}
        return result if gate is None else {**result, "dgate": dgate}

    return step(x, w, a, gate, b, dy)


def error(actual, expected) -> float:
    """max |a − b| / max |b|."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return np.abs(actual - expected).max() / np.abs(expected).max()


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert error(actual[name], value) <= (1e-5 if name == "y" else 1e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
def test_values_and_gradients_equal_the_equations(gated, backend):
    arrays = problem(gated=gated)
    expected = naive(*arrays)
    bare = arrays[0] @ arrays[1]
    assert np.abs(expected["y"] - bare).max() > 0.1
    assert_equal(run(*arrays, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
def test_dropout_is_on_the_adapters_input_alone(gated, backend):
    arrays, (dropout, mask) = problem(gated=gated), draw()
    expected = naive(*arrays, mask)
    assert min(error(v, naive(*arrays)[k]) for k, v in expected.items() if k != "dgate") > 0.05
    assert_equal(run(*arrays, backend, dropout=dropout), expected)


@pytest.mark.parametrize("dropping", [False, True])
def test_blocks_in_every_dimension_with_tails(monkeypatch, dropping):
    monkeypatch.setattr(kernel, "STRIP", 96)  # Two of a block and a rest; zeros begin within one.
    arrays = problem(T=150, D=300, O=270)
    # Too little for all of the contracted width, in either direction.
    memory = tiles.SMALLEST._replace(blocks=1_070_000 if dropping else 990_000)
    for K, N in ((300, 270), (270, 300)):
        shape = kernel.LoraShape(150, K, N, R=6, itemsize=4, gate_itemsize=4, dropout=dropping)
        chosen, _ = kernel.tiling(shape, memory)
        assert shape.grid(chosen) == (2, 2, 2) and K % chosen.k and N % chosen.n
    dropout, mask = draw(150, 300) if dropping else (None, 1.0)
    actual = run(*arrays, "interpret", dropout=dropout, memory=memory)
    assert_equal(actual, naive(*arrays, mask))


def test_whole_lanes_that_hang_over_are_not_computed():
    """In values, and in the count of products."""
    D, O, R = 640, 384, 6
    arrays, memory = problem(T=32, D=D, O=O), tiles.SMALLEST._replace(blocks=700_000)
    for K, N in ((D, O), (O, D)):
        chosen, cost = kernel.tiling(kernel.LoraShape(32, K, N, R, 4, 4), memory)
        assert K % chosen.k == N % chosen.n == 128
        assert cost.flops == 2 * 32 * (K * N + K * R + N * R)
    assert_equal(run(*arrays, "interpret", memory=memory), naive(*arrays))
    # Qwen1.5-7B, whose feed-forward network is 43 times 256 wide.
    _, cost = kernel.tiling(kernel.LoraShape(2048, 4096, 11008, 160, 2, 4))
    assert cost.flops == 2 * 2048 * (4096 * 11008 + (4096 + 11008) * 160)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", quantised.KINDS)
def test_a_quantised_weight_is_the_floats_that_it_stands_for(kind, backend):
    x, w, a, gate, b, dy = problem(D=128)
    packed = quantised.KINDS[kind](jnp.float32(w))
    values = np.asarray(packed.astype(jnp.float32), np.float64)
    dropout, mask = draw(D=128)
    expected = naive(x, values, a, gate, b, dy, mask)
    assert error(naive(x, w, a, gate, b, dy, mask)["y"], expected["y"]) > 1e-4
    assert_equal(run(x, packed, a, gate, b, dy, backend, dropout=dropout), expected)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_blocks_of_a_quantised_weight(kind):
    """In every dimension; the last ones hang over."""
    D, O = 1088, 270
    x, w, a, gate, b, dy = problem(T=150, D=D, O=O)
    packed = quantised.KINDS[kind](jnp.float32(w))
    memory = tiles.SMALLEST._replace(blocks=3_000_000)
    for transposed, (K, N) in enumerate(((D, O), (O, D))):
        stored = storage_of(packed)
        shape = kernel.LoraShape(150, K, N, 6, 4, 4, False, stored, bool(transposed))
        chosen, _ = kernel.tiling(shape, memory)
        cut = chosen.n if transposed else chosen.k
        assert cut < D and D % cut and cut % stored.granule == 0
    values = np.asarray(packed.astype(jnp.float32), np.float64)
    expected = naive(x, values, a, gate, b, dy)
    assert_equal(run(x, packed, a, gate, b, dy, "interpret", memory=memory), expected)


def test_what_a_quantised_weight_moves():
    """By hand: bytes and one scale a column; half bytes and one scale 64 rows."""
    int8, nf4 = (storage_of(of(jnp.ones((128, 8)))) for of in quantised.KINDS.values())
    assert int8.size(128, 8) == 128 * 8 + 4 * 8 and int8.granule == 32
    assert nf4.size(128, 8) == 64 * 8 + 2 * 4 * 8 and nf4.granule == 512
    floats = kernel.LoraShape(512, 4096, 1024, R=16, itemsize=2, gate_itemsize=4)
    packed = floats._replace(weight=int8)
    one = tiles.Tiles(256, 512, 1024)
    saved = floats.traffic(one) - packed.traffic(one)
    assert saved == 2 * (2 * 4096 * 1024 - int8.size(4096, 1024))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(backend):
    arrays = [np.asarray(jnp.bfloat16(v), np.float64) for v in problem(T=40, D=96)]

    def plain(x, w, a, gate, b):
        a, gate, b = (v.astype(x.dtype) for v in (a, gate, b))
        return x @ w + ((x @ a) * gate) @ b

    expected = naive(*arrays)
    ours = run(*arrays, backend, jnp.bfloat16)
    theirs = run(*arrays, backend, jnp.bfloat16, plain)
    for name, value in expected.items():
        assert error(ours[name], value) <= 2 * error(theirs[name], value), name
    assert ours["y"].dtype == ours["dx"].dtype == jnp.bfloat16
    # Sums over tokens are rounded once, to the banks' own float32.
    for name in ("da", "db"):
        assert ours[name].dtype == jnp.float32
        assert (ours[name] != ours[name].astype(jnp.bfloat16)).any()


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_the_frozen_weight_gets_no_gradient_and_no_buffer_for_one(backend):
    x, w, a, gate, b, dy = (jnp.float32(v) for v in problem())

    def step(x, w, a, gate, b, dy):
        def f(x, w, a, gate, b):
            return kernel.lora_linear(x, w, a, gate, b, backend=backend)

        return jax.vjp(lambda *trained: f(trained[0], w, *trained[1:]), x, a, gate, b)[1](dy)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.shape for v in equation.outvars)
            if equation.primitive.name == "pallas_call":
                continue  # Inside are blocks, in VMEM.
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from shapes(inner)

    made = set(shapes(jax.make_jaxpr(step)(x, w, a, gate, b, dy).jaxpr))
    assert (24, 6) in made and (6, 40) in made and (19, 24) in made
    assert (24, 40) not in made


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_that_is_trained_gets_its_gradient(dtype):
    x, w, a, gate, b, dy = problem()

    @jax.jit
    def loss(w, a):
        fixed = jnp.float32(gate), jnp.float32(b)
        y = kernel.lora_linear(jnp.asarray(x, dtype), w, a, *fixed, backend="xla")
        return jnp.sum(y.astype(jnp.float32) * jnp.float32(dy))

    dw, da = jax.grad(loss, argnums=(0, 1))(jnp.asarray(w, dtype), jnp.float32(a))
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
    assert dw.dtype == dtype and error(dw, x.T @ dy) < tolerance
    assert error(da, naive(x, w, a, gate, b, dy)["da"]) < tolerance


def test_the_cost_of_one_block_and_of_many_by_hand():
    shape = kernel.LoraShape(T=512, K=128, N=256, R=16, itemsize=2, gate_itemsize=4)
    chosen, cost = kernel.tiling(shape)
    assert chosen == (256, 128, 256)  # Two blocks of rows, the rest whole.
    assert cost.flops == 2 * 512 * (128 * 256 + 128 * 16 + 16 * 256)
    operands = 512 * 128 + 128 * 256 + 128 * 16 + 16 * 256
    assert cost.bytes_accessed == 2 * (operands + 512 * 256 + 512 * 16) + 4 * 512 * 16
    # Two blocks in every dimension: x once a block of outputs, W and B once a block of rows.
    many = tiles.Tiles(256, 64, 128)
    x, w, b = 2 * 512 * 128, 2 * 128 * 256, 2 * 16 * 256
    a = 2 * 128 * 16
    expected = 2 * (x + w + a + b + 512 * 256 + 512 * 16) + 4 * 512 * 16
    assert shape.traffic(many) == expected


@pytest.mark.parametrize("transposed", [False, True])
def test_one_core_reads_x_and_w_once_where_two_have_a_block_of_rows_each(transposed):
    """Qwen1.5-7B's gate and up with MedCare's banks and dropout, a row of 2,048 tokens."""
    shape = kernel.LoraShape(2048, 4096, 11008, 160, 2, 4, True, transposed=transposed)
    one, _ = kernel.tiling(shape, tiles.kernel_memory(1, 128))
    assert shape.grid(one)[0] == shape.grid(one)[2] == 1
    # All that there is, once, and what of the last block hangs over.
    a, b, x_w_y = 160 * 4096, 160 * 11008, 2048 * 4096 + 4096 * 11008 + 2048 * 11008
    once = 2 * (x_w_y + a + b + 2048 * 160) + 4 * 2048 * 160
    assert once <= shape.traffic(one) < 1.001 * once
    two, _ = kernel.tiling(shape)
    assert shape.grid(two)[0] == 2 and shape.traffic(two) > 2 * once


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "tpu"}, "backend 'tpu' is none of xla, pallas, interpret"),
        ({"w": ((24, 40), jnp.int8)}, "w_DxO is int8; kernels take float32 and bfloat16"),
        ({"w": ((25, 40), jnp.float32)}, r"w_DxO has shape \(25, 40\); .* \(24, 40\)"),
        ({"a": ((24, 7), jnp.float32)}, r"a_DxR has shape \(24, 7\); .* \(24, 6\)"),
        ({"gate": ((19, 1), jnp.float32)}, r"gate_TxR has shape \(19, 1\); .* \(19, 6\)"),
    ],
)
def test_what_does_not_fit_together_is_an_error_that_names_it(change, message):
    shapes = {"x": (19, 24), "w": (24, 40), "a": (24, 6), "gate": (19, 6), "b": (6, 40)}
    arguments = {name: (shape, jnp.float32) for name, shape in shapes.items()}
    arguments = {**arguments, "backend": "pallas"} | change
    backend = arguments.pop("backend")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda *operands: kernel.lora_linear(*operands, backend=backend),
            *(jax.ShapeDtypeStruct(*shape) for shape in arguments.values()),
        )


def test_blocks_that_a_weight_does_not_fill_are_an_error():
    x, w, a, gate, b, _ = map(jnp.float32, problem())
    with pytest.raises(UserError, match="quantised in whole blocks, which its 24 rows do not fill"):
        kernel.lora_linear(x, quantised.to_nf4(w), a, gate, b, backend="interpret")


def test_more_rank_columns_than_fit_vmem_are_an_error():
    shapes = (4096, 2048), (2048, 5504), (2048, 9000), (9000, 5504)
    x, w, a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    message = r"no blocks of a \[2048, 5504\] weight beside 9000 rank columns fit .* backend 'xla'"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda x, w, a, b: kernel.lora_linear(x, w, a, None, b, backend="pallas"), x, w, a, b
        )
