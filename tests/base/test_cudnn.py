"""cuDNN's attention: which kernel runs which rows, and that each of them is attention.

Away from NVIDIA GPUs a plain rendition of the kernel stands in: it takes the same arguments, starts
and lengths of packed segments included, and is told nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.base import attention, cudnn, decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.errors import ParameterError
from tests.naive import tree_rel

GPU = jax.default_backend() == "gpu"
DTYPE, TOLERANCE = (jnp.bfloat16, 2e-2) if GPU else (jnp.float32, 1e-5)
CONFIG = DecoderConfig(
    vocab_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64
)
T = 128
MANY = np.arange(T) // 3 + 1
ROWS = {
    "one text": ([1] * T, [1] * 96 + [0] * 32),
    "packed": ([1] * 32 + [2] * 64 + [0] * 32, [1] * 16 + [2] * 48 + [3] * 64),
    "padding first": ([0] * 32 + [1] * 96, [1] * T),
    "many": (MANY, np.minimum(MANY, 2)),
}
KERNEL = {"one text": 0, "packed": 1, "padding first": 1, "many": 2}


def stand_in(query, key, value, mask=None, q_seqlen=None, kv_seqlen=None, q_offsets=None, **fields):
    """What cuDNN's kernel does with these arguments, by einsum."""
    fields.pop("kv_offsets")
    scale, window = fields.pop("scale"), fields.pop("sliding_window_length")
    packed = fields.pop("mask_type") == library.MaskType.PADDING_CAUSAL
    assert not fields and packed == (q_offsets is not None) and kv_seqlen is q_seqlen
    row = np.arange(query.shape[1])
    distance = row[:, None] - row[None, :]
    seen = (distance >= 0) & (distance < (window or len(row)))
    seen = jnp.broadcast_to(seen, (len(query), *seen.shape))
    if packed:
        starts, ends = q_offsets[:, :-1], q_offsets[:, :-1] + q_seqlen
        row = jnp.broadcast_to(row, (*starts.shape, len(row)))
        inside = (starts[..., None] <= row) & (row < ends[..., None]) & (starts >= 0)[..., None]
        seen &= jnp.einsum("bmt,bms->bts", inside.astype(int), inside.astype(int)) > 0
    if mask is not None:
        seen &= mask[:, 0]
    return attention.einsum_attention(scale, 0.0, query, key, value, seen)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    if not GPU:
        monkeypatch.setattr(library, "dot_product_attention", stand_in)


def on_mesh():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
    return Execution(DTYPE, activations=NamedSharding(mesh, P("fsdp", None, None)))


@pytest.mark.parametrize("execution", [Execution(DTYPE), None], ids=["one-device", "mesh"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("name", ROWS)
def test_cudnn_is_attention(name, window, execution):
    """Value and gradient, for rows of every kind, with a window and without."""
    if execution is None:
        execution = on_mesh()
    segments = jnp.asarray(ROWS[name], jnp.int32)
    assert int(cudnn._which(segments)) == KERNEL[name]
    positions = jnp.tile(jnp.arange(T), (2, 1))
    real = (segments > 0)[..., None, None]
    rng = np.random.default_rng(0)
    q, k, v, mix = (jnp.asarray(rng.standard_normal((2, T, n, 16)), DTYPE) for n in (4, 2, 2, 4))
    config = CONFIG.replace(windows=(0, 20))

    def loss(out):
        return jnp.sum(jnp.where(real, out.astype(jnp.float32) * mix, 0.0))

    def ours(q, k, v, window):
        return loss(cudnn.cudnn_attention(config, execution, q, k, v, segments, window))

    def plain(q, k, v, window):
        mask = attention.visible(segments, positions, segments, positions, window)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return loss(attention.einsum_attention(config.scale, 0.0, q, k, v, mask))

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v, jnp.int32(window))
        for f in (ours, plain)
    )
    assert abs(got[0] - want[0]) < TOLERANCE * float(jnp.abs(mix).sum()) ** 0.5
    assert tree_rel(got[1], want[1]) < TOLERANCE


def test_a_decoder_runs_it(monkeypatch):
    """Where nothing stands against it, `auto` takes it; `dots` keeps its output."""
    if not GPU:
        monkeypatch.setattr(cudnn, "obstacle", lambda *_: None)
    params = decoder.init(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 64)
    segments = jnp.asarray(ROWS["packed"], jnp.int32)
    positions = jnp.tile(jnp.arange(T), (2, 1))
    real = segments > 0

    def value(params, chosen):
        execution = Execution(DTYPE, remat="dots", attention=chosen)
        x, *_ = decoder.hidden(CONFIG, params, tokens, segments, positions, execution=execution)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(x.astype(jnp.float32)), 0.0))

    program = str(jax.make_jaxpr(jax.grad(lambda p: value(p, "auto")))(params))
    # The backward pass does not make it again.
    assert program.count(f"name={attention.OUTPUT}") == 1
    got, want = (jax.jit(jax.grad(lambda p, c=c: value(p, c)))(params) for c in ("auto", "xla"))
    assert tree_rel(got, want) < 20 * TOLERANCE


@pytest.mark.parametrize(
    ("config", "dtype", "tokens", "message"),
    [
        (CONFIG, jnp.float32, T, "float32"),
        (CONFIG.replace(attn_softcap=30.0), jnp.bfloat16, T, "soft-cap"),
        (CONFIG.replace(head_dim=12), jnp.bfloat16, T, "not 12"),
        (CONFIG.replace(head_dim=512), jnp.bfloat16, T, "up to 256, not 512"),
        (CONFIG, jnp.bfloat16, T - 1, f"not {T - 1}"),
    ],
)
def test_what_it_cannot_run_is_named(config, dtype, tokens, message):
    """The error of `cudnn`, which `auto` turns into another way."""

    class Hopper:
        platform, compute_capability = "gpu", "9.0"

        class client:
            platform_version = "cuda 13000"

    class OnHopper(Execution):
        device = Hopper

    found = cudnn.obstacle(config, OnHopper(dtype), tokens)
    assert message in found


def test_away_from_nvidia_it_is_refused():
    if GPU:
        pytest.skip("this machine has the GPU")
    execution = Execution(jnp.bfloat16, attention="cudnn")
    params = decoder.abstract(CONFIG)
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    with pytest.raises(ParameterError, match=r"^attention: 'cudnn' cannot run this: .* are cpu"):
        jax.eval_shape(
            lambda p, i: decoder.hidden(CONFIG, p, i, i, i, execution=execution)[0], params, ids
        )
