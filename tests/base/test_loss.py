"""Cross-entropy, log-probabilities and targets against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.base import loss
from medmoe_jax.base.execution import Execution
from medmoe_jax.mesh_axes import AXES
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
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


@pytest.fixture(params=[1, 2, 6], ids=lambda n: f"{n}-tokens-a-chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", request.param * B * V)
    _, (x,) = loss._chunks(CASES["plain"], Execution(), jnp.zeros((B, T, D)))
    assert x.shape == (T // request.param, B, request.param, D)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_token_log_probs(name, chunk):
    config, i = CASES[name], _inputs(CASES[name])
    got = loss.token_log_probs(config, i["head"], i["x"], i["targets"])
    head, x = (np.asarray(i[k], np.float64) for k in ("head", "x"))
    assert rel(got, _naive_log_probs(config, head, x, i["targets"])) < 1e-5


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


def test_chunks_are_sized_for_one_device(monkeypatch):
    """Rows over three devices: a chunk three times as long, and the same loss."""
    config, i = CASES["both"], _inputs(CASES["both"])
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", B * V)
    assert len(loss._chunks(config, Execution(), i["x"])[1][0]) == T
    mesh = make_mesh({"fsdp": 3}, jax.devices()[:3])
    three = Execution(activations=batch_sharding(mesh, 3))
    assert len(loss._chunks(config, three, i["x"])[1][0]) == T // 3


@pytest.mark.parametrize(
    ("sizes", "rows", "vocabulary"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("data",), ("tensor", "fsdp", "expert", "sequence")),
        # 36 divides by 4, not by 8: `expert` goes on cutting rows, `sequence` their tokens.
        ({"fsdp": 4, "expert": 2}, ("data", "expert"), ("tensor", "fsdp")),
        ({"fsdp": 4, "sequence": 2}, ("data",), ("tensor", "fsdp", "expert")),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, ("data",), ("tensor", "fsdp", "expert")),
        # 8 does not divide it at all.
        ({"fsdp": 8}, ("data", "fsdp", "expert"), ("tensor",)),
    ],
)
def test_devices_share_the_vocabulary(sizes, rows, vocabulary):
    """The loss and the gradients of one device, by parts of logits on eight."""
    config = TINY.replace(vocab_size=36, vocab_used=31, final_softcap=1.5)
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes})
    execution = Execution(activations=batch_sharding(mesh, 3))
    left = None if "sequence" in vocabulary else "sequence"
    assert execution.logits_sharding(36, 2).spec == PartitionSpec(rows, left, vocabulary)
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
