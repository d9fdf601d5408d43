"""The decoder's configuration: one set of fields covers every supported model family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from medmoe_jax.errors import UserError

ROPE_KINDS = ("linear", "llama3", "yarn", "longrope")
ROPES = ("global", "local", "none")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Fields that a kind does not use stay at their defaults.

    Attributes:
      kind: `linear`, `llama3`, `yarn` or `longrope`.
      factor: stretch of the context length.
      original_max_positions: context length of the pretraining.
      low_freq_factor, high_freq_factor: wavelength band of `llama3`.
      beta_fast, beta_slow: rotation counts that bound the ramp of `yarn`.
      truncate: whether `yarn` rounds the bounds of its ramp to whole dimensions.
      attention_factor: multiplies cos and sin; 0 means the kind's own formula.
      mscale, mscale_all_dim: `yarn`'s attention factor as a ratio, when both are set.
      short_factor, long_factor: one divisor a frequency, of `longrope`.
    """

    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope_scaling.kind: '{self.kind}' is none of {', '.join(ROPE_KINDS)}")


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder.

    Attributes:
      vocab_size: rows of the embedding.
      vocab_used: ids from here on are padding rows, never sampled and left out of the
        cross-entropy; 0 means that every row is used.
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: width of the residual sum, layers,
        query heads, key and value heads, width of a head, hidden width of the feed-forward network.
      activation: `silu` (SwiGLU) or `gelu_tanh` (GeGLU).
      norm_eps, norm_offset: RMSNorm multiplies by `weight + norm_offset` (1 for Gemma).
      tied: logits use the embedding; there is no `head`.
      qkv_bias, o_bias, mlp_bias: biases on q, k and v; on o; on gate, up and down.
      qk_norm, qk_norm_whole: RMSNorm on each head's q and k; on all heads of a token as one.
      pre_norms, post_norms: a norm before attention and MLP, and one after.
      embed_scale, residual_scale, output_scale: multiply the embeddings, what attention and MLP add
        to the residual sum, and the final hidden states.
      query_scale: multiplies q·k; 0 means `head_dim ** -0.5`.
      attn_softcap, final_softcap: `cap * tanh(x / cap)` on attention scores and logits; 0 = off.
      rope_theta, rope_scaling: rotary base and its scaling, of layers whose `ropes` is `global`.
      local_rope_theta, local_rope_scaling: the same of those whose `ropes` is `local`; a base of 0
        is `rope_theta`.
      ropes: `global`, `local` or `none` (not rotated) of each layer; empty = every layer global.
      rotary_dim: leading dimensions of a head that are rotated; 0 = all.
      windows: sliding window of each layer in tokens, 0 = global; empty = every layer global.
      max_positions: context length.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0
    query_scale: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    local_rope_scaling: RopeScaling | None = None
    ropes: tuple[str, ...] = ()
    rotary_dim: int = 0
    windows: tuple[int, ...] = ()
    max_positions: int = 2048
    vocab_used: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation: '{self.activation}' is none of {', '.join(ACTIVATIONS)}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        for name in ("windows", "ropes"):
            entries = len(getattr(self, name))
            if entries not in (0, self.n_layers):
                raise UserError(f"{name}: {entries} entries for {self.n_layers} layers")
        if unknown := sorted(set(self.ropes) - set(ROPES)):
            raise UserError(f"ropes: '{unknown[0]}' is none of {', '.join(ROPES)}")
        if self.head_dim % 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UserError(
                f"head_dim {self.head_dim}, rotary_dim {self.rotary_dim}: both must be even, and "
                "the second at most the first"
            )
        if self.vocab_used > self.vocab_size:
            raise UserError(f"vocab_used ({self.vocab_used}) exceeds vocab_size {self.vocab_size}")

    @property
    def scale(self) -> float:
        """Factor on q·k."""
        return self.query_scale or self.head_dim**-0.5

    @property
    def kv_width(self) -> int:
        """Width of all key/value heads side by side."""
        return self.n_kv_heads * self.head_dim

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON has them; equal configurations give equal text."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    """A value with tuples as lists, and whole floats as integers: 10000 and 10000.0 are one."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def site_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`{site: (D_in, D_out)}` of the seven linear layers of a block."""
    q, kv = config.n_heads * config.head_dim, config.kv_width
    d, f = config.d_model, config.d_ff
    return {
        "attn.q": (d, q),
        "attn.k": (d, kv),
        "attn.v": (d, kv),
        "attn.o": (q, d),
        "mlp.gate": (d, f),
        "mlp.up": (d, f),
        "mlp.down": (f, d),
    }


# Sites that share an input are computed in one call.
GROUPS: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.out": ("attn.o",),
    "mlp.in": ("mlp.gate", "mlp.up"),
    "mlp.out": ("mlp.down",),
}
