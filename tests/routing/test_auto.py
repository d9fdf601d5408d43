"""The choice of a strategy: its counts by hand, and what it picks for shapes of every size."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from medmoe_jax.kernels.router_equations import Gates
from medmoe_jax.parallel.topology import CHIPS
from medmoe_jax.routing import auto
from medmoe_jax.routing.auto import Ffn, Lora, Machine
from medmoe_jax.routing.dispatch import strategy
from medmoe_jax.routing.terms import LoraTerm

MACHINES = {
    kind: auto.machine(SimpleNamespace(device_kind=kind))
    for kind in (*(chip.kind for chip in CHIPS.values()), "cpu")
}
# gate + up or q of Qwen1.5-7B, and what the published recipes put there.
SEVEN_B = ((4096, 11008), (4096, 4096))
PUBLISHED = {"eight of rank 16, top 2": (2, 8, 16), "seven of rank 16, top 2": (2, 7, 16)}


@pytest.fixture(autouse=True)
def forget():
    """Choices are remembered for the whole process."""
    auto.choose.cache_clear()


def best(machine, shapes, tokens):
    """The name of the choice; processors train in float32."""
    itemsize = 4 if machine is MACHINES["cpu"] else 2
    return auto.choose("x", machine, shapes, tokens, itemsize)


def test_machines():
    assert len(set(MACHINES.values())) == 5
    assert MACHINES["TPU v5 lite"] == Machine(197e12, 819e9, 400e9, 128)
    assert MACHINES["TPU v6 lite"].columns == MACHINES["TPU7x"].columns == 256
    assert auto.machine(jax.devices()[0]) == MACHINES["cpu"]


def test_low_rank_counts_by_hand():
    """Two terms of 3 and 5 columns share a tile of 4; memory bounds the products of one of them."""
    chip = Machine(flops=100.0, memory=10.0, link=1.0, columns=4)
    terms = (Lora(1, 2, 3, 3, 1), Lora(2, 4, 6, 5, 1))
    seconds = auto.lora_seconds(chip, terms, 7, 2)
    # 2 * 7 * 3 * 5 / 100 = 2.1 is less than 7 * 5 * 2 / 10 = 7, and so on.
    assert seconds["stacked"] == pytest.approx(3 * (7.0 + 14.0))
    one = 3 * 7.0 + 4 * 7 * 5 * 2 / 10
    two = 3 * 28.0 + 4 * 14 * 10 * 2 / 10
    assert seconds["grouped"] == pytest.approx(one + two)
    slow = chip._replace(flops=10.0)
    assert auto.lora_seconds(slow, terms, 7, 2)["stacked"] == pytest.approx(3 * (21.0 + 70.0))


def test_feed_forward_counts_by_hand():
    chip = Machine(flops=100.0, memory=10.0, link=5.0, columns=4)
    seconds = auto.ffn_seconds(chip, Ffn(2, 3, 5, 8, 4), 7, 2)
    gather = 3 * 3 * (8 * 3 * 5) * 2 * 0.75 / 5
    move = 8 * 2 * 7 * 3 * 2 / 10
    assert seconds == pytest.approx(
        {
            "stacked": 24 * 8 * 7 * 15 / 100 + gather,
            "grouped": 18 * 2 * 7 * 15 / 100 + move + gather,
            "all_to_all": 18 * 2 * 7 * 15 / 100 + 2 * move + 4 * 2 * 7 * 3 * 2 * 0.75 / 5,
        }
    )
    assert set(auto.ffn_seconds(chip, Ffn(2, 3, 5, 6, 4), 7, 2)) == {"stacked", "grouped"}
    assert set(auto.ffn_seconds(chip, Ffn(2, 3, 5, 8, 1), 7, 2)) == {"stacked", "grouped"}


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("tokens", [1024, 8192, 65536])
def test_published_banks_are_stacked_and_many_experts_grouped(kind, tokens):
    for D, O in SEVEN_B:
        for K, E, r in PUBLISHED.values():
            assert best(MACHINES[kind], (Lora(K, D, O, E, r),) * 2, tokens) == "stacked"
        assert best(MACHINES[kind], (Lora(2, D, O, 512, 16),) * 2, tokens) == "grouped"


@pytest.mark.parametrize("kind", CHIPS)
def test_whole_networks_travel_where_they_are_spread(kind):
    machine = MACHINES[CHIPS[kind].kind]
    assert best(machine, (Ffn(2, 3584, 18944, 8, 4),), 2048) == "all_to_all"
    assert best(machine, (Ffn(2, 3584, 18944, 8, 1),), 2048) == "grouped"
    assert best(machine, (Ffn(2, 3584, 18944, 7, 4),), 2048) == "grouped"


@pytest.mark.parametrize(("experts", "want"), [(4, "stacked"), (512, "grouped")])
def test_a_mixture_is_chosen_and_logged_once(experts, want, caplog):
    D, O, r, shape = 64, 96, 4, (2, 512)

    def trace(length):
        float_ = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
        gates = Gates(
            float_(*shape, experts), jax.ShapeDtypeStruct((*shape, 1), jnp.int32), float_(*shape, 1)
        )
        site = (float_(*shape, D), float_(D, experts, r), float_(experts, r, O), gates)
        lora = strategy("auto").lora
        jax.eval_shape(lambda *t: lora({"mlp.up": [LoraTerm(*t, None, 1.0)] * length}), *site)

    with caplog.at_level(logging.INFO, logger="medmoe_jax"):
        trace(1)
        trace(1)
        trace(2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith(f"dispatch of mlp.up: {want}, for 1024 tokens a chip (stacked ")
