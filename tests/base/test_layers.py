"""Norm, rotary embeddings and attention against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_jax.base import attention, rope
from medmoe_jax.base.block import rms_norm
from medmoe_jax.base.config import DecoderConfig, RopeScaling, site_shapes
from medmoe_jax.errors import UserError
from tests import naive
from tests.naive import TINY, rel


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(offset, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 5)) * 7, dtype)
    weight = jnp.asarray(rng.standard_normal(5), jnp.float32)
    out = rms_norm(x, weight, eps=0.1, offset=offset)
    config = TINY.replace(norm_eps=0.1, norm_offset=offset)
    want = naive.norm(naive.f64(x), naive.f64(weight), config)
    assert out.dtype == dtype
    # One rounding to the output's dtype, no more: half a unit in the last place of each element.
    bound = 1e-6 if dtype == jnp.float32 else 2.0**-8
    assert np.all(np.abs(naive.f64(out) - want) <= bound * np.abs(want) + 1e-7)


def _yarn(base, theta, s, dim):
    """YaRN in its own terms: γ(rotations) for every dimension."""
    out = []
    for i, f in enumerate(base):
        low = dim * np.log(s.original_max_positions / (s.beta_fast * 2 * np.pi))
        high = dim * np.log(s.original_max_positions / (s.beta_slow * 2 * np.pi))
        low, high = low / (2 * np.log(theta)), high / (2 * np.log(theta))
        if s.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append(f / s.factor * ramp + f * (1 - ramp))
    return np.array(out)


def _llama3(base, s):
    out = []
    for f in base:
        wavelength = 2 * np.pi / f
        if wavelength < s.original_max_positions / s.high_freq_factor:
            out.append(f)
        elif wavelength > s.original_max_positions / s.low_freq_factor:
            out.append(f / s.factor)
        else:
            a = (s.original_max_positions / wavelength - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            out.append((1 - a) * f / s.factor + a * f)
    return np.array(out)


SHORT, LONG = tuple(np.linspace(1, 2, 16)), tuple(np.linspace(3, 40, 16))
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_positions=256),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_positions=512),
    "yarn_untruncated": RopeScaling("yarn", factor=4.0, original_max_positions=512, truncate=False),
    "yarn_given": RopeScaling("yarn", factor=4.0, original_max_positions=512, attention_factor=1.7),
    "yarn_mscale": RopeScaling(
        "yarn", factor=4.0, original_max_positions=512, mscale=0.7, mscale_all_dim=1.3
    ),
    "longrope_short": RopeScaling(
        "longrope", factor=8.0, original_max_positions=64, short_factor=SHORT, long_factor=LONG
    ),
    "longrope_long": RopeScaling(
        "longrope", factor=8.0, original_max_positions=63, short_factor=SHORT, long_factor=LONG
    ),
}
FACTORS = {
    "yarn": 0.1 * np.log(4) + 1,
    "yarn_untruncated": 0.1 * np.log(4) + 1,
    "yarn_given": 1.7,
    "yarn_mscale": (0.07 * np.log(4) + 1) / (0.13 * np.log(4) + 1),
    "longrope_short": np.sqrt(1 + np.log(8) / np.log(64)),
    "longrope_long": np.sqrt(1 + np.log(8) / np.log(63)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope(name):
    """The last position is 63: within a context of 64, beyond one of 63."""
    scaling, theta, h = SCALINGS[name], 5000.0, 32
    base = np.array([theta ** (-2 * i / h) for i in range(h // 2)])
    inv_freq = {
        "none": lambda: base,
        "linear": lambda: base / 4,
        "llama3": lambda: _llama3(base, scaling),
        "longrope_short": lambda: base / np.array(SHORT),
        "longrope_long": lambda: base / np.array(LONG),
    }.get(name, lambda: _yarn(base, theta, scaling, h))()
    if name not in ("none", "longrope_short"):
        assert rel(inv_freq, base) > 1e-3 or np.abs(inv_freq / base - 1).max() > 0.1
    config = TINY.replace(head_dim=h, rope_theta=theta, rope_scaling=scaling)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 3, h))
    positions = np.array([[0, 1, 2, 7, 20, 33, 62, 63]])
    tables = rope.tables(config, jnp.asarray(positions, jnp.int32), jnp.full((1, 8), 64))
    got = rope.rotate(jnp.asarray(x, jnp.float32), *(table[0] for table in tables))
    want = naive.rotate(x[0], positions[0], inv_freq, FACTORS.get(name, 1.0))
    assert rel(got[0], want) < 1e-5


def test_every_text_has_the_frequencies_of_its_own_length():
    """Packed texts of 3, 5 and 2 tokens beside one of 6: of those, two exceed a context of 4."""
    scaling = RopeScaling(
        "longrope", original_max_positions=4, short_factor=(1.0, 2.0), long_factor=(3.0, 5.0)
    )
    config = TINY.replace(
        head_dim=4, rope_scaling=scaling, local_rope_theta=7.0, ropes=("none", "global", "local")
    )
    rows = [(3, 5, 2), (6,)]
    segments, positions, lengths = np.zeros((3, 2, 11), np.int32)
    for b, texts in enumerate(rows):
        end = 0
        for n, length in enumerate(texts, 1):
            span = slice(end, end := end + length)
            segments[b, span], positions[b, span], lengths[b, span] = n, np.arange(length), length
    got = rope.text_lengths(jnp.asarray(segments), jnp.asarray(positions))
    np.testing.assert_array_equal(np.where(segments, got, 0), lengths)
    cos, sin = rope.tables(config, jnp.asarray(positions), got)
    assert cos.shape == sin.shape == (3, 2, 11, 1, 2)
    np.testing.assert_array_equal(rope.which(config), [2, 0, 1])
    short, long = 10000.0 ** np.array([0, -0.5]) / [1, 2], 10000.0 ** np.array([0, -0.5]) / [3, 5]
    inv_freq = np.where(lengths[..., None] > 4, long, short)
    angles = positions[..., None] * inv_freq, positions[..., None] * 7.0 ** np.array([0, -0.5])
    for row, angle in enumerate((*angles, 0 * angles[0])):
        real = segments > 0
        assert rel(np.asarray(cos)[row, :, :, 0][real], np.cos(angle)[real]) < 1e-6
        assert np.abs(np.asarray(sin)[row, :, :, 0][real] - np.sin(angle)[real]).max() < 1e-6


@pytest.mark.parametrize("softcap", [0.0, 1.3])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention(heads, window, softcap):
    H, K = heads
    config = TINY.replace(
        n_heads=H, n_kv_heads=K, head_dim=8, query_scale=0.6, attn_softcap=softcap
    )
    rng = np.random.default_rng(0)
    B, T = 2, 9
    q, k, v = (2 * rng.standard_normal((B, T, n, 8)) for n in (H, K, K))
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 3]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6]])
    mask = attention.visible(*map(jnp.asarray, (segments, positions) * 2), jnp.int32(window))
    got = attention.attend(config, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    assert np.isfinite(got).all()
    for b in range(B):
        real = segments[b] > 0
        want = naive.attention(q[b], k[b], v[b], segments[b], positions[b], window, 0.6, softcap)
        assert rel(got[b][real], want[real]) < 1e-5


def _plain_attention(config, q, k, v, mask):
    """From the formula, with the compiler's own derivative."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = config.scale * jnp.einsum("bthd,bshd->bhts", q, k)
    if config.attn_softcap:
        scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("softcap", [0.0, 1.3])
@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_gradient_of_attention(monkeypatch, heads, chunk, softcap):
    """Gradients of queries, keys and values; a row at a time and all at once."""
    monkeypatch.setattr(attention, "_CHUNK_SCORES", chunk)
    config = TINY.replace(head_dim=8, attn_softcap=softcap)
    rng = np.random.default_rng(0)
    H, K = heads
    qkv = [jnp.asarray(rng.standard_normal((3, 7, n, 8)), jnp.float32) for n in (H, K, K)]
    mix = jnp.asarray(rng.standard_normal(qkv[0].shape), jnp.float32)
    ones, t = jnp.ones((3, 7), jnp.int32), jnp.tile(jnp.arange(7)[None], (3, 1))
    mask = attention.visible(ones, t, ones, t, 4)

    def gradients(fn):
        return jax.jit(jax.grad(lambda x: jnp.sum(fn(config, *x, mask) * mix)))(qkv)

    got, want = gradients(attention.attend), gradients(_plain_attention)
    assert all(rel(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_attention_as_jax_has_it():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 7, n, 8)), jnp.float32) for n in (4, 2, 2))
    ones, t = jnp.ones((2, 7), jnp.int32), jnp.tile(jnp.arange(7)[None], (2, 1))
    mask = attention.visible(ones, t, ones, t, 4)
    want = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=0.3)
    assert rel(attention.einsum_attention(0.3, 0.0, q, k, v, mask), want) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_visible(data):
    """Against the sentence in the module, word for word."""
    T, S = 3, 5
    draw = lambda n, top: np.array(data.draw(st.lists(st.integers(0, top), min_size=n, max_size=n)))  # noqa: E731
    qs, qp, ks, kp = draw(T, 2), draw(T, 6), draw(S, 2), draw(S, 6)
    window = data.draw(st.integers(0, 4))
    got = attention.visible(*(jnp.asarray(a)[None] for a in (qs, qp, ks, kp)), window)[0]
    for t in range(T):
        for s in range(S):
            near = window == 0 or qp[t] - kp[s] < window
            assert got[t, s] == (qs[t] == ks[s] and kp[s] <= qp[t] and near)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"activation": "relu"}, "activation"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"windows": (1, 2)}, "windows"),
        ({"vocab_used": 99}, "vocab_used"),
    ],
)
def test_config_names_the_field(changes, word):
    with pytest.raises(UserError, match=word):
        TINY.replace(**changes)


def test_rope_kind_is_checked():
    with pytest.raises(UserError, match=r"rope_scaling\.kind"):
        RopeScaling("ntk")


def test_site_shapes():
    config = DecoderConfig(
        vocab_size=5, d_model=8, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=4, d_ff=11
    )
    assert site_shapes(config) == {
        "attn.q": (8, 24),
        "attn.k": (8, 8),
        "attn.v": (8, 8),
        "attn.o": (24, 8),
        "mlp.gate": (8, 11),
        "mlp.up": (8, 11),
        "mlp.down": (11, 8),
    }
    assert jax.tree.all(jax.tree.map(lambda x: x > 0, site_shapes(config)))


@pytest.mark.parametrize(
    ("tokens", "limit", "want"),
    [(1, None, 256), (256, 4096, 256), (257, 4096, 512), (257, 500, 500), (600, 500, 500)],
)
def test_slots_of_a_row_that_two_devices_share(tokens, limit, want):
    assert attention.row_slots(tokens, 2, limit) == want
