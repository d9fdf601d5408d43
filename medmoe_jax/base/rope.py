"""Rotary position embeddings in the half-split layout, with the published scalings.

Axes: B batch, T tokens, H heads, h head dimension, F frequencies: half of the dimensions that are
rotated, R different embeddings, L layers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.base.config import DecoderConfig, RopeScaling


def _llama3(inv_freq_F: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Divide low frequencies by `factor`, keep high ones, blend between (Llama 3.1)."""
    wavelength_F = 2 * math.pi / inv_freq_F
    low, high = s.low_freq_factor, s.high_freq_factor
    smooth_F = (s.original_max_positions / wavelength_F - low) / (high - low)
    smooth_F = np.clip(smooth_F, 0.0, 1.0)
    return (1 - smooth_F) * inv_freq_F / s.factor + smooth_F * inv_freq_F


def _yarn(inv_freq_F: np.ndarray, s: RopeScaling, theta: float) -> tuple[np.ndarray, float]:
    """Ramp from interpolated to unchanged frequencies (YaRN, arXiv 2309.00071, section 3.2)."""
    dim = 2 * len(inv_freq_F)

    def dimension_of(rotations: float) -> float:
        turns = s.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(s.beta_fast), dimension_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp_F = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    inv_freq_F = inv_freq_F / s.factor * ramp_F + inv_freq_F * (1 - ramp_F)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    ratio = mscale(s.mscale) / mscale(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else None
    return inv_freq_F, s.attention_factor or ratio or mscale(1.0)


def _longrope_attention(s: RopeScaling) -> float:
    """LongRoPE's factor on cos and sin (arXiv 2402.13753)."""
    if s.attention_factor:
        return s.attention_factor
    if s.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_positions))


def frequencies(config: DecoderConfig, kind: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Inverse frequencies within and beyond the pretraining context, and the cos/sin factor.

    Args:
      config: of the decoder.
      kind: of `base.config.ROPES`; frequencies of `none` are 0.

    Returns:
      `(short_F, long_F, attention_factor)` in float64; the two tables differ for `longrope` only.
    """
    h = config.rotary_dim or config.head_dim
    if kind == "none":
        return np.zeros(h // 2), np.zeros(h // 2), 1.0
    theta, s = _settings(config, kind)
    inv_freq_F = theta ** -(np.arange(0, h, 2, dtype=np.float64) / h)
    if s is None:
        return inv_freq_F, inv_freq_F, 1.0
    if s.kind == "longrope":
        factor = _longrope_attention(s)
        return inv_freq_F / np.array(s.short_factor), inv_freq_F / np.array(s.long_factor), factor
    attention_factor = 1.0
    if s.kind == "linear":
        inv_freq_F = inv_freq_F / s.factor
    elif s.kind == "llama3":
        inv_freq_F = _llama3(inv_freq_F, s)
    else:
        inv_freq_F, attention_factor = _yarn(inv_freq_F, s, theta)
    return inv_freq_F, inv_freq_F, attention_factor


def _settings(config: DecoderConfig, kind: str) -> tuple[float, RopeScaling | None]:
    if kind == "local":
        return config.local_rope_theta or config.rope_theta, config.local_rope_scaling
    return config.rope_theta, config.rope_scaling


def switches_at(config: DecoderConfig) -> int | None:
    """The length beyond which texts have other frequencies; None = they never have."""
    scalings = (config.rope_scaling, config.local_rope_scaling)
    longrope = [s.original_max_positions for s in scalings if s and s.kind == "longrope"]
    return longrope[0] if longrope else None


def kinds(config: DecoderConfig) -> list[str]:
    """The layers' different embeddings, in the order of `tables`."""
    return sorted(set(config.ropes)) or ["global"]


def which(config: DecoderConfig) -> np.ndarray:
    """The row of `tables` that each layer takes, int32 `[L]`."""
    rows = kinds(config)
    return np.array([rows.index(kind) for kind in config.ropes or rows * config.n_layers], np.int32)


def tables(
    config: DecoderConfig, positions_BxT: jax.Array, lengths_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation angles, float32 `[R, B, T, 1, F]`, a row for each of `kinds`.

    Args:
      config: of the decoder.
      positions_BxT: int32.
      lengths_BxT: int32, of the whole text that a token belongs to, be it given here or not:
        `longrope` has other frequencies for texts longer than the pretraining context.
    """
    angles = [_angles(config, kind, positions_BxT, lengths_BxT) for kind in kinds(config)]
    cos = jnp.stack([jnp.cos(angle) * factor for angle, factor in angles])
    return cos, jnp.stack([jnp.sin(angle) * factor for angle, factor in angles])


def _angles(config: DecoderConfig, kind: str, positions_BxT, lengths_BxT):
    short_F, long_F, factor = frequencies(config, kind)
    inv_freq = jnp.asarray(short_F, jnp.float32)[None, None, None]
    _, scaling = _settings(config, kind)
    if scaling is not None and np.any(short_F != long_F):
        beyond_BxT = lengths_BxT > scaling.original_max_positions
        long = jnp.asarray(long_F, jnp.float32)[None, None, None]
        inv_freq = jnp.where(beyond_BxT[:, :, None, None], long, inv_freq)
    return positions_BxT[:, :, None, None].astype(jnp.float32) * inv_freq, factor


def text_lengths(segment_ids_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """Tokens of the text that each token belongs to, where rows hold whole texts: int32 `[B, T]`.

    A text is a segment, whose tokens lie side by side at positions from 0 on.
    """
    T = segment_ids_BxT.shape[1]
    index_1xT = jnp.arange(T, dtype=jnp.int32)[None]
    after_BxT = jnp.roll(segment_ids_BxT, -1, axis=1)
    last_BxT = (segment_ids_BxT != after_BxT) | (index_1xT == T - 1)
    end_BxT = jax.lax.cummin(jnp.where(last_BxT, index_1xT, T), axis=1, reverse=True)
    return positions_BxT + end_BxT - index_1xT + 1


def rotate(x_BxTxHxh: jax.Array, cos_BxTx1xF: jax.Array, sin_BxTx1xF: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + F) of every head and leave what lies beyond 2F as it is.

    Float32 inside, the input's dtype outside.
    """
    F = cos_BxTx1xF.shape[-1]
    a, b, rest = jnp.split(x_BxTxHxh.astype(jnp.float32), [F, 2 * F], axis=-1)
    cos, sin = cos_BxTx1xF, sin_BxTx1xF
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x_BxTxHxh.dtype)
