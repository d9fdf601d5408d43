"""What compiled mixtures hold: nothing as large as tokens x experts x width, forward or backward.

Axes: T tokens, K picks, D input width, O output width, E experts, r rank, F feed-forward.
"""

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.planning.hlo import count
from medmoe_jax.routing.dispatch import strategy
from medmoe_jax.routing.terms import LoraTerm

pytestmark = pytest.mark.shipped

T, K, D, O, F, r = 2048, 2, 32, 48, 48, 4
FEW, MANY = 4, 64


def _float(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _compiled(loss, tree, experts):
    """`(temporaries, largest buffer, parameters)` in bytes of the gradient by every float."""
    tokens = {"x": _float(1, T, D), "dense": _float(1, T, experts), "weights": _float(1, T, K)}
    picks = jax.ShapeDtypeStruct((1, T, K), jnp.int32)

    def total(floats, picks):
        gates = Gates(floats["dense"], picks, floats["weights"])
        return jnp.sum(loss(floats, gates) ** 2)

    program = jax.jit(jax.grad(total)).lower({**tokens, **tree}, picks).compile()
    held = program.memory_analysis().temp_size_in_bytes
    return held, count(program.as_text()).largest.bytes, 4 * sum(x.size for x in tree.values())


def _lora(name, experts):
    def loss(t, gates):
        term = LoraTerm(t["x"], t["a"], t["b"], gates, None, 1.0)
        return strategy(name).lora({"mlp.up": [term]})["mlp.up"]

    return _compiled(loss, {"a": _float(D, experts, r), "b": _float(experts, r, O)}, experts)


def _ffn(name, experts):
    def loss(t, gates):
        params = {site: t[site] for site in ("gate", "up", "down")}
        return strategy(name).ffn(t["x"], gates, params, jax.nn.silu)

    tree = {site: _float(experts, D, F) for site in ("gate", "up")}
    return _compiled(loss, {**tree, "down": _float(experts, F, D)}, experts)


@pytest.mark.parametrize("run", [_lora, _ffn])
def test_grouped_holds_rows_whatever_the_experts(run):
    few, _, small = run("grouped", FEW)
    many, largest, big = run("grouped", MANY)
    # Transposed, padded and accumulated parameters, and a router's gates, may grow; rows may not.
    assert 4 * T * MANY < 4 * K * T * O
    gates = 4 * T * (MANY - FEW)
    assert many - few <= 3 * (big - small) + 2 * gates < 4 * T * (MANY - FEW) * D
    assert largest <= max(4 * K * T * O, big)


def test_stacked_grows_by_rank_columns_only():
    few, _, small = _lora("stacked", FEW)
    many, largest, big = _lora("stacked", MANY)
    columns = 4 * T * (MANY - FEW) * r
    assert many - few <= 4 * columns + 3 * (big - small) < 4 * T * (MANY - FEW) * D
    assert largest <= max(4 * T * MANY * r, big)


def test_stacked_networks_run_one_at_a_time():
    few, _, small = _ffn("stacked", FEW)
    many, largest, big = _ffn("stacked", MANY)
    gates = 4 * T * (MANY - FEW)
    assert many - few <= 3 * (big - small) + 4 * gates < 4 * T * (MANY - FEW) * D
    assert largest <= max(4 * T * F, 4 * T * MANY, big)
