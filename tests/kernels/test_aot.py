"""The kernels compile for the chips they are for, at the sizes of real models."""

import functools

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.kernels import permute, routing
from medmoe_jax.kernels.grouped import grouped_lora
from medmoe_jax.kernels.lora_linear import lora_linear
from medmoe_jax.parallel import topology
from tests import slices

pytestmark = pytest.mark.aot

TOKENS = 4096
# Model and feed-forward width of Qwen1.5 1.8B, 7B, 14B and Qwen2 7B; the widest there is.
WIDTHS = (2048, 5504, 4096, 11008, 5120, 13696, 3584, 18944)
WIDEST = 28672


@pytest.fixture(params=slices.CHIPS)
def chip(request):
    """One chip of each kind."""
    return topology.describe(request.param)


def struct(*shape, dtype=jnp.bfloat16):
    """A shape to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "name, width, experts",
    slices.compiled([*((width, 8) for width in WIDTHS), (WIDEST, 512)], everywhere=2),
)
def test_router(name, width, experts):
    def loss(x, kernel, bias, valid, forced):
        options = {"top_k": 2, "renormalise": True, "forced_T": forced}
        out = routing.route(x, kernel, bias, valid, **options, backend="pallas")
        return jnp.sum(out.weights_TxK[:, 0]) + jnp.sum(out.stats.prob_E**2) + out.stats.z2

    compiled = topology.compile_for(
        topology.describe(name),
        jax.value_and_grad(loss, (0, 1, 2)),
        struct(TOKENS, width),
        struct(width, experts, dtype=jnp.float32),
        struct(experts, dtype=jnp.float32),
        struct(TOKENS, dtype=jnp.bool_),
        struct(TOKENS, dtype=jnp.int32),
    )
    assert len(slices.kernels_of(compiled)) == 2
    # Logits and their gradient, [E, T], and copies of the router's own matrix; nothing as big as x.
    small = 4 * experts * (4 * TOKENS + 6 * width) + 2**20
    assert compiled.memory_analysis().temp_size_in_bytes < small


@pytest.mark.parametrize(
    "name, width, experts",
    slices.compiled(
        [(2048, 8), (576, 8), (13696, 8), (18944, 8), (4096, 512), (WIDEST, 512)], everywhere=2
    ),
)
def test_permutation(name, width, experts):
    def loss(x, weights, picks):
        order = permute.sort_by_expert(picks, experts, backend="pallas")
        x_MxD = permute.gather(x, order, backend="pallas")
        weight_M = weights.reshape(-1)[order.source_M]
        y_MxD = ((x_MxD * x_MxD).astype(jnp.float32) * weight_M[:, None]).astype(x_MxD.dtype)
        y_TxD = permute.scatter_add(y_MxD, order, backend="pallas")
        return jnp.sum(y_TxD.astype(jnp.float32) ** 2)

    compiled = topology.compile_for(
        topology.describe(name),
        jax.value_and_grad(loss, (0, 1)),
        struct(TOKENS, width),
        struct(TOKENS, 2, dtype=jnp.float32),
        struct(TOKENS, 2, dtype=jnp.int32),
    )
    assert len(slices.kernels_of(compiled)) == 5
    # Sorted rows, their gradients and what the kernels fetch from: whatever the number of experts.
    rows = 2 * TOKENS * width * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * rows


def test_the_permutation_in_float32_and_with_uneven_shapes(chip):
    def sums(x, picks):
        order = permute.sort_by_expert(picks, 13, backend="pallas")
        return permute.scatter_add(
            permute.gather(x, order, backend="pallas"), order, backend="pallas"
        )

    for shape in ((1001, 896), (7, 128)):
        x, picks = struct(*shape, dtype=jnp.float32), struct(shape[0], 3, dtype=jnp.int32)
        assert len(slices.kernels_of(topology.compile_for(chip, sums, x, picks))) == 3


def test_the_router_in_float32_and_with_uneven_shapes(chip):
    def prob(x, kernel, valid):
        options = {"top_k": 13, "renormalise": False, "backend": "pallas"}
        return jnp.sum(routing.route(x, kernel, None, valid, **options).stats.prob_E ** 2)

    for shape in ((1001, 1100), (7, 40)):
        x, kernel = struct(*shape, dtype=jnp.float32), struct(shape[1], 13, dtype=jnp.float32)
        valid = struct(shape[0], dtype=jnp.bool_)
        assert (
            len(
                slices.kernels_of(
                    topology.compile_for(chip, jax.grad(prob, (0, 1)), x, kernel, valid)
                )
            )
            == 2
        )


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, jnp.bfloat16), (3, jnp.bfloat16), (5, jnp.bfloat16), (1, jnp.float32)]
)
def test_few_tokens(tokens, dtype):
    """As when one row is decoded: every kernel, at a width that its blocks do not divide."""
    D, O, E, r = 11008, 4096, 8, 16

    def one_pass(x, w, a, gate, b):
        return lora_linear(x, w, a, gate, b, backend="pallas")

    def sparse(x, router, bias, valid, a, b):
        out = routing.route(x, router, bias, valid, top_k=2, renormalise=True, backend="pallas")
        order = permute.sort_by_expert(out.picks_TxK, E, backend="pallas")
        x_MxD = permute.gather(x, order, backend="pallas")
        weight_M = out.weights_TxK.reshape(-1)[order.source_M]
        y_MxO = grouped_lora(x_MxD, a, b, weight_M, order.sizes_E, backend="pallas")
        return permute.scatter_add(y_MxO, order, backend="pallas")

    chip, f32 = topology.describe("v5e:1x1"), functools.partial(struct, dtype=jnp.float32)
    x = struct(tokens, D, dtype=dtype)
    side_by_side = f32(D, E * r), f32(tokens, E * r), f32(E * r, O)
    topology.compile_for(chip, one_pass, x, struct(D, O, dtype=dtype), *side_by_side)
    valid, banks = struct(tokens, dtype=jnp.bool_), (f32(E, r, D), f32(E, r, O))
    topology.compile_for(chip, sparse, x, f32(D, E), f32(E), valid, *banks)
