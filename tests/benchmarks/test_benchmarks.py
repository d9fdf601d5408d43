"""The benchmark's own parts: its baselines compute what they claim to."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import dense_gather, sweeps, timing, variants
from medmoe_jax.base import decoder
from medmoe_jax.base.execution import Execution
from medmoe_jax.kernels.router_equations import choose_experts
from medmoe_jax.routing.dispatch import Reference
from medmoe_jax.routing.routers import without_padding
from medmoe_jax.routing.terms import LoraTerm
from tests.naive import TINY, random_params, rel, tree_rel

B, T, D, O, E, r = 2, 5, 6, 7, 4, 3


def _terms(params):
    valid = jnp.arange(B * T).reshape(B, T) % 4 > 0
    gates = without_padding(choose_experts(params["logits"], 2, renormalise=True).gates, valid)
    a, b, c, d = (params[name] for name in "abcd")
    routed = LoraTerm(params["x"], a, b, gates, params["scale"], 1.5)
    return {"up": [routed, LoraTerm(params["x"], c, d, None, None, 2.0)]}


@pytest.mark.parametrize("name", dense_gather.BASELINES)
def test_the_baselines_are_reference(name):
    rng = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "a": (D, E, r), "b": (E, r, O), "c": (D, 1, r), "d": (1, r, O)}
    shapes |= {"logits": (B, T, E), "scale": (E, r)}
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    mix = jnp.asarray(rng.standard_normal((B, T, O)), jnp.float32)

    def value_and_grad(strategy):
        lora = strategy(Execution()).lora
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(lora(_terms(p))["up"] * mix)))(params)

    got, want = map(value_and_grad, (dense_gather.BASELINES[name], Reference))
    assert rel(got[0], want[0]) < 1e-5
    assert tree_rel(got[1], want[1]) < 1e-4


def test_frozen_step_gives_the_gradient_of_the_embedded_tokens():
    """Summed over equal tokens it is the gradient of the embedding's rows."""
    params = random_params(TINY)
    batch = variants.make_batch(TINY, 2, 8)
    step = jax.jit(functools.partial(variants.frozen_step, TINY, Execution()))
    grad, loss = step(jnp.zeros((2, 8, 16)), params, batch)

    def through_rows(embed):
        x = embed[batch["tokens"]]
        return variants.frozen_loss(TINY, Execution(), x, params, batch)

    rows = jax.jit(jax.grad(through_rows))(params["embed"])
    want = np.zeros(params["embed"].shape)
    np.add.at(want, np.asarray(batch["tokens"]), np.asarray(grad))
    assert rel(rows, want) < 1e-5
    hidden, _, _ = decoder.hidden(
        TINY, params, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    z = np.asarray(hidden @ decoder.head(params).T, np.float64)[:, :-1]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.asarray(batch["tokens"])[:, 1:, None], -1)
    assert rel(loss, -picked.mean()) < 1e-5


@pytest.mark.slow
def test_adapted_variants_take_the_same_step():
    """Whatever the strategy; and the loss falls."""
    dense_gather.register()
    config = TINY.replace(n_layers=1)
    specs = variants.medcare_stage_1(config)
    routed = [(s.name, s.experts, s.rank, s.top_k) for s in specs if s.routed]
    assert routed == [("noise", 8, 16, 2)]
    losses = []
    for dispatch in ("stacked", "dense_gather"):
        run, carry, frozen = variants.adapted_variant(
            config, Execution(), random_params(config), specs, dispatch
        )
        for _ in range(2):
            carry, loss = run(carry, frozen, variants.make_batch(config, 2, 8))
            losses.append(float(loss))
    assert losses[1] < losses[0]
    assert rel(losses[2:], losses[:2]) < 1e-5


def test_every_strategy_gives_the_same_gradient_on_a_swept_site(monkeypatch):
    monkeypatch.setattr(sweeps, "DECODER", TINY)
    inputs = sweeps._inputs(8, 16)
    want = jax.jit(functools.partial(sweeps.site_step, "reference"))(inputs)
    for name in ("stacked", "grouped", "auto"):
        assert tree_rel(jax.jit(functools.partial(sweeps.site_step, name))(inputs), want) < 1e-4


def test_rounds_interleave():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    assert set(timing.interleaved(calls, 3)) == {"a", "b"}
    assert order == ["a", "b", *"ab", *"ba", *"ab"]
    order.clear()
    timing.interleaved(calls, 4, rare=("a",))
    assert order == ["a", "b", *"ab", "b", "b", *"ba"]


def test_the_figures_of_one_gpu_are_the_committed_ones():
    """Those in docs/costs.md and in the table of benchmarks/README.md."""
    root = Path(__file__).parents[2]
    shapes = json.loads((root / "benchmarks/results/gpu.json").read_text())["shapes"]
    tables = {name: (root / name).read_text() for name in ("docs/costs.md", "benchmarks/README.md")}

    def row(step):
        llama, qwen = (shapes[name][step] for name in ("llama3-8b", "qwen2.5-7b"))
        assert llama["remat"] == qwen["remat"]
        figures = [f"{one['tokens_per_second']:,.0f}" for one in (llama, qwen)]
        return llama["remat"], " | ".join(figures)

    for step in shapes["llama3-8b"]:
        remat, figures = row(step)
        assert f"| `{step}` | {remat} | {figures} |" in tables["benchmarks/README.md"]
    for step in ("lora_packed", "medcare_packed"):
        assert f"| {row(step)[1]} |" in tables["docs/costs.md"]
