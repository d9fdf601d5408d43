"""Rotary position embeddings in the half-split layout, with the published scalings.

Axes: B batch, T tokens, H heads, h head dimension, F = h/2 frequencies.
"""

from __future__ import annotations

import math

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


def frequencies(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray, float]:
    """Inverse frequencies within and beyond the pretraining context, and the cos/sin factor.

    Returns:
      `(short_F, long_F, attention_factor)` in float64; the two tables differ for `longrope` only.
    """
    h, s = config.head_dim, config.rope_scaling
    inv_freq_F = config.rope_theta ** -(np.arange(0, h, 2, dtype=np.float64) / h)
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
        inv_freq_F, attention_factor = _yarn(inv_freq_F, s, config.rope_theta)
    return inv_freq_F, inv_freq_F, attention_factor


def tables(config: DecoderConfig, positions_BxT):
    """cos and sin of the rotation angles, float32 `[B, T, 1, F]`."""
    short_F, long_F, factor = frequencies(config)
    inv_freq_F = jnp.asarray(short_F, jnp.float32)
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        beyond = jnp.max(positions_BxT) >= config.rope_scaling.original_max_positions
        inv_freq_F = jnp.where(beyond, jnp.asarray(long_F, jnp.float32), inv_freq_F)
    angle_BxTx1xF = (
        positions_BxT[:, :, None, None].astype(jnp.float32) * inv_freq_F[None, None, None]
    )
    return jnp.cos(angle_BxTx1xF) * factor, jnp.sin(angle_BxTx1xF) * factor


def rotate(x_BxTxHxh, cos_BxTx1xF, sin_BxTx1xF):
    """Rotate the pairs (i, i + h/2) of every head; float32 inside, the input's dtype outside."""
    a, b = jnp.split(x_BxTxHxh.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxTx1xF, sin_BxTx1xF
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxh.dtype)
