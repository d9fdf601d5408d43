"""The matrix kernels, forward and backward, compiled for TPU at the sizes of real models."""

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.base import quantised
from medmoe_jax.kernels.dropout import Counter, Dropout
from medmoe_jax.kernels.grouped import grouped_lora, grouped_matmul
from medmoe_jax.kernels.lora_linear import lora_linear
from medmoe_jax.parallel import topology
from medmoe_jax.routing import fused
from tests import slices

bf16, f32 = jnp.bfloat16, jnp.float32


def shaped(*shapes):
    """A `ShapeDtypeStruct` for each `(dtype, dimension, …)`."""
    return [jax.ShapeDtypeStruct(dimensions, dtype) for dtype, *dimensions in shapes]


@pytest.mark.aot
@pytest.mark.parametrize(
    "slice_name, M, D, O, E, r, dtype",
    slices.compiled(
        [
            (32768, 4096, 11008, 512, 16, bf16),  # Qwen1.5-7B, gate and up.
            (32768, 18944, 3584, 8, 16, bf16),  # Qwen2-7B, down.
            (32768, 5120, 13696, 64, 32, bf16),  # Qwen1.5-14B, gate and up.
            (16384, 5504, 2048, 8, 64, f32),  # Qwen1.5-1.8B, down.
            (16384, 28672, 8192, 64, 128, bf16),  # The widest.
            (16384, 4096, 4096, 512, 128, bf16),  # The shortest tiles of rows: 8.
        ],
        everywhere=3,
    ),
)
def test_grouped_lora(slice_name, M, D, O, E, r, dtype):
    operands = shaped((dtype, M, D), (f32, E, r, D), (f32, E, r, O), (f32, M))
    (sizes, dy) = shaped((jnp.int32, E), (dtype, M, O))

    def step(operands, sizes, dy):
        y, vjp = jax.vjp(lambda *v: grouped_lora(*v, sizes, backend="pallas"), *operands)
        return y, vjp(dy)

    program = topology.compile_for(topology.describe(slice_name), step, operands, sizes, dy)
    assert len(slices.kernels_of(program)) == 6
    # Beside the banks in x's dtype: rank columns and numbers of rows, nothing as wide as x.
    banks = 2 * E * r * (D + O) * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < banks + 4 * M * 4 * 128


@pytest.mark.aot
@pytest.mark.parametrize(
    "slice_name, M, D, O, E, dtype",
    slices.compiled(
        [
            (16384, 3584, 18944, 7, bf16),  # Qwen2-7B, gate and up.
            (8192, 4864, 896, 64, f32),  # Qwen2-0.5B, down.
            (16384, 28672, 8192, 4, bf16),  # The widest.
        ],
        everywhere=2,
    ),
)
def test_grouped_matmul(slice_name, M, D, O, E, dtype):
    operands = shaped((dtype, M, D), (dtype, E, D, O))
    (sizes, dy) = shaped((jnp.int32, E), (dtype, M, O))

    def step(operands, sizes, dy):
        y, vjp = jax.vjp(lambda *v: grouped_matmul(*v, sizes, backend="pallas"), *operands)
        return y, vjp(dy)

    program = topology.compile_for(topology.describe(slice_name), step, operands, sizes, dy)
    assert len(slices.kernels_of(program)) == 3
    assert program.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.aot
@pytest.mark.parametrize(
    "slice_name, T, D, O, R, gated, dtype, rate, kind",
    slices.compiled(
        [
            (4096, 4096, 11008, 160, True, bf16, 0.0, ""),  # Qwen1.5-7B, gate and up, MedCare.
            (4096, 4096, 11008, 160, True, bf16, 0.05, ""),  # The same with dropout.
            (4096, 13696, 5120, 640, True, bf16, 0.0, ""),  # Qwen1.5-14B, down, five such banks.
            (4096, 3584, 512, 16, False, bf16, 0.0, ""),  # Qwen2-7B, k and v, plain LoRA.
            (2048, 11008, 4096, 160, True, bf16, 0.05, "nf4"),
            (2000, 896, 4864, 160, True, f32, 0.05, "nf4"),  # Qwen2-0.5B; tails of rows.
            (4000, 2048, 5504, 128, True, f32, 0.05, ""),  # Qwen1.5-1.8B; tails everywhere.
            (4096, 28672, 8192, 160, True, bf16, 0.0, ""),  # The widest.
            (2048, 4096, 11008, 160, True, bf16, 0.05, "int8"),
            (2048, 28672, 8192, 160, True, bf16, 0.05, "nf4"),  # The widest.
        ],
        everywhere=4,
    ),
)
def test_lora_linear(slice_name, T, D, O, R, gated, dtype, rate, kind):
    program = linear_step(slice_name, T, D, O, R, gated, dtype, rate, kind)
    assert len(slices.kernels_of(program)) == 2
    # A and B in x's dtype and rank columns, 128 at a time: nothing as large as W.
    rank_columns = 4 * (D + O) * R + 4 * 4 * T * -(-R // 128) * 128
    assert program.memory_analysis().temp_size_in_bytes < rank_columns


@pytest.mark.aot
@pytest.mark.parametrize(
    "slice_name, D, O",
    [
        ("v6e:1x1", 4096, 11008),  # Qwen1.5-7B, gate and up.
        ("v7x:1x1x1", 4096, 11008),
        ("v5e:1x1", 5504, 2048),  # Qwen1.5-1.8B, down: a width of an odd number of tiles.
    ],
)
def test_blocks_for_what_a_chip_has(slice_name, D, O):
    """A row of 2,048 tokens: all of x at once, where there is room for it."""
    assert (
        len(slices.kernels_of(linear_step(slice_name, 2048, D, O, 160, True, bf16, 0.05, ""))) == 2
    )


def linear_step(slice_name, T, D, O, R, gated, dtype, rate, kind):
    """The layer and its gradient, compiled with the blocks of that chip."""
    slice_ = topology.describe(slice_name)
    memory = fused.memory(slice_.devices[0])
    x, w, a, gate, b, dy = shaped(
        (dtype, T, D), (dtype, D, O), (f32, D, R), (f32, T, R), (f32, R, O), (dtype, T, O)
    )
    w = jax.eval_shape(quantised.KINDS[kind], w) if kind else w

    def step(x, w, a, gate, b, dy):
        words = Counter(jnp.arange(T, dtype=jnp.int32), jnp.arange(D, dtype=jnp.int32))
        dropout = Dropout(words, rate) if rate else None

        def f(x, a, gate, b):
            return lora_linear(x, w, a, gate, b, backend="pallas", dropout=dropout, memory=memory)

        y, vjp = jax.vjp(f, x, a, gate, b)
        return y, vjp(dy)

    return topology.compile_for(slice_, step, x, w, a, gate if gated else None, b, dy)
