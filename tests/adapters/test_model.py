"""The adapted model against a loop over layers, sites, banks, tokens and experts in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import bank, model
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, loss
from medmoe_jax.base.execution import Execution
from medmoe_jax.base.seam import Context
from medmoe_jax.errors import ParameterError
from medmoe_jax.routing import telemetry
from tests import naive
from tests.adapters.conftest import SPECS, compiled_logits
from tests.naive import TINY, rel, tree_rel


def adapted_nll(config, banks, base, batch, key=None):
    """Σ −log p and the router sums."""
    ids = (batch[k] for k in ("tokens", "segment_ids", "positions"))
    x, _, aux = model.hidden(config, base, banks, *ids, context=Context(dropout_key=key))
    targets, weights = loss.next_token_targets(
        batch["tokens"], batch["loss_mask"], batch["segment_ids"]
    )
    head = decoder.head(base)
    return loss.cross_entropy(config.decoder, False, head, x, targets, weights), aux


@functools.cache
def compiled_gradient(execution=Execution(), dispatch="stacked", specs=SPECS):
    config = AdaptedConfig(TINY, specs, execution, dispatch)
    return jax.jit(jax.value_and_grad(functools.partial(adapted_nll, config), has_aux=True))


def test_logits(base, banks, batch):
    got, _ = compiled_logits(SPECS)(base, banks, batch)
    real = batch["segment_ids"] > 0
    want = naive.logits(TINY, base, batch, naive.adapted(SPECS, banks))
    assert rel(got[real], want[real]) < 1e-5
    assert rel(naive.logits(TINY, base, batch)[real], want[real]) > 0.1


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_bank_and_scale_counts(base, banks, batch, spec):
    """The comparison above would see any bank missing and any factor wrong."""
    real = batch["segment_ids"] > 0
    full, _ = compiled_logits(SPECS)(base, banks, batch)
    others = tuple(s for s in SPECS if s != spec)
    # The naive model is exact to 1e-5 of the compiled one, so it may stand for it here.
    without = naive.logits(TINY, base, batch, naive.adapted(others, banks, margin=0))
    assert rel(without[real], full[real]) > 1e-2
    halved = naive.adapted(SPECS, banks, scales={spec.name: spec.s * 0.9}, margin=0)
    assert rel(naive.logits(TINY, base, batch, halved)[real], full[real]) > 1e-3


@pytest.mark.slow
def test_gradient(base, banks, batch):
    (value, _), grads = compiled_gradient()(banks, base, batch)

    def want(banks):
        return naive.nll(TINY, base, batch, naive.adapted(SPECS, banks))

    assert abs(value / want(banks) - 1) < 1e-5
    naive.check_gradient(want, banks, grads, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("execution", "dispatch"),
    [(Execution(remat="full"), "stacked"), (Execution(remat="dots", unroll=3), "reference")],
    ids=["full", "dots-unrolled-reference"],
)
def test_execution_changes_nothing(base, banks, batch, execution, dispatch):
    (want, stats), want_grads = compiled_gradient()(banks, base, batch)
    (got, other), grads = compiled_gradient(execution, dispatch)(banks, base, batch)
    assert abs(got / want - 1) < 1e-6
    assert tree_rel(grads, want_grads) < 1e-4
    assert tree_rel(other, stats) < 1e-6


def test_fresh_banks_change_nothing(base, batch):
    """LoRA experts with a router, and a bank with a learned scale."""
    specs = (SPECS[1], SPECS[3])
    banks = {s.name: bank.init(s, TINY, jax.random.key(0)) for s in specs}
    fresh, _ = compiled_logits(specs)(base, banks, batch)
    assert np.array_equal(fresh, compiled_logits(())(base, {}, batch)[0])


def test_router_statistics(base, banks, batch):
    """Per layer and site, over the tokens that are not padding."""
    _, aux = compiled_logits(SPECS)(base, banks, batch)
    stats = telemetry.collect(aux)
    assert set(stats) == {
        *(f"noise/{site}" for site in ("mlp.gate", "mlp.up", "mlp.down")),
        "plain_weights/mlp.down",
    }
    real = int((batch["segment_ids"] > 0).sum())
    uses = {}

    def linear(layer, site, x, weight):
        if site in SPECS[1].sites and layer >= 1:
            router = naive.f64(banks["noise"][site]["router"])
            gates = [
                naive.router_gates(v, router, layer - 1, 2, True, 1e-3) for v in x if np.any(v)
            ]
            uses.setdefault(site, np.zeros((2, 4)))[layer - 1] += np.sum(np.array(gates) > 0, 0)
        return naive.adapted(SPECS, banks)(layer, site, x, weight)

    rows = [{k: v[b : b + 1, : (batch["segment_ids"][b] > 0).sum()] for k, v in batch.items()}
            for b in range(2)]  # fmt: skip
    for row in rows:
        naive.logits(TINY, base, row, linear)
    for site, use in uses.items():
        got = stats[f"noise/{site}"]
        assert np.array_equal(got.tokens, [real, real])
        assert np.array_equal(got.use_E, use)
        assert np.allclose(telemetry.summarise(got)["use"].sum(-1), 1)


def test_inactive_banks_may_be_present(base, banks, batch):
    """Parameters of banks that the config does not name are left alone."""
    some = SPECS[:1]
    got = compiled_logits(some)(base, banks, batch)[0]
    assert np.array_equal(got, compiled_logits(some)(base, {"attention": banks["attention"]},
                                                     batch)[0])  # fmt: skip


def test_bfloat16(base, banks, batch):
    """At most twice the bare base's own error in bfloat16."""
    specs = tuple(s for s in SPECS if s.gate == "always")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    real = batch["segment_ids"] > 0

    def error(specs):
        low = compiled_logits(specs, Execution(dtype=jnp.bfloat16))(half, banks, batch)[0]
        want = naive.logits(TINY, half, batch, naive.adapted(specs, banks))
        return rel(low[real], want[real])

    assert 0 < error(specs) <= 2 * max(error(()), 2**-8)


def test_dispatch_is_checked(banks):
    with pytest.raises(ParameterError, match=r"^dispatch: "):
        model.ranges(AdaptedConfig(TINY, SPECS, dispatch="magic"), banks)


def test_ranges_end_where_banks_change(banks):
    ranges = model.ranges(AdaptedConfig(TINY, SPECS[1:]), banks)
    assert [(r.start, r.stop) for r in ranges] == [(0, 1), (1, 2), (2, 3)]
    assert [set(r.params) for r in ranges] == [
        {"knowledge"},
        {"noise", "knowledge", "skills"},
        {"noise", "plain_weights"},
    ]
    bare = model.ranges(AdaptedConfig(TINY, SPECS[4:]), banks)
    assert [(r.start, r.stop, type(r.seam).__name__) for r in bare] == [
        (0, 2, "BareSeam"),
        (2, 3, "AdaptedSeam"),
    ]
