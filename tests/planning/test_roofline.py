"""Bounds and floors against numbers worked out by hand, and against a compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import decoder as base_decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.parallel.topology import CHIPS
from medmoe_jax.planning import hlo
from medmoe_jax.planning.frozen import frozen_step
from medmoe_jax.planning.roofline import Bound, bound, floor_flops, lowest_layer
from tests import naive

# A layer holds 3·64 + 64 attention weights and 3·8·16 feed-forward ones: 640. The head has 256.
CONFIG = DecoderConfig(
    vocab_size=32, d_model=8, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=16
)
LAYER, HEAD = 4 * 64 + 3 * 8 * 16, 32 * 8
# Scores and their weighted sum, on half the row.
ATTENTION = 2 * 2 * 2 * 4 * 10 // 2


def test_the_busiest_resource_sets_the_bound():
    one = bound(CHIPS["v5e"], 197e9, 819e6 / 2, 200e6 / 4, 3.125e6 / 8)
    assert one == pytest.approx((1e-3, 0.5e-3, 0.25e-3, 0.125e-3))
    assert (one.seconds, one.resource) == (one.products, "products")
    assert Bound(1.0, 2.0, 4.0, 3.0).resource == "ici"


def test_floor_of_a_base_with_banks_everywhere():
    want = 100 * (4 * (4 * LAYER + HEAD) + 3 * 4 * ATTENTION)
    assert floor_flops(CONFIG, 100, 10, 0, {}) == want


def test_nothing_below_the_lowest_bank_goes_backward():
    want = 100 * (2 * (4 * LAYER + HEAD) + 2 * (LAYER + HEAD) + (4 + 2) * ATTENTION)
    assert floor_flops(CONFIG, 100, 10, 3, {}) == want


def test_base_leaves_that_train_need_their_own_gradient():
    trained = base_decoder.abstract(CONFIG)
    less = floor_flops(CONFIG, 100, 10, 0, {})
    assert floor_flops(CONFIG, 100, 10, 0, trained) - less == 100 * 2 * (4 * LAYER + HEAD)
    # The embedding of an untied base is looked up, not multiplied.
    assert floor_flops(CONFIG, 100, 10, 0, {"embed": trained["embed"]}) == less
    tied = {"embed": trained["embed"]}
    more = floor_flops(CONFIG.replace(tied=True), 100, 10, 0, tied) - less
    assert more == 100 * 2 * HEAD


@pytest.mark.parametrize(("length", "lowest"), [(10, 0), (10, 2), (3, 0), (64, 1)])
def test_a_window_hides_keys(length, lowest):
    windows = (0, 4, 9, 1)
    t, s = np.indices((length, length))
    pairs = [((s <= t) & ((w == 0) | (t - s < w))).sum() for w in windows]
    want = 2 * 2 * 2 * 4 * (sum(pairs) + 2 * sum(pairs[lowest:]))  # of a row
    decoder = CONFIG.replace(windows=windows)
    products = floor_flops(decoder, length, 0, lowest, {})
    counted = floor_flops(decoder, length, length, lowest, {}) - products
    # The pair of a query with its own key counts half.
    assert want - 2 * 2 * 2 * 4 * length / 2 * (4 + 2 * (4 - lowest)) <= counted <= want
    whole = floor_flops(CONFIG, length, length, lowest, {})
    for size in (0, length, length + 5):
        assert floor_flops(CONFIG.replace(windows=(size,) * 4), length, length, lowest, {}) == whole


def test_lowest_layer():
    def bank(start):
        return BankSpec("bank", ("mlp.up",), start, 4)

    roster = {"a": (bank(1), "frozen"), "b": (bank(3), "train"), "c": (bank(2), "gate")}
    assert lowest_layer(roster, {}, 4) == 2
    assert lowest_layer({"a": roster["a"]}, {}, 4) == 4
    assert lowest_layer(roster, {"layers": {}}, 4) == 0
    assert lowest_layer({}, {"head": None}, 4) == 4


@pytest.mark.shipped
def test_a_frozen_step_does_the_floor_s_work_and_gives_the_right_gradient():
    """Attention off TPU computes whole rows of scores, and once more in the backward pass."""
    B, T = 2, 12
    base = naive.random_params(CONFIG)
    batch = naive.random_batch(CONFIG, rows=((12,), (12,)), length=T)
    step = jax.jit(lambda base, batch: frozen_step(CONFIG, Execution(), base, batch))
    counted = hlo.count(step.lower(base, batch).compile().as_text()).flops
    products = floor_flops(CONFIG.replace(n_heads=2), B * T, 0, 0, {})
    whole = 2 * 2 * 2 * 4 * T * 4 * B * T  # both products of all layers
    assert counted == pytest.approx(products + 3.5 * whole, rel=0.02)

    loss, grad = step(base, batch)
    table = np.array(base["embed"], np.float64)

    token = int(batch["tokens"][1, 0])

    def shifted(by):
        """The loss with one embedding moved: the first token, never a target, gets its own id."""
        wide = {**base, "embed": jnp.asarray(np.concatenate([table, [table[token] + by]]))}
        tokens = np.array(batch["tokens"])
        tokens[1, 0] = len(table)
        return float(step(wide, {**batch, "tokens": tokens})[0])

    unit = np.eye(8)[3] * 1e-2
    want = (shifted(unit) - shifted(-unit)) / 2e-2
    assert abs(float(grad[1, 0, 3]) - want) < 2e-2 * abs(want) + 1e-5
    assert float(loss) == pytest.approx(shifted(0.0), rel=1e-4)
