"""The kernels compile for the chips they are for, at the sizes of real models."""

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.kernels import permute, routing
from medmoe_jax.parallel import topology

pytestmark = pytest.mark.aot

SLICES = ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"]
TOKENS = 4096
# Model and feed-forward width of Qwen1.5 1.8B, 7B, 14B and Qwen2 7B; the widest there is.
WIDTHS = (2048, 5504, 4096, 11008, 5120, 13696, 3584, 18944)
WIDEST = 28672


@pytest.fixture(params=SLICES)
def chip(request):
    """One chip of each kind."""
    return topology.describe(request.param)


def struct(*shape, dtype=jnp.bfloat16):
    """A shape to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def kernels_in(compiled) -> int:
    """Mosaic kernels in a compiled program."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("width, experts", [*((width, 8) for width in WIDTHS), (WIDEST, 512)])
def test_router(chip, width, experts):
    def loss(x, kernel, bias, valid, forced):
        options = {"top_k": 2, "renormalise": True, "forced_T": forced}
        out = routing.route(x, kernel, bias, valid, **options, backend="pallas")
        return jnp.sum(out.weights_TxK[:, 0]) + jnp.sum(out.stats.prob_E**2) + out.stats.z2

    compiled = topology.compile_for(
        chip,
        jax.value_and_grad(loss, (0, 1, 2)),
        struct(TOKENS, width),
        struct(width, experts, dtype=jnp.float32),
        struct(experts, dtype=jnp.float32),
        struct(TOKENS, dtype=jnp.bool_),
        struct(TOKENS, dtype=jnp.int32),
    )
    assert kernels_in(compiled) == 2
    # Logits and their gradient, [E, T], and copies of the router's own matrix; nothing as big as x.
    small = 4 * experts * (4 * TOKENS + 4 * width) + 2**20
    assert compiled.memory_analysis().temp_size_in_bytes < small


@pytest.mark.parametrize(
    "width, experts", [(2048, 8), (4096, 512), (13696, 8), (18944, 8), (WIDEST, 512)]
)
def test_permutation(chip, width, experts):
    def loss(x, weights, picks):
        order = permute.sort_by_expert(picks, experts, backend="pallas")
        x_MxD = permute.gather(x, order, backend="pallas")
        weight_M = weights.reshape(-1)[order.source_M]
        y_MxD = ((x_MxD * x_MxD).astype(jnp.float32) * weight_M[:, None]).astype(x_MxD.dtype)
        y_TxD = permute.scatter_add(y_MxD, order, backend="pallas")
        return jnp.sum(y_TxD.astype(jnp.float32) ** 2)

    compiled = topology.compile_for(
        chip,
        jax.value_and_grad(loss, (0, 1)),
        struct(TOKENS, width),
        struct(TOKENS, 2, dtype=jnp.float32),
        struct(TOKENS, 2, dtype=jnp.int32),
    )
    assert kernels_in(compiled) == 5
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
        assert kernels_in(topology.compile_for(chip, sums, x, picks)) == 3


def test_the_router_in_float32_and_with_uneven_shapes(chip):
    def prob(x, kernel, valid):
        options = {"top_k": 13, "renormalise": False, "backend": "pallas"}
        return jnp.sum(routing.route(x, kernel, None, valid, **options).stats.prob_E ** 2)

    for shape in ((1001, 1100), (7, 40)):
        x, kernel = struct(*shape, dtype=jnp.float32), struct(shape[1], 13, dtype=jnp.float32)
        valid = struct(shape[0], dtype=jnp.bool_)
        assert kernels_in(topology.compile_for(chip, jax.grad(prob, (0, 1)), x, kernel, valid)) == 2
