"""The TPU's kernels for whole rows: interpreted against plain attention, and compiled."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.base import attention, decoder, splash
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError
from medmoe_jax.parallel.topology import compile_for, describe
from medmoe_jax.planning.attention import AttentionShape, splash_costs
from medmoe_jax.planning.hlo_text import parse
from tests import slices
from tests.naive import TINY, tree_rel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "heads", "softcap", "blocks"),
    [
        ({}, (4, 2), 0.0, (256, 128, 0)),
        ({"fsdp": 2, "tensor": 2}, (8, 2), 2.0, (256, 128, 256)),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, (4, 4), 0.0, (256, 128, 128)),
    ],
    ids=["one-device", "rows-and-heads", "rows-tokens-and-heads"],
)
def test_splash_is_attention(monkeypatch, spread, heads, softcap, blocks):
    """In value and gradient, for a window and for none; several blocks of unequal sizes."""
    made = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", made)
    monkeypatch.setattr(splash, "block_sizes", lambda *_: splash.Blocks(*blocks))
    config = TINY.replace(head_dim=128, windows=(0, 50, 0), attn_softcap=softcap)
    rng = np.random.default_rng(0)
    H, K = heads
    q, k, v = (jnp.asarray(rng.standard_normal((2, 512, n, 128)), jnp.float32) for n in (H, K, K))
    mix = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    segments = np.repeat([[1, 1, 2, 0], [1, 2, 2, 2]], 128, axis=1).astype(np.int32)
    positions = np.tile(np.arange(512, dtype=np.int32), (2, 1))
    execution = Execution()
    if spread:
        number = math.prod(spread.values())
        mesh = Mesh(np.array(jax.devices()[:number]).reshape(*spread.values()), tuple(spread))
        axis = "sequence" if "sequence" in spread else None
        execution = Execution(activations=NamedSharding(mesh, P("fsdp", axis, None)))
    real = (segments > 0)[..., None, None]

    @jax.jit
    def kernel(q, k, v, window):
        out = splash.splash_attention(config, execution, q, k, v, segments, window)
        return jnp.sum(jnp.where(real, out * mix, 0.0))

    @jax.jit
    def plain(q, k, v, window):
        mask = attention.visible(segments, positions, segments, positions, window)
        out = attention.einsum_attention(config.scale, softcap, q, k, v, mask)
        return jnp.sum(jnp.where(real, out * mix, 0.0))

    grads = []
    for window in (0, 50):
        got, want = (
            jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v, jnp.int32(window))
            for f in (kernel, plain)
        )
        assert abs(got[0] - want[0]) < 1e-4 * float(jnp.abs(mix).sum()) ** 0.5
        assert tree_rel(got[1], want[1]) < 1e-4
        grads.append(want[1])
    assert tree_rel(*grads) > 1e-2


@pytest.mark.parametrize(("tokens", "shards"), [(200, 1), (384, 2), (2048, 32)])
def test_rows_that_splash_cannot_cut(tokens, shards):
    cut = f" over {shards} devices" if shards > 1 else ""
    with pytest.raises(ParameterError, match=f"^attention: .* which {tokens}{cut} is not"):
        splash._kernel(2, tokens, 0, 0.0, shards, 128, 4)


@pytest.mark.parametrize(
    ("tokens", "shards", "window", "head_dim", "itemsize", "want"),
    [
        (128, 1, 0, 128, 2, (128, 128, 128)),
        (64, 1, 0, 128, 2, (128, 128, 0)),  # plans ask for rows that no kernel takes, too
        (512, 1, 0, 128, 2, (512, 512, 512)),
        (2048, 1, 0, 128, 2, (512, 512, 512)),
        (2048, 4, 0, 128, 2, (512, 512, 512)),
        (3072, 1, 0, 128, 2, (512, 512, 1024)),
        (4096, 1, 1024, 256, 2, (512, 512, 1024)),
        (4096, 1, 0, 256, 4, (512, 512, 0)),  # does not fit VMEM
        (8192, 1, 0, 128, 2, (1024, 512, 0)),  # eight times the queries' gradient
        (32768, 1, 0, 128, 2, (1024, 512, 0)),
        (32768, 1, 512, 128, 2, (512, 512, 0)),
        (32768, 1, 0, 256, 4, (512, 512, 0)),
        (32768, 64, 0, 128, 2, (512, 512, 0)),  # no device has more
        (1280, 1, 0, 128, 2, (256, 256, 0)),  # a quarter is no multiple of what passes
        (1408, 1, 0, 128, 2, (128, 128, 0)),  # eleven times 128
    ],
)
def test_blocks(tokens, shards, window, head_dim, itemsize, want):
    assert splash.block_sizes(tokens, shards, window, head_dim, itemsize) == want


SHAPES = {
    "smollm2": (9, 3, 64, 2048, 0, "float32"),
    "qwen2_0.5b": (14, 2, 64, 2048, 0, "bfloat16"),
    "qwen1.5_14b": (40, 40, 128, 2048, 0, "bfloat16"),
    "llama3_8b": (32, 8, 128, 32768, 0, "bfloat16"),
    "gemma3_1b": (4, 1, 256, 32768, 512, "bfloat16"),
    "gemma2_9b": (16, 8, 256, 8192, 4096, "float32"),
}


@pytest.mark.aot
@pytest.mark.parametrize(("slice_name", "name"), slices.compiled(SHAPES, everywhere=1))
def test_kernels_compile_and_repeat_no_keys(slice_name, name):
    heads, kv_heads, width, tokens, window, dtype = SHAPES[name]
    layers = (window, 0)
    config = TINY.replace(
        n_layers=2, n_heads=heads, n_kv_heads=kv_heads, head_dim=width, windows=layers
    )
    chip = describe(slice_name)
    mesh = Mesh(np.array(chip.devices[:1]), ("fsdp",))
    execution = Execution(activations=NamedSharding(mesh, P("fsdp", None, None)))

    def loss(q, k, v, segments, window):
        out = splash.splash_attention(config, execution, q, k, v, segments, window)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    keys = struct(1, tokens, kv_heads, width)
    compiled = compile_for(
        chip, jax.grad(loss, (0, 1, 2)), struct(1, tokens, heads, width), keys, keys,
        struct(1, tokens, dtype="int32"), struct(dtype="int32"),
    )  # fmt: skip
    shape = AttentionShape(1, tokens, heads, kv_heads, width, jnp.dtype(dtype).itemsize)
    known = splash_costs(shape, layers)
    _, computations = parse(compiled.as_text())
    calls = [
        (here, one)
        for here in computations.values()
        for one in here.instructions.values()
        if "tpu_custom_call" in one.attributes
    ]
    blocks = splash.block_sizes(tokens, 1, window, width, shape.itemsize)
    assert bool(blocks.keys) == (tokens == 2048)
    assert len(calls) == (2 if blocks.keys else 3) * len(set(layers))
    for here, call in calls:
        assert call.name.partition(".")[0] in known
        arrays = [array for operand in here.operands(call) for array in operand.arrays]
        sizes = [array.size for array in arrays if array.dtype in ("bf16", "f32")]
        # Keys and values as they are; queries, and backward the output's gradient.
        kept, repeated = kv_heads * tokens * width, heads * tokens * width
        queries = 1 if "_fwd_" in call.name else 2
        assert sizes.count(kept) == 2 + (queries if kept == repeated else 0)
        assert sizes.count(repeated) == queries + (2 if kept == repeated else 0)


@pytest.mark.aot
@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("full", 2)])
def test_dots_keeps_its_output(remat, forward):
    """The backward pass does not run the forward kernel again."""
    config = TINY.replace(head_dim=128, attn_softcap=0.0)
    chip = describe("v5e:1x1")
    mesh = Mesh(np.array(chip.devices[:1]), ("fsdp",))
    execution = Execution(
        jnp.bfloat16, remat, activations=NamedSharding(mesh, P("fsdp", None, None))
    )

    def loss(params, ids, positions):
        x, *_ = decoder.hidden(config, params, ids, ids, positions, execution=execution)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    everywhere = NamedSharding(mesh, P())
    params = jax.tree.map(
        lambda leaf: leaf.update(sharding=everywhere), decoder.abstract(config, jnp.bfloat16)
    )
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=everywhere)
    text = compile_for(chip, jax.grad(loss), params, ids, ids).as_text()
    calls = re.findall(r'%splash_mha_([a-z]+)_.* custom_call_target="tpu_custom_call"', text)
    assert sorted(calls) == ["dkv", *["fwd"] * forward]  # the first makes all gradients


@pytest.mark.parametrize("chosen", ["splash", "auto"])
def test_rows_are_refused_before_anything_is_compiled(chosen):
    class OnTpu(Execution):
        platform = "tpu"

    execution = OnTpu(jnp.bfloat16, attention=chosen)
    assert decoder.flash_attention(TINY, execution, 256) is splash.splash_attention
    with pytest.raises(ParameterError, match=r"^attention: .* which 48 is not"):
        decoder.flash_attention(TINY, execution, 48)


def test_away_from_tpus_it_is_refused():
    if jax.default_backend() == "tpu":
        pytest.skip("this machine has TPUs")
    with pytest.raises(ParameterError, match=r"^attention: 'splash' needs TPUs, these devices are"):
        decoder.flash_attention(TINY, Execution(attention="splash"), 256)
