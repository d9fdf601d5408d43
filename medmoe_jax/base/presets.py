"""The published decoders' shapes, by name: for random bases, compile reports and tests."""

from __future__ import annotations

from medmoe_jax.base.config import DecoderConfig, RopeScaling
from medmoe_jax.errors import UserError


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ff: int, head_dim: int = 0) -> dict:
    return dict(
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=ff,
        head_dim=head_dim or width // heads,
    )


def _qwen(*sizes, vocab: int = 151936, positions: int = 32768, **more) -> DecoderConfig:
    """Qwen 1.5, 2 and 2.5: biases on q, k and v."""
    fields = dict(qkv_bias=True, rope_theta=1e6, max_positions=positions) | more
    return DecoderConfig(vocab_size=vocab, **_sizes(*sizes), **fields)


def _qwen3(*sizes, tied: bool = True) -> DecoderConfig:
    """Qwen 3: norms on q and k instead of biases, heads of 128."""
    return DecoderConfig(
        vocab_size=151936,
        **_sizes(*sizes, head_dim=128),
        qk_norm=True,
        rope_theta=1e6,
        max_positions=40960,
        tied=tied,
    )


def _llama3(*sizes, positions: int, factor: float = 0.0, tied: bool = False) -> DecoderConfig:
    """Llama 3 and, with a factor, 3.1 and 3.2."""
    scaling = RopeScaling(
        "llama3",
        factor=factor,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    return DecoderConfig(
        vocab_size=128256,
        **_sizes(*sizes),
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=scaling if factor else None,
        max_positions=positions,
        tied=tied,
    )


def _gemma2(layers: int, width: int, heads: int, kv_heads: int, ff: int) -> DecoderConfig:
    """Gemma 2: every other layer, from the first, sees 4096 tokens."""
    return DecoderConfig(
        vocab_size=256000,
        **_sizes(layers, width, heads, kv_heads, ff, head_dim=256),
        activation="gelu_tanh",
        norm_offset=1.0,
        tied=True,
        post_norms=True,
        embed_scale=width**0.5,
        query_scale=256**-0.5,
        attn_softcap=50.0,
        final_softcap=30.0,
        windows=tuple(4096 * (i % 2 == 0) for i in range(layers)),
        max_positions=8192,
    )


def _gemma3(
    *sizes,
    window: int,
    head_dim: int = 256,
    query: int = 256,
    vocab: int = 262208,
    long: bool = True,
) -> DecoderConfig:
    """Gemma 3, its text: every sixth layer sees everything, its rotary embedding apart."""
    layers, width = sizes[:2]
    local = [(i + 1) % 6 != 0 for i in range(layers)]
    return DecoderConfig(
        vocab_size=vocab,
        **_sizes(*sizes, head_dim=head_dim),
        activation="gelu_tanh",
        norm_offset=1.0,
        tied=True,
        qk_norm=True,
        post_norms=True,
        embed_scale=width**0.5,
        query_scale=query**-0.5,
        rope_theta=1e6,
        rope_scaling=RopeScaling("linear", factor=8.0) if long else None,
        local_rope_theta=1e4,
        ropes=tuple("local" if here else "global" for here in local),
        windows=tuple(window * here for here in local),
        max_positions=131072 if long else 32768,
    )


_GEMMA3_4B = _gemma3(34, 2560, 8, 4, 10240, window=1024)
_GEMMA3_27B = _gemma3(62, 5376, 32, 16, 21504, window=1024, head_dim=128, query=168)

PRESETS: dict[str, DecoderConfig] = {
    "qwen1.5-0.5b": _qwen(24, 1024, 16, 16, 2816, tied=True),
    "qwen1.5-1.8b": _qwen(24, 2048, 16, 16, 5504),
    "qwen1.5-4b": _qwen(40, 2560, 20, 20, 6912, rope_theta=5e6),
    "qwen1.5-7b": _qwen(32, 4096, 32, 32, 11008),
    "qwen1.5-14b": _qwen(40, 5120, 40, 40, 13696, vocab=152064),
    "qwen2-0.5b": _qwen(24, 896, 14, 2, 4864, positions=131072, tied=True),
    "qwen2-1.5b": _qwen(28, 1536, 12, 2, 8960, positions=131072, tied=True),
    "qwen2-7b": _qwen(28, 3584, 28, 4, 18944, vocab=152064, positions=131072),
    "qwen2.5-0.5b": _qwen(24, 896, 14, 2, 4864, tied=True),
    "qwen2.5-1.5b": _qwen(28, 1536, 12, 2, 8960, positions=131072, tied=True),
    "qwen2.5-3b": _qwen(36, 2048, 16, 2, 11008, tied=True),
    "qwen2.5-7b": _qwen(28, 3584, 28, 4, 18944, vocab=152064, positions=131072),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288, tied=False),
    "llama2-7b": DecoderConfig(
        vocab_size=32000, **_sizes(32, 4096, 32, 32, 11008), norm_eps=1e-5, max_positions=4096
    ),
    "llama3-8b": _llama3(32, 4096, 32, 8, 14336, positions=8192),
    "llama3.2-1b": _llama3(16, 2048, 32, 8, 8192, positions=131072, factor=32.0, tied=True),
    "mistral-7b": DecoderConfig(
        vocab_size=32000,
        **_sizes(32, 4096, 32, 8, 14336),
        norm_eps=1e-5,
        windows=(4096,) * 32,
        max_positions=32768,
    ),
    "gemma2-2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma2-9b": _gemma2(42, 3584, 16, 8, 14336),
    "gemma3-270m": _gemma3(18, 640, 4, 1, 2048, window=512, vocab=262144, long=False),
    "gemma3-1b": _gemma3(26, 1152, 4, 1, 6912, window=512, vocab=262144, long=False),
    # The text of the models that see images too.
    "gemma3-4b": _GEMMA3_4B,
    "gemma3-12b": _gemma3(48, 3840, 16, 8, 15360, window=1024),
    "gemma3-27b": _GEMMA3_27B,
    "medgemma-4b": _GEMMA3_4B,
    "medgemma-27b": _GEMMA3_27B.replace(vocab_size=262144),  # published as text alone
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        **_sizes(30, 576, 9, 3, 1536),
        norm_eps=1e-5,
        tied=True,
        rope_theta=1e5,
        max_positions=8192,
    ),
    "phi3-mini": DecoderConfig(
        vocab_size=32064,
        **_sizes(32, 3072, 32, 32, 8192),
        norm_eps=1e-5,
        windows=(2047,) * 32,
        max_positions=4096,
    ),
}


# Where they lie: the names that recipes take.
HUB = {
    "qwen1.5-0.5b": "hf://Qwen/Qwen1.5-0.5B",
    "qwen1.5-1.8b": "hf://Qwen/Qwen1.5-1.8B",
    "qwen1.5-4b": "hf://Qwen/Qwen1.5-4B",
    "qwen1.5-7b": "hf://Qwen/Qwen1.5-7B",
    "qwen1.5-14b": "hf://Qwen/Qwen1.5-14B",
    "qwen2-0.5b": "hf://Qwen/Qwen2-0.5B",
    "qwen2-1.5b": "hf://Qwen/Qwen2-1.5B",
    "qwen2-7b": "hf://Qwen/Qwen2-7B",
    "qwen2.5-0.5b": "hf://Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "hf://Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "hf://Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "hf://Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "hf://Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "hf://Qwen/Qwen3-1.7B",
    "qwen3-4b": "hf://Qwen/Qwen3-4B",
    "qwen3-8b": "hf://Qwen/Qwen3-8B",
    "llama2-7b": "hf://meta-llama/Llama-2-7b-chat-hf",
    "llama3-8b": "hf://meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.2-1b": "hf://meta-llama/Llama-3.2-1B-Instruct",
    "mistral-7b": "hf://mistralai/Mistral-7B-Instruct-v0.1",
    "gemma2-2b": "hf://google/gemma-2-2b-it",
    "gemma2-9b": "hf://google/gemma-2-9b-it",
    "gemma3-270m": "hf://google/gemma-3-270m-it",
    "gemma3-1b": "hf://google/gemma-3-1b-it",
    "gemma3-4b": "hf://google/gemma-3-4b-it",
    "gemma3-12b": "hf://google/gemma-3-12b-it",
    "gemma3-27b": "hf://google/gemma-3-27b-it",
    "medgemma-4b": "hf://google/medgemma-4b-it",
    "medgemma-27b": "hf://google/medgemma-27b-text-it",
    "smollm2-135m": "hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    "phi3-mini": "hf://microsoft/Phi-3-mini-4k-instruct",
}
# The chat template (`data.template`) of those that do not speak plain ChatML.
CHAT = {
    name: template
    for template, names in {
        "llama2": "llama2-7b",
        "llama3": "llama3-8b llama3.2-1b",
        "gemma": "gemma2-2b gemma2-9b gemma3-270m gemma3-1b gemma3-4b gemma3-12b gemma3-27b "
        "medgemma-4b medgemma-27b",
        "tokenizer": "qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b mistral-7b phi3-mini",
    }.items()
    for name in names.split()
}


def preset(name: str) -> DecoderConfig:
    """The configuration of a published decoder.

    Raises:
      UserError: an unknown name; lists the known ones.
    """
    if name not in PRESETS:
        raise UserError(f"no preset '{name}'; known: {', '.join(PRESETS)}")
    return PRESETS[name]
