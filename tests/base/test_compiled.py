"""What the compiler makes of a step: no large logits, no copy of the base, no work below banks."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.adapters import bank, model
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import chunks, decoder, loss, quantised
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.base.execution import Execution

pytestmark = pytest.mark.shipped

# Weights dominate: 33 MB a stack of which one layer is a twelfth, and eight tokens.
WIDE = DecoderConfig(
    vocab_size=64, d_model=128, n_layers=12, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=512
)


def _step(config: AdaptedConfig, banks, base, tokens, segments, positions):
    x, _, _ = model.hidden(config, base, banks, tokens, segments, positions)
    targets, weights = loss.next_token_targets(tokens, jnp.ones_like(tokens), segments)
    head = decoder.head(base)
    return loss.cross_entropy(config.decoder, False, head, x, targets, weights)


def _compile(config, specs, execution, shape, quantise=""):
    encode = functools.partial(quantised.quantise, kind=quantise)
    base = jax.eval_shape(encode, decoder.abstract(config))
    banks = {s.name: bank.abstract(s, config) for s in specs}
    ids = [jax.ShapeDtypeStruct(shape, jnp.int32)] * 3
    step = functools.partial(_step, AdaptedConfig(config, specs, execution))
    return jax.jit(jax.value_and_grad(step)).lower(banks, base, *ids).compile()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_copy_of_the_base(remat):
    """With two segments, temporaries stay far below the base's bytes."""
    specs = (
        BankSpec("low", ("attn.q", "attn.o"), 0, 12, rank=2),
        BankSpec("high", ("mlp.up", "mlp.down"), 4, 12, experts=3, rank=2, gate="token"),
    )
    compiled = _compile(WIDE, specs, Execution(remat=remat), (1, 8))
    base_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(decoder.abstract(WIDE)))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * base_bytes


@pytest.mark.parametrize("kind", sorted(quantised.KINDS))
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_float_copy_of_a_quantised_base(kind, remat):
    """A step holds the float values of a layer or two, not of all twelve."""
    specs = (BankSpec("b", ("attn.q", "mlp.down"), 0, 12, rank=2),)
    compiled = _compile(WIDE, specs, Execution(remat=remat), (1, 8), kind)
    floats = sum(leaf.size * 4 for leaf in jax.tree.leaves(decoder.abstract(WIDE)))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * floats


def test_no_large_logits(monkeypatch):
    """Float32 logits exist for a chunk of tokens only, in the loss and in its gradient."""
    B, T, V = 2, 48, 1000
    config = WIDE.replace(vocab_size=V, d_model=16, n_layers=2, d_ff=16)
    monkeypatch.setattr(chunks, "_ELEMENTS", B * 16 * V)
    specs = (BankSpec("a", ("attn.q",), 0, 2, rank=2),)

    def largest(text):
        sizes = re.findall(r"f32\[((?:\d+,)*\d+)\]", text)
        shapes = [[int(n) for n in s.split(",")] for s in sizes]
        counts = [functools.reduce(lambda a, b: a * b, s) for s in shapes if V in s]
        return max(counts)

    assert largest(_compile(config, specs, Execution(), (B, T)).as_text()) == B * 16 * V
    monkeypatch.setattr(chunks, "_ELEMENTS", B * T * V)
    assert largest(_compile(config, specs, Execution(), (B, T)).as_text()) == B * T * V


def test_no_backward_work_below_the_lowest_bank():
    """FLOPs are 2·P·T + 2·P_above·T, give or take the adapters', attention and the head."""
    L, T = 6, 16
    # Unrolled, because the compiler counts the body of a loop once.
    execution = Execution(unroll=L)
    config = WIDE.replace(n_layers=L, vocab_size=8)
    layer = sum(d_in * d_out for d_in, d_out in site_shapes(config).values())
    flops = {}
    for name, start in (("all", 0), ("half", 3), ("last", L - 1)):
        specs = (BankSpec("b", ("attn.q", "mlp.up"), start, L, rank=2),)
        compiled = _compile(config, specs, execution, (1, T))
        flops[name] = compiled.cost_analysis()["flops"]
        floor = 2 * layer * T * (L + (L - start))
        # Of the lowest layer, what feeds q needs no gradient: at most one layer less than all.
        assert floor - 2 * layer * T < flops[name] < 1.12 * floor, (name, flops[name] / floor)
    assert flops["last"] < 0.66 * flops["all"]
