"""The kernel that reads a cache token by token, against loops, and compiled for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import attention, decode_attention, decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.inference import drawing, steps
from medmoe_jax.inference.forward import Weights
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.parallel.rules import RULES, placed, shardings
from medmoe_jax.parallel.topology import compile_for, describe
from tests import slices
from tests.naive import TINY, rel

LAYERS, LAYER = 3, 1
# First and one after the last slot that a row sees: all, the end alone, a window in the middle of a
# block, one over three blocks, one slot, none.
SEEN = ((0, 300), (299, 300), (130, 140), (120, 290), (0, 1), (0, 0))


def naive(scale, softcap, q_BxHxh, k_BxSxKxh, v_BxSxKxh, seen):
    """Row by row and head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BxHxh, k_BxSxKxh, v_BxSxKxh))
    out = np.zeros_like(q)
    for b, (low, high) in enumerate(seen):
        for head in range(q.shape[1]):
            mine = head // (q.shape[1] // k.shape[2])
            score = scale * k[b, low:high, mine] @ q[b, head]
            score = softcap * np.tanh(score / softcap) if softcap else score
            weight = np.exp(score - score.max())
            out[b, head] = weight @ v[b, low:high, mine] / weight.sum()
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 slots, of which a row of 300 has three, the last one not full."""
    monkeypatch.setattr(decode_attention, "_BLOCK_BYTES", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "heads, kv_heads, width, softcap, dtype, tolerance",
    [
        (4, 2, 8, 0.0, "float32", 1e-5),
        (6, 1, 16, 2.0, "float32", 1e-5),
        (3, 3, 4, 0.0, "float32", 1e-5),
        (8, 4, 32, 0.0, "bfloat16", 2e-2),
    ],
)
def test_values(heads, kv_heads, width, softcap, dtype, tolerance):
    config = TINY.replace(
        n_heads=heads, n_kv_heads=kv_heads, head_dim=width, attn_softcap=softcap, query_scale=0.6
    )
    rng = np.random.default_rng(heads)
    B, S = len(SEEN), 300
    q = rng.normal(size=(B, 1, heads, width))
    k, v = rng.normal(size=(2, LAYERS, B, S, kv_heads * width))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    slot = np.arange(S)
    mask = np.array([[(slot >= low) & (slot < high)] for low, high in SEEN])
    # Blocks in which a row sees nothing are not read: what is in them would spoil the result.
    block = slot // 128
    nothing = np.array([~np.isin(block, block[row[0]]) for row in mask])
    nothing[-1] = block > 0
    v = jnp.where(nothing[None, :, :, None], jnp.nan, v)
    execution = Execution(dtype=jnp.dtype(dtype), kernels="interpret")
    got = decode_attention.decode_attention(config, execution, q, k, v, LAYER, jnp.asarray(mask))
    assert got.shape == q.shape and got.dtype == q.dtype
    assert np.isfinite(np.asarray(got, np.float32)).all()
    by_head = (x[LAYER].reshape(B, S, kv_heads, width) for x in (k, v))
    want = naive(0.6, softcap, *(x[:-1] for x in (q[:, 0], *by_head)), SEEN[:-1])
    assert rel(got[:-1, 0], want) < tolerance


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_on_a_mesh(sizes):
    """With heads that the axis divides, and with heads that every device keeps."""
    config = TINY.replace(n_heads=4, n_kv_heads=2, head_dim=8)
    mesh = make_mesh(sizes)
    execution = Execution(kernels="interpret", activations=batch_sharding(mesh, 3))
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 1, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, LAYERS, 4, 150, 16)).astype(np.float32)
    mask = np.arange(150)[None, None] < np.array([150, 3, 128, 129])[:, None, None]

    @jax.jit
    def run(q, k, v, mask):
        return decode_attention.decode_attention(config, execution, q, k, v, LAYER, mask)

    got = run(q, k, v, mask)
    by_head = (x[LAYER].reshape(4, 150, 2, 8) for x in (k, v))
    assert rel(got, attention.attend(config, jnp.asarray(q), *by_head, mask)) < 1e-5


def test_who_runs_it():
    assert not decode_attention.serves(Execution())
    assert decode_attention.serves(Execution(kernels="interpret"))
    assert not decode_attention.serves(Execution(kernels="interpret", attention="xla"))


# Heads, key/value heads, width, slots, dtype.
SHAPES = {
    "qwen2_7b": (28, 4, 128, 1000, "bfloat16"),
    "llama3_8b": (32, 8, 128, 4096, "bfloat16"),
    "smollm2": (9, 3, 64, 192, "float32"),
    "gemma3_1b": (4, 1, 256, 32768, "bfloat16"),
    "qwen1.5_14b": (40, 40, 128, 16, "float32"),
    "llama3_70b": (64, 8, 128, 8192, "bfloat16"),
}


@pytest.mark.aot
@pytest.mark.parametrize(("slice_name", "name"), slices.compiled(SHAPES, everywhere=3))
def test_kernel_compiles(slice_name, name):
    heads, kv_heads, width, slots, dtype = SHAPES[name]
    config = TINY.replace(n_heads=heads, n_kv_heads=kv_heads, head_dim=width)
    chip = describe(slice_name)
    mesh = make_mesh({}, chip.devices[:1])
    execution = Execution(dtype=jnp.dtype(dtype), activations=batch_sharding(mesh, 3))

    def run(q, k, v, layer, mask):
        return decode_attention.decode_attention(config, execution, q, k, v, layer, mask)

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P()))

    stack = struct(2, 8, slots, kv_heads * width)
    compiled = compile_for(
        chip, run, struct(8, 1, heads, width), stack, stack, struct(dtype="int32"),
        struct(8, 1, slots, dtype="bool"),
    )  # fmt: skip
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # Queries and results beside zeros, and which keys are seen: nothing like the cache.
    small = 4 * 8 * heads * kv_heads * width * 4 + 4 * 8 * 2 * slots + 2**17
    assert compiled.memory_analysis().temp_size_in_bytes < small


@pytest.mark.aot
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_a_whole_step_reads_the_cache_where_it_lies(sizes):
    config = DecoderConfig(
        vocab_size=512, d_model=512, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=128, d_ff=512,
        tied=True, windows=(0, 512, 0, 512),
    )  # fmt: skip
    chip = describe("v5e:2x4")
    mesh = make_mesh(sizes, chip.devices)
    execution = Execution(dtype=jnp.dtype("bfloat16"), activations=batch_sharding(mesh, 3))
    adapted = AdaptedConfig(config, (), execution)
    rows, slots = 16, 8192
    base = decoder.abstract(config, jnp.bfloat16)
    base = placed(base, shardings(base, mesh, RULES))
    everywhere = NamedSharding(mesh, jax.P())

    def told(tree):
        shaped = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
        return jax.tree.map(lambda x: x.update(sharding=everywhere), shaped)

    one = np.ones(rows, np.int32)
    law = drawing.law([Sampling()] * rows, [np.zeros(2, np.uint32)] * rows)
    now = told(steps.Now(one[:, None], one, one, one, -one, one, law))
    until = told(steps.Until(one, one[:, None], np.array(True)))
    heads = "tensor" if sizes.get("tensor") else None
    cut = NamedSharding(mesh, jax.P(None, execution.row_axes, None, heads))
    kv = jax.ShapeDtypeStruct((4, rows, slots, config.kv_width), jnp.bfloat16, sharding=cut)
    ids = jax.ShapeDtypeStruct((rows, slots), jnp.int32, sharding=batch_sharding(mesh))
    weights = Weights(base, {}, {}, told(one[:, None]))
    state = steps.State(kv, kv, ids)
    compiled = compile_for(chip, steps.go_on, adapted, 8, 0, weights, state, now, until)
    assert slices.kernels_of(compiled) == ["decode_attention"]  # in the loop over layers
    # Neither a copy of a layer's part of the cache nor its scores.
    share = kv.size * 2 / 8
    assert compiled.memory_analysis().temp_size_in_bytes < share / 4
