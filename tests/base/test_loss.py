"""Cross-entropy, log-probabilities and targets against plain numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base import chunks, loss
from medmoe_jax.base.execution import Execution
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.planning import hlo
from tests.naive import TINY, check_gradient, rel

B, T, D, V = 2, 6, 5, 17
CASES = {
    "plain": TINY.replace(vocab_size=V),
    "padded_vocabulary": TINY.replace(vocab_size=V, vocab_used=13),
    "softcap": TINY.replace(vocab_size=V, final_softcap=1.5),
    "both": TINY.replace(vocab_size=V, final_softcap=1.5, vocab_used=13),
}


def _inputs(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "head": jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
        "x": jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32),
        "targets": rng.integers(0, config.vocab_used or V, (B, T)).astype(np.int32),
        "weights": jnp.asarray(rng.choice([0, 1, 0.5, 2], (B, T)), jnp.float32),
    }


def _naive_log_probs(config, head, x, targets):
    z = x @ head.T
    if config.final_softcap:
        z = config.final_softcap * np.tanh(z / config.final_softcap)
    z = z[..., : config.vocab_used or None]
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])


@pytest.fixture(params=[1, 5, 12], ids=lambda n: f"{n}-tokens-a-chunk")
def chunk(request, monkeypatch):
    """12 tokens: a chunk each, two chunks of five and a rest, and one chunk."""
    monkeypatch.setattr(chunks, "_ELEMENTS", request.param * V)
    into = chunks.divide(Execution(), B, T, V)
    assert (into.tokens, into.count) == (request.param, math.ceil(B * T / request.param))
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_token_log_probs(name, chunk):
    config, i = CASES[name], _inputs(CASES[name])
    head, x = (np.asarray(i[k], np.float64) for k in ("head", "x"))
    ids = np.arange(config.vocab_used or V)[:, None, None]
    all_VxBxT = np.stack([_naive_log_probs(config, head, x, np.full((B, T), n)) for n in ids])
    targets = np.array(i["targets"])
    targets[:, ::3] = all_VxBxT.argmax(0)[:, ::3]
    there = np.asarray(i["weights"]) != 0
    got, likeliest = loss.token_log_probs(config, i["head"], i["x"], targets, i["weights"])
    assert rel(got, np.where(there, _naive_log_probs(config, head, x, targets), 0)) < 1e-5
    np.testing.assert_array_equal(likeliest, there & (all_VxBxT.argmax(0) == targets))
    assert likeliest.any() and not likeliest.all()


def test_of_equal_logits_the_first_is_the_likeliest():
    config = TINY.replace(vocab_size=4)
    head = jnp.array([[0, 1], [1, 0], [1, 0], [0, 0]], jnp.float32)
    x, targets = jnp.tile(jnp.array([1.0, 0.0]), (1, 4, 1)), jnp.arange(4)[None]
    _, likeliest = loss.token_log_probs(config, head, x, targets, jnp.ones((1, 4)))
    assert likeliest.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(name, train_head, chunk):
    config, i = CASES[name], _inputs(CASES[name])
    targets, weights = i["targets"], np.asarray(i["weights"], np.float64)

    def want(p):
        return -(_naive_log_probs(config, p["head"], p["x"], targets) * weights).sum()

    def got(p, scale):
        args = (p["head"], p["x"], targets, i["weights"])
        return scale * loss.cross_entropy(config, train_head, *args)

    p = {k: i[k] for k in ("head", "x")}
    # A factor after the loss must reach the gradients, which the forward pass already holds.
    value, grads = jax.jit(jax.value_and_grad(got))(p, 3.0)
    forward_only = loss.cross_entropy(config, train_head, p["head"], p["x"], targets, i["weights"])
    f64 = {k: np.asarray(v, np.float64) for k, v in p.items()}
    assert abs(value / (3 * want(f64)) - 1) < 1e-5
    assert abs(forward_only / want(f64) - 1) < 1e-5
    if not train_head:
        assert not np.any(grads.pop("head"))
        p = {"x": p["x"]}
    check_gradient(lambda q: 3 * want({**f64, **q}), p, grads, np.random.default_rng(1))
    if train_head and config.vocab_used:
        assert not np.any(grads["head"][config.vocab_used :])


def test_chunks_are_sized_for_one_device():
    """Every device's own tokens fall into the same chunks, whatever the others hold."""
    one = chunks.divide(Execution(), 8, 512, 1000)
    assert (one.rows, one.axes, one.tokens, one.count) == (1, (), 256, 16)
    mesh = make_mesh({"fsdp": 4, "sequence": 2})
    eight = Execution(activations=batch_sharding(mesh, 3))
    cut = chunks.divide(eight, 8, 512, 1000)
    assert (cut.rows, cut.sequence, cut.axes[-1]) == (4, 2, "sequence")
    assert (cut.tokens, cut.count) == (128, 4)
    # A large vocabulary makes chunks smaller; rows that the mesh does not divide are one part.
    assert chunks.divide(Execution(), 8, 512, 2**20).tokens == 32
    assert chunks.divide(eight, 6, 512, 1000)[:3] == (1, 2, ("sequence",))


DENSITIES = {0.05: 0.07, 0.1: 0.15, 0.4: 0.45, 1.0: 1.0}  # share of targets: of the head's work


@pytest.mark.parametrize("density", DENSITIES)
def test_the_loss_costs_what_its_targets_cost(density):
    """FLOPs of the compiled loss and gradient, counted with the turns that its loop makes."""
    config = TINY.replace(vocab_size=512, d_model=16)
    rows, tokens = 8, 256
    rng = np.random.default_rng(5)
    weights = np.zeros(rows * tokens, np.float32)
    weights[rng.permutation(weights.size)[: round(density * weights.size)]] = 1
    weights = weights.reshape(rows, tokens)
    x, head = np.zeros((rows, tokens, 16), np.float32), np.zeros((512, 16), np.float32)
    targets = np.zeros((rows, tokens), np.int32)
    into = chunks.divide(Execution(), rows, tokens, 512)
    turns = int(chunks.sort(into, Execution(), x, targets, weights).filled)
    run = jax.jit(jax.value_and_grad(functools.partial(loss.cross_entropy, config, False), 1))
    text = run.lower(head, x, targets, weights).compile().as_text()
    assert len(hlo.count(text).unknown) == 1  # the loop over chunks ends where the data say so
    counts = hlo.count(text, turns=turns)
    assert not counts.unknown
    whole = 2 * 2 * rows * tokens * 16 * 512  # logits, and their gradient times the head
    assert density <= counts.flops / whole <= DENSITIES[density]


@pytest.mark.parametrize("sizes", [None, {"fsdp": 4, "sequence": 2}, {"data": 2, "tensor": 4}])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_no_target_is_lost_at_any_density(density, sizes, monkeypatch):
    """Targets that lie unevenly over rows, devices and chunks, against float64."""
    monkeypatch.setattr(chunks, "_ELEMENTS", 7 * V)
    config, rows, tokens = CASES["both"], 8, 20
    rng = np.random.default_rng(7)
    weights = np.zeros(rows * tokens, np.float32)
    count = round(density * weights.size)
    # One row takes as many as it can hold, the others share the rest.
    order = np.concatenate([np.arange(3 * tokens, 4 * tokens), rng.permutation(weights.size)])
    weights[list(dict.fromkeys(order.tolist()))[:count]] = rng.uniform(0.5, 2, count)
    arrays = {
        "head": rng.standard_normal((V, D)).astype(np.float32),
        "x": rng.standard_normal((rows, tokens, D)).astype(np.float32),
    }
    targets = rng.integers(0, config.vocab_used, (rows, tokens)).astype(np.int32)
    weights = weights.reshape(rows, tokens)
    execution = Execution()
    placed = [arrays["head"], arrays["x"], targets, weights]
    if sizes:
        mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes})
        execution = Execution(activations=batch_sharding(mesh, 3))
        placed[1:] = [jax.device_put(a, batch_sharding(mesh, a.ndim)) for a in placed[1:]]

    def want(p):
        return -(_naive_log_probs(config, p["head"], p["x"], targets) * weights).sum()

    run = functools.partial(loss.cross_entropy, config, True, execution=execution)
    value, grads = jax.jit(jax.value_and_grad(lambda *a: run(*a), (0, 1)))(*placed)
    f64 = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
    if not count:
        assert value == 0 and not any(np.any(g) for g in grads)
        return
    assert abs(value / want(f64) - 1) < 1e-5
    check_gradient(want, f64, dict(zip(arrays, grads, strict=True)), np.random.default_rng(2))
    assert not np.any(np.asarray(grads[1])[weights == 0])


@pytest.mark.parametrize(
    ("sizes", "rows", "vocabulary"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("data",), ("tensor", "fsdp", "expert", "sequence")),
        # 36 divides by 4, not by 8: `expert` goes on cutting rows, `sequence` their tokens.
        ({"fsdp": 4, "expert": 2}, ("data", "expert", "sequence"), ("tensor", "fsdp")),
        ({"fsdp": 4, "sequence": 2}, ("data", "sequence"), ("tensor", "fsdp", "expert")),
        (
            {"fsdp": 2, "sequence": 2, "tensor": 2},
            ("data", "sequence"),
            ("tensor", "fsdp", "expert"),
        ),
        # 8 does not divide it at all.
        ({"fsdp": 8}, ("data", "fsdp", "expert", "sequence"), ("tensor",)),
    ],
)
def test_devices_share_the_vocabulary(sizes, rows, vocabulary):
    """The loss and the gradients of one device, by parts of logits on eight."""
    config = TINY.replace(vocab_size=36, vocab_used=31, final_softcap=1.5)
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes})
    execution = Execution(activations=batch_sharding(mesh, 3))
    parts = ("data", "fsdp", "expert", "sequence")
    assert execution.logits_sharding(36, parts).spec == PartitionSpec(rows, None, vocabulary)
    rng = np.random.default_rng(3)
    head, x = rng.standard_normal((36, 16)), rng.standard_normal((8, 6, 16))
    targets, weights = rng.integers(0, 31, (8, 6)), rng.choice([0, 1, 2], (8, 6))
    arrays = [np.asarray(a, np.float32) for a in (head, x)]
    arrays += [np.asarray(targets, np.int32), np.asarray(weights, np.float32)]

    def run(execution, arrays):
        of = functools.partial(loss.cross_entropy, config, True, execution=execution)
        return jax.jit(jax.value_and_grad(lambda *a: of(*a), argnums=(0, 1)))(*arrays)

    want = run(Execution(), arrays)
    cut = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "expert", "sequence")))
    placed = [jax.device_put(arrays[0], cut)]
    placed += [jax.device_put(a, batch_sharding(mesh, a.ndim)) for a in arrays[1:]]
    got = run(execution, placed)
    assert abs(got[0] / want[0] - 1) < 1e-5
    assert all(rel(a, b) < 1e-4 for a, b in zip(got[1], want[1], strict=True))
    assert abs(want[0] / -(_naive_log_probs(config, head, x, targets) * weights).sum() - 1) < 1e-5


def test_gradient_keeps_its_dtype():
    config, i = CASES["plain"], _inputs(CASES["plain"])
    head, x = i["head"].astype(jnp.bfloat16), i["x"].astype(jnp.bfloat16)
    grads = jax.grad(functools.partial(loss.cross_entropy, config, True), (0, 1))(
        head, x, i["targets"], i["weights"]
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    full = jax.grad(functools.partial(loss.cross_entropy, config, True), (0, 1))(
        head.astype(jnp.float32), x.astype(jnp.float32), i["targets"], i["weights"]
    )
    assert all(rel(g.astype(jnp.float32), f) < 0.02 for g, f in zip(grads, full, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_next_token_targets(data):
    """Every target follows its position within one sample; no sample's first token is one."""
    lengths = data.draw(st.lists(st.integers(1, 4), max_size=4))
    length = 20  # one shape, compiled once; the rest of the row is padding
    segments = np.concatenate(
        [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(length - sum(lengths))]
    ).astype(np.int32)
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    targets, weights = loss.next_token_targets(
        tokens[None], mask[None].astype(np.int32), segments[None]
    )
    assert weights.dtype == jnp.float32 and targets.dtype == jnp.int32
    starts = np.cumsum([0, *lengths])
    wanted = {
        t - 1 for i, n in enumerate(lengths) for t in range(starts[i] + 1, starts[i] + n) if mask[t]
    }
    assert {int(t) for t in np.flatnonzero(weights[0])} == wanted
    assert all(targets[0, t] == tokens[t + 1] and weights[0, t] == 1 for t in wanted)
