"""The Hugging Face model families as data: how config.json and the tensors are named.

A family is one entry of `FAMILIES`, keyed by `model_type`; nothing here or in `huggingface`
branches on it. HF linear layers are stored `[D_out, D_in]`, ours `[D_in, D_out]`; a fused HF
projection is several of ours stacked along its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig, RopeScaling
from medmoe_jax.errors import UserError

Json = Mapping[str, Any]

# Our field: theirs. All of theirs but those in a family's defaults must be in config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
_ORIGINAL = "original_max_position_embeddings"

# Keys of a rope scaling that must and that may be there.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "yarn": (
        (),
        (
            "factor",
            _ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "mscale",
            "mscale_all_dim",
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", _ORIGINAL, "attention_factor")),
}
_ROPE_FIELDS = {_ORIGINAL: "original_max_positions"}  # the other keys have our field's name
_ROPE_IGNORED = {_ORIGINAL, "finetuned"}


def _no_layer(values: Json) -> list[bool]:
    return [False] * values["num_hidden_layers"]


def _every_layer(values: Json) -> list[bool]:
    return [bool(values["sliding_window"])] * values["num_hidden_layers"]


def _upper_layers(values: Json) -> list[bool]:
    on = values["use_sliding_window"] and bool(values["sliding_window"])
    return [on and i >= values["max_window_layers"] for i in range(values["num_hidden_layers"])]


def _even_layers(values: Json) -> list[bool]:
    return [i % 2 == 0 for i in range(values["num_hidden_layers"])]


_TOP = {
    "model.embed_tokens.weight": ("embed",),
    "lm_head.weight": ("head",),
    "model.norm.weight": ("final_norm",),
}
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
}
_FUSED_ATTENTION = {
    "self_attn.qkv_proj.weight": ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel"),
    "self_attn.o_proj.weight": ("attn.o.kernel",),
}
_MLP = {
    "mlp.gate_proj.weight": ("mlp.gate.kernel",),
    "mlp.up_proj.weight": ("mlp.up.kernel",),
    "mlp.down_proj.weight": ("mlp.down.kernel",),
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
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def _gemma_traits(values: Json) -> dict[str, Any]:
    return {
        "embed_scale": values["hidden_size"] ** 0.5,
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
    }


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the class name in `architectures`.
      defaults: fields that config.json may leave out, with the value they then have. A field
        that is neither here nor required is unknown to the family and ignored.
      traits: `DecoderConfig` fields the family fixes.
      computed: more such fields, from config.json's values.
      exported: config.json fields that no other entry covers, from the `DecoderConfig`.
      softcaps: our field to theirs; null is off.
      activation: the field with the activation's name.
      refused: fields that change the model in a way the decoder has no term for.
      slides: which layers have a sliding window, where there are no `layer_types`.
      rope_aliases: other names of rope scalings.
      layer: tensor names of a layer, each with the leaves that make up its rows.
    """

    architecture: str
    defaults: Json
    traits: Json = field(default_factory=dict)
    computed: Callable[[Json], dict[str, Any]] = lambda values: {}
    exported: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    softcaps: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    refused: Sequence[str] = ()
    slides: Callable[[Json], list[bool]] = _no_layer
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_DEFAULTS | {"max_position_embeddings": 2048},
        refused=("attention_bias", "mlp_bias"),
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        slides=_every_layer,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_DEFAULTS | _UPPER_WINDOW | {"max_position_embeddings": 32768},
        traits={"qkv_bias": True},
        slides=_upper_layers,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_DEFAULTS | _UPPER_WINDOW | {"max_position_embeddings": 32768, "head_dim": 128},
        traits={"qk_norm": True},
        refused=("attention_bias",),
        slides=_upper_layers,
        layer=_ATTENTION | _MLP | _NORMS,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "layer_types": None,
        },
        traits={"norm_offset": 1.0, "post_norms": True},
        computed=_gemma_traits,
        exported=lambda config: {"query_pre_attn_scalar": round(config.scale**-2)},
        softcaps={
            "attn_softcap": "attn_logit_softcapping",
            "final_softcap": "final_logit_softcapping",
        },
        activation="hidden_activation",
        refused=("attention_bias", "use_bidirectional_attention"),
        slides=_even_layers,
        layer=_ATTENTION | _MLP | _FOUR_NORMS,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 4096,
            _ORIGINAL: 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        slides=_every_layer,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        layer=_FUSED_ATTENTION | _FUSED_MLP | _NORMS,
    ),
}


def family_of(hf: Json) -> str:
    """The key in `FAMILIES` of a config.json. Raises UserError for any other model."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"model_type: '{name}' is none of {', '.join(sorted(FAMILIES))}")
    return name


def config_from_hf(hf: Json) -> DecoderConfig:
    """The decoder that a config.json describes, in the form of any transformers release.

    Raises:
      UserError: an unsupported model, activation, rope scaling or option; a missing or bad field.
    """
    family = FAMILIES[family_of(hf)]
    values = _values(family, hf)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    theta, scaling = _rope(family, values, hf)
    config = DecoderConfig(
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        n_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or width // heads,
        activation=_activation(family, values),
        norm_eps=float(values["rms_norm_eps"]),
        tied=bool(values["tie_word_embeddings"]),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(family, values),
        **{ours: float(values[theirs] or 0) for ours, theirs in family.softcaps.items()},
        **family.traits,
        **family.computed(values),
    )
    frequencies = config.head_dim // 2
    for name in ("short_factor", "long_factor"):
        given = len(getattr(scaling, name, ()))
        if given not in (0, frequencies):
            raise UserError(f"rope_scaling.{name}: {given} numbers, expected {frequencies}")
    return config


def config_to_hf(config: DecoderConfig, family_name: str) -> dict[str, Any]:
    """The config.json of a decoder, in the form that every transformers release reads.

    `vocab_used` has no counterpart there and is left out.

    Raises:
      UserError: no such family, or one that cannot express `config`; names the fields.
    """
    name = family_of({"model_type": family_name})
    family = FAMILIES[name]
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        family.activation: activations[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **{theirs: getattr(config, ours) or None for ours, theirs in family.softcaps.items()},
        **family.exported(config),
        **_rope_to_hf(config),
    }
    sliding = [bool(size) for size in config.windows] or [False] * config.n_layers
    windows = {
        "sliding_window": max(config.windows, default=0) or None,
        "use_sliding_window": any(sliding),
        "max_window_layers": [*sliding, True].index(True),
        "layer_types": [_name_of(_LAYER_TYPES, slides) for slides in sliding],
    }
    hf |= {key: value for key, value in windows.items() if key in family.defaults}
    if _ORIGINAL in family.defaults and config.rope_scaling:
        hf[_ORIGINAL] = config.rope_scaling.original_max_positions
    _check_expressible(config, config_from_hf(hf), name)
    return hf


def expressing(config: DecoderConfig) -> str:
    """The first family that can express a decoder. Raises UserError where none can."""
    reasons = []
    for name in FAMILIES:
        try:
            config_to_hf(config, name)
        except UserError as error:
            reasons.append(str(error))
        else:
            return name
    raise UserError("no Hugging Face family can express this decoder\n  " + "\n  ".join(reasons))


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


def tensors(config: DecoderConfig, family_name: str) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this decoder has, layer by layer."""
    shapes = decoder.shapes(config)
    for name, paths in _TOP.items():
        if paths[0] in shapes:
            yield _tensor(name, paths, None, shapes)
    for layer in range(config.n_layers):
        for name, paths in FAMILIES[family_name].layer.items():
            full = tuple(f"layers.{path}" for path in paths)
            if full[0] in shapes:
                yield _tensor(f"model.layers.{layer}.{name}", full, layer, shapes)


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


def _values(family: Family, hf: Json) -> dict[str, Any]:
    """The family's fields with defaults filled in; raises UserError for missing and bad ones."""
    wanted = {*family.defaults, *_SIZES.values()}
    values = {**family.defaults, **{key: hf[key] for key in wanted if key in hf}}
    missing = [key for key in _SIZES.values() if key not in values]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    counts = (*_SIZES.values(), "num_key_value_heads", "head_dim", "sliding_window")
    optional = {key for key, default in family.defaults.items() if default is None}
    optional |= {"num_key_value_heads", "head_dim", "sliding_window"}
    for key in counts:
        value = values.get(key)
        count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not count and not (value is None and key in optional):
            raise UserError(f"{key}: {value!r} is not a positive whole number")
    for key in ("rms_norm_eps", "query_pre_attn_scalar"):
        if key in values and not (isinstance(values[key], int | float) and values[key] > 0):
            raise UserError(f"{key}: {values[key]!r} is not a positive number")
    for key in (*family.refused, "quantization_config"):
        if hf.get(key):
            raise UserError(f"{key}: {hf[key]!r} is not supported by the decoder")
    return values


def _activation(family: Family, values: Json) -> str:
    name = values[family.activation]
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{family.activation}: '{name}' is not supported (known: {known})")
    return _ACTIVATIONS[name]


def _windows(family: Family, values: Json) -> tuple[int, ...]:
    types, layers = values.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        sliding = family.slides(values)
    else:
        unknown = sorted(set(types) - set(_LAYER_TYPES))
        if unknown or len(types) != layers:
            raise UserError(
                f"layer_types: {len(types)} entries for {layers} layers; "
                f"not supported: {', '.join(unknown) or 'none'}"
            )
        sliding = [_LAYER_TYPES[kind] for kind in types]
    if not any(sliding):
        return ()
    size = values["sliding_window"]
    if not size:
        raise UserError("sliding_window: missing, although some layers have one")
    return tuple(size if slides else 0 for slides in sliding)


def _rope(family: Family, values: Json, hf: Json) -> tuple[float, RopeScaling | None]:
    """`(theta, scaling)`, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    given = {k: v for k, v in (hf.get("rope_scaling") or {}).items() if v is not None}
    given = given or {k: v for k, v in (hf.get("rope_parameters") or {}).items() if v is not None}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UserError(f"rope_parameters: one set a layer type is not supported: {sorted(given)}")
    theta = float(given.pop("rope_theta", None) or values["rope_theta"] or 10000.0)
    kinds = [given.pop(key, None) for key in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    kind = family.rope_aliases.get(kind, kind)
    partial = given.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise UserError(f"partial_rotary_factor: {partial} is not supported")
    if kind == "default":
        return theta, None
    if kind not in _ROPE_KEYS:
        raise UserError(f"rope_scaling: '{kind}' is none of {', '.join(_ROPE_KEYS)}")
    required, optional = _ROPE_KEYS[kind]
    missing = [key for key in required if key not in given]
    unknown = sorted(set(given) - {*required, *optional} - _ROPE_IGNORED)
    if missing or unknown:
        raise UserError(f"rope_scaling '{kind}': missing {missing}, not supported {unknown}")
    positions = values["max_position_embeddings"]
    original = values.get(_ORIGINAL) or given.get(_ORIGINAL) or positions
    computed = {_ORIGINAL: original, "factor": given.get("factor") or positions / original}
    given |= {key: value for key, value in computed.items() if key in optional}
    fields = {_ROPE_FIELDS.get(k, k): given[k] for k in (*required, *optional) if k in given}
    fields |= {k: tuple(map(float, v)) for k, v in fields.items() if isinstance(v, list)}
    return theta, RopeScaling(kind, **fields)


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    required, optional = _ROPE_KEYS[scaling.kind]
    fields: dict[str, Any] = {"rope_type": scaling.kind}
    default = RopeScaling(scaling.kind)
    for key in (*required, *optional):
        name = _ROPE_FIELDS.get(key, key)
        value = getattr(scaling, name)
        if key in (*required, "factor") or value != getattr(default, name):
            fields[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": config.rope_theta, "rope_scaling": fields}


def _name_of(table: Mapping[str, Any], value: Any) -> str:
    return next(name for name, known in table.items() if known == value)


def _normal_form(config: DecoderConfig) -> DecoderConfig:
    windows = config.windows if any(config.windows) else ()
    return config.replace(vocab_used=0, query_scale=config.scale, windows=windows)


def differences(a: DecoderConfig, b: DecoderConfig) -> Iterator[tuple[str, Any, Any]]:
    """`(field, a's, b's)` of every field in which two decoders differ, however they are written."""
    a, b = _normal_form(a), _normal_form(b)
    for name in DecoderConfig.__dataclass_fields__:
        if getattr(a, name) != getattr(b, name):
            yield name, getattr(a, name), getattr(b, name)


def _check_expressible(config: DecoderConfig, read_back: DecoderConfig, family: str) -> None:
    lost = [
        f"{name}: {want!r} would be read as {got!r}"
        for name, want, got in differences(config, read_back)
    ]
    if lost:
        raise UserError(f"a '{family}' model cannot express this decoder: " + "; ".join(lost))
