"""One adapted model, compiled once: banks of every kind on overlapping layer ranges."""

import functools

import jax
import pytest

from medmoe_jax.adapters import model
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.loss import logits
from tests import naive
from tests.naive import TINY

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
SPECS = (
    BankSpec("attention", ATTENTION, 0, 3, rank=3, alpha=6.0),
    BankSpec("noise", MLP, 1, 3, experts=4, rank=2, alpha=4.0, gate="token", top_k=2),
    BankSpec("knowledge", MLP, 0, 2, rank=4, alpha=5.0, rank_stabilised=True),
    BankSpec("skills", ("attn.o", "mlp.up"), 1, 2, experts=3, rank=2, alpha=3.0,
             learned_scale=True),
    BankSpec("plain_weights", ("mlp.down",), 2, 3, experts=3, rank=2, gate="token", top_k=1,
             renormalise=False, router_bias=False),
)  # fmt: skip


@functools.cache
def compiled_logits(specs, execution=Execution()):
    """`(base, banks, batch) -> logits`, compiled once for a choice of banks."""
    config = AdaptedConfig(TINY, specs, execution)

    @jax.jit
    def run(base, banks, batch):
        ids = (batch[k] for k in ("tokens", "segment_ids", "positions"))
        x, _, aux = model.hidden(config, base, banks, *ids)
        return logits(TINY, decoder.head(base), x), aux

    return run


@pytest.fixture(scope="session")
def base():
    return naive.random_params(TINY)


@pytest.fixture(scope="session")
def banks():
    return naive.random_banks(SPECS, TINY)


@pytest.fixture(scope="session")
def batch():
    return naive.random_batch(TINY, rows=((4, 2), (5,)), length=7)
