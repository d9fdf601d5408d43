"""The Hugging Face model families as data: how config.json's fields and the tensors are named.

A family is one entry of `FAMILIES`, keyed by `model_type`; nothing here, in `hf_config` or in
`huggingface` branches on it. HF linear layers are stored `[D_out, D_in]`, ours `[D_in, D_out]`; a
fused HF projection is several of ours stacked along its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints.family import (
    EMBED,
    HEAD,
    LOCAL_THETA,
    ORIGINAL,
    PARTIAL,
    Family,
    Json,
    Spelling,
)
from medmoe_jax.errors import UserError


def _every_layer(values: Json) -> list[bool]:
    return [bool(values["sliding_window"])] * values["num_hidden_layers"]


def _upper_layers(values: Json) -> list[bool]:
    on = values["use_sliding_window"] and bool(values["sliding_window"])
    return [on and i >= values["max_window_layers"] for i in range(values["num_hidden_layers"])]


def _all_but_every(interval: int | None = None) -> Callable[[Json], list[bool]]:
    """Every layer but the n-th, 2n-th, ...; n None = `sliding_window_pattern`."""

    def slides(values: Json) -> list[bool]:
        n = interval or values["sliding_window_pattern"]
        return [(i + 1) % n != 0 for i in range(values["num_hidden_layers"])]

    return slides


def _local_where_it_slides(values: Json, sliding: Sequence[bool]) -> tuple[str, ...]:
    return tuple("local" if slides else "global" for slides in sliding)


def _unrotated(values: Json, sliding: Sequence[bool]) -> tuple[str, ...]:
    rotated, layers = values["no_rope_layers"], values["num_hidden_layers"]
    if rotated is None:  # the field lists the layers that *are* rotated
        rotated = [(i + 1) % values["no_rope_layer_interval"] != 0 for i in range(layers)]
    if len(rotated) != layers:
        raise UserError(f"no_rope_layers: {len(rotated)} entries for {layers} layers")
    return tuple("global" if turns else "none" for turns in rotated)


_TOP = {EMBED: ("embed",), "norm.weight": ("final_norm",)}
_ATTENTION = {
    "self_attn.q_proj.weight": ("attn.q.kernel",),
    "self_attn.k_proj.weight": ("attn.k.kernel",),
    "self_attn.v_proj.weight": ("attn.v.kernel",),
    "self_attn.q_proj.bias": ("attn.q.bias",),
    "self_attn.k_proj.bias": ("attn.k.bias",),
    "self_attn.v_proj.bias": ("attn.v.bias",),
    "self_attn.q_norm.weight": ("attn.q_norm",),
    "self_attn.k_norm.weight": ("attn.k_norm",),
    "self_attn.o_proj.weight": ("attn.o.kernel",),
    "self_attn.o_proj.bias": ("attn.o.bias",),
}
_FUSED_ATTENTION = {
    "self_attn.qkv_proj.weight": ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel"),
    "self_attn.o_proj.weight": ("attn.o.kernel",),
}
_MLP = {
    "mlp.gate_proj.weight": ("mlp.gate.kernel",),
    "mlp.up_proj.weight": ("mlp.up.kernel",),
    "mlp.down_proj.weight": ("mlp.down.kernel",),
    "mlp.gate_proj.bias": ("mlp.gate.bias",),
    "mlp.up_proj.bias": ("mlp.up.bias",),
    "mlp.down_proj.bias": ("mlp.down.bias",),
}
_FUSED_MLP = {
    "mlp.gate_up_proj.weight": ("mlp.gate.kernel", "mlp.up.kernel"),
    "mlp.down_proj.weight": ("mlp.down.kernel",),
}
_NORMS = {
    "input_layernorm.weight": ("attn_norm",),
    "post_attention_layernorm.weight": ("mlp_norm",),
}
_FOUR_NORMS = {
    "input_layernorm.weight": ("attn_norm",),
    "post_attention_layernorm.weight": ("attn_post_norm",),
    "pre_feedforward_layernorm.weight": ("mlp_norm",),
    "post_feedforward_layernorm.weight": ("mlp_post_norm",),
}
_NORMS_AFTER = {
    "post_attention_layernorm.weight": ("attn_post_norm",),
    "post_feedforward_layernorm.weight": ("mlp_post_norm",),
}
# What every family's config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_UPPER_WINDOW = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_MISTRAL = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "o_bias")}
_BIASES = _ATTENTION_BIAS | {"mlp_bias": ("mlp_bias",)}


def _gemma_traits(values: Json) -> dict[str, Any]:
    return {
        "embed_scale": values["hidden_size"] ** 0.5,
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
    }


def _granite_traits(values: Json) -> dict[str, Any]:
    return {
        "embed_scale": float(values["embedding_multiplier"]),
        "query_scale": float(values["attention_multiplier"]),
        "residual_scale": float(values["residual_multiplier"]),
        "output_scale": 1.0 / values["logits_scaling"],
    }


# As transformers names the modules; as it wrote the files; a model saved without its head.
_INSIDE = (
    Spelling("model.language_model.", ""),
    Spelling("language_model.model.", "language_model."),
    Spelling("language_model.", ""),
)


_OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    defaults=_DEFAULTS
    | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False},
    fixed={"clip_qkv": None, "sliding_window": None},
    traits={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
    switches=_ATTENTION_BIAS,
    layer=_ATTENTION | _MLP | _NORMS_AFTER,
)
_GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    defaults=_DEFAULTS
    | _GEMMA
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        LOCAL_THETA: 1e4,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attention_bias": False,
    },
    # Its attention never caps scores, whatever the field says.
    fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    traits={"norm_offset": 1.0, "post_norms": True, "qk_norm": True},
    computed=_gemma_traits,
    exported=lambda config: {"query_pre_attn_scalar": round(config.scale**-2)},
    softcaps={"final_softcap": "final_logit_softcapping"},
    switches=_ATTENTION_BIAS,
    activation="hidden_activation",
    slides=_all_but_every(),
    ropes=_local_where_it_slides,
    layer=_ATTENTION | _MLP | _FOUR_NORMS,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_DEFAULTS
        | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        fixed={"sliding_window": None},
        switches=_BIASES,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_DEFAULTS | _MISTRAL,
        slides=_every_layer,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        defaults=_DEFAULTS | _MISTRAL | {"layer_types": None},
        slides=_every_layer,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_DEFAULTS | _UPPER_WINDOW,
        traits={"qkv_bias": True},
        slides=_upper_layers,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_DEFAULTS | _UPPER_WINDOW | {"head_dim": 128, "attention_bias": False},
        traits={"qk_norm": True},
        switches=_ATTENTION_BIAS,
        slides=_upper_layers,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=_DEFAULTS
        | _GEMMA
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention_bias": False,
        },
        fixed={"use_bidirectional_attention": False},
        traits={"norm_offset": 1.0, "post_norms": True},
        computed=_gemma_traits,
        exported=_GEMMA3.exported,
        softcaps={
            "attn_softcap": "attn_logit_softcapping",
            "final_softcap": "final_logit_softcapping",
        },
        switches=_ATTENTION_BIAS,
        activation="hidden_activation",
        slides=_all_but_every(2),
        layer=_ATTENTION | _MLP | _FOUR_NORMS,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": replace(
        _GEMMA3,
        architecture="Gemma3ForConditionalGeneration",
        fixed={**_GEMMA3.fixed, "final_logit_softcapping": None},  # nor does this class cap logits
        spellings=_INSIDE,
        within=("text_config", "gemma3_text"),
        beside=r"^(model\.)?(vision_tower|multi_modal_projector)\.",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 4096,
            ORIGINAL: 4096,
            PARTIAL: 1.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        slides=_every_layer,
        rope_kinds=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        layer=_FUSED_ATTENTION | _FUSED_MLP | _NORMS,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
        },
        exported=lambda config: {
            "no_rope_layers": [
                int(kind != "none") for kind in config.ropes or ("",) * config.n_layers
            ]
        },
        switches=_BIASES,
        slides=lambda values: [
            values["use_sliding_window"] and bool(values["sliding_window"]) and kind == "none"
            for kind in _unrotated(values, ())
        ],
        ropes=_unrotated,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "olmo2": _OLMO2,
    # Scaled rotary embeddings are of the layers without a window, as its makers run it (and as
    # transformers did before release 5).
    "olmo3": replace(
        _OLMO2,
        architecture="Olmo3ForCausalLM",
        defaults={**_OLMO2.defaults, "sliding_window": 4096, "layer_types": None},
        fixed={"clip_qkv": None},
        slides=_all_but_every(4),
        ropes=_local_where_it_slides,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        fixed={"sliding_window": None},
        computed=_granite_traits,
        exported=lambda config: {
            "embedding_multiplier": config.embed_scale,
            "attention_multiplier": config.scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1.0 / config.output_scale,
        },
        switches=_BIASES,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
}


def family_of(hf: Json) -> str:
    """The key in `FAMILIES` of a config.json. Raises UserError for any other model."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model_type: '{name}' is none of {', '.join(sorted(FAMILIES))}")
    return name


@dataclass(frozen=True)
class Part:
    """Rows `start..stop-1` of a tensor are layer `layer` (None: all) of the leaf at `path`."""

    path: str
    layer: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the HF checkpoint, with the leaves that it holds."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def tensors(
    config: DecoderConfig, family_name: str, spelling: Spelling | None = None
) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this decoder has, layer by layer.

    Args:
      config: of the decoder.
      family_name: a key of `FAMILIES`.
      spelling: of the names; None = the family's first.
    """
    family, shapes = FAMILIES[family_name], decoder.shapes(config)
    body, head = spelling or family.spellings[0]
    top = {body + name: paths for name, paths in _TOP.items()}
    for name, paths in (*top.items(), (head + HEAD, ("head",))):
        if paths[0] in shapes:
            yield _tensor(name, paths, None, shapes)
    for layer in range(config.n_layers):
        for name, paths in family.layer.items():
            full = tuple(f"layers.{path}" for path in paths)
            if full[0] in shapes:
                yield _tensor(f"{body}layers.{layer}.{name}", full, layer, shapes)


def spelling_of(family_name: str, names: Collection[str]) -> Spelling:
    """How a checkpoint with these tensors spells the decoder's names."""
    spellings = FAMILIES[family_name].spellings
    return next((s for s in spellings if s.body + EMBED in names), spellings[0])


def transposed(path: str) -> bool:
    """Whether HF stores this leaf as `[D_out, D_in]`."""
    return path.endswith(".kernel")


def _tensor(name, paths, layer, shapes) -> Tensor:
    parts, rows = [], 0
    for path in paths:
        shape = shapes[path] if layer is None else shapes[path][1:]
        shape = shape[::-1] if transposed(path) else shape
        parts.append(Part(path, layer, rows, rows + shape[0]))
        rows += shape[0]
    return Tensor(name, (rows, *shape[1:]), tuple(parts))
