"""A decoder's configuration in and out of a Hugging Face config.json.

Every field of config.json that changes the model is used, or is an error that names it. Which
fields a family has, and which change nothing, is data in `families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import hf_rope
from medmoe_jax.checkpoints.families import FAMILIES, family_of
from medmoe_jax.checkpoints.family import (
    FIXED,
    IGNORED,
    LOCAL_THETA,
    ORIGINAL,
    PARTIAL,
    SIZES,
    Family,
    Json,
)
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import Number, check_fields, fits, shown

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_MOST_LAYERS, _MOST = 4096, 2**31  # of a file that tells the truth
# Which layers have a window or a rotation. In other families these may hold anything.
_LAYER_FIELDS = {
    "max_window_layers": int,
    "use_sliding_window": bool | None,
    "no_rope_layers": list[int] | None,
}
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def config_from_hf(hf: Json) -> DecoderConfig:
    """The decoder that a config.json describes, in the form of any transformers release.

    Raises:
      UserError: an unsupported model, activation, rope scaling or option; a missing or bad field.
    """
    family = FAMILIES[family_of(hf)]
    hf = _decoder_part(family, hf)
    values = _values(family, hf)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    sliding = _sliding(family, values, hf)
    config = DecoderConfig(
        **{ours: values[theirs] for ours, theirs in SIZES.items()},
        n_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or width // heads,
        activation=_activation(family, values),
        norm_eps=float(values["rms_norm_eps"]),
        tied=bool(values["tie_word_embeddings"]),
        windows=_windows(values, sliding),
        ropes=family.ropes(values, sliding),
        **hf_rope.read(family, values, hf),
        **{ours: float(values[theirs] or 0) for ours, theirs in family.softcaps.items()},
        **{name: bool(values[key]) for key, ours in family.switches.items() for name in ours},
        **family.traits,
        **family.computed(values),
    )
    frequencies = (config.rotary_dim or config.head_dim) // 2
    for name in ("short_factor", "long_factor"):
        given = len(getattr(config.rope_scaling, name, ()))
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
    if family.within:
        raise UserError(f"a '{name}' model has other parts too, which only a folder of one has")
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        family.activation: activations[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **{theirs: getattr(config, ours) or None for ours, theirs in family.softcaps.items()},
        **{key: getattr(config, ours[0]) for key, ours in family.switches.items()},
        **family.exported(config),
        **hf_rope.write(config, family),
    }
    sliding = [bool(size) for size in config.windows] or [False] * config.n_layers
    windows = {
        "sliding_window": max(config.windows, default=0) or None,
        "use_sliding_window": any(sliding),
        "max_window_layers": [*sliding, True].index(True),
        "layer_types": [_name_of(_LAYER_TYPES, slides) for slides in sliding],
    }
    hf |= {key: value for key, value in windows.items() if key in family.defaults}
    _check_expressible(config, config_from_hf(hf), name)
    return hf


def expressing(config: DecoderConfig) -> str:
    """The first family that can express a decoder. Raises UserError where none can."""
    reasons = []
    for name in (name for name, family in FAMILIES.items() if not family.within):
        try:
            config_to_hf(config, name)
        except UserError as error:
            reasons.append(str(error))
        else:
            return name
    raise UserError("no Hugging Face family can express this decoder\n  " + "\n  ".join(reasons))


def unknown_fields(hf: Json) -> list[str]:
    """Fields of a config.json that are set, and that neither we nor transformers' class know."""
    family = FAMILIES[family_of(hf)]
    fields, known = _decoder_part(family, hf), known_fields(family)
    return sorted(key for key, value in fields.items() if value and key not in known)


def known_fields(family: Family) -> set[str]:
    """Fields that are used, refused where they deviate, or change nothing."""
    used = {*family.defaults, *SIZES.values(), *hf_rope.ROPE_FIELDS, "layer_types"}
    return used | {*family.fixed, *FIXED, *IGNORED}


def differences(a: DecoderConfig, b: DecoderConfig) -> Iterator[tuple[str, Any, Any]]:
    """`(field, a's, b's)` of every field in which two decoders differ, however they are written."""
    a, b = _normal_form(a), _normal_form(b)
    for name in DecoderConfig.__dataclass_fields__:
        if getattr(a, name) != getattr(b, name):
            yield name, getattr(a, name), getattr(b, name)


def _decoder_part(family: Family, hf: Json) -> Json:
    """config.json itself, or what it says of the decoder where the model has other parts."""
    if not family.within:
        return hf
    key, kind = family.within
    inner = hf.get(key)
    if not isinstance(inner, Mapping) or inner.get("model_type", kind) != kind:
        found = inner.get("model_type") if isinstance(inner, Mapping) else inner
        raise UserError(f"{key}: not the fields of a '{kind}' model, but {found!r}")
    tie = "tie_word_embeddings"
    tied = hf.get(tie, family.defaults[tie])
    if inner.get(tie, tied) != tied:
        raise UserError(f"{tie}: {tied!r}, but {inner[tie]!r} in {key}")
    return {**inner, tie: tied, "quantization_config": hf.get("quantization_config")}


def _values(family: Family, hf: Json) -> dict[str, Any]:
    """The family's fields with defaults filled in; raises UserError for missing and bad ones."""
    numbers = ("rope_theta", LOCAL_THETA, PARTIAL, *family.softcaps.values())
    check_fields(
        hf,
        {
            family.activation: str,
            "layer_types": list[str] | None,
            "tie_word_embeddings": bool,
            ORIGINAL: int | None,
            **dict.fromkeys(numbers, Number | None),
            **dict.fromkeys(family.switches, bool | None),
            **{key: kind for key, kind in _LAYER_FIELDS.items() if key in family.defaults},
        },
        "config.json",
    )
    wanted = {*family.defaults, *SIZES.values()}
    values = {**family.defaults, **{key: hf[key] for key in wanted if key in hf}}
    missing = [key for key in SIZES.values() if key not in values]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    for key, value in (FIXED | dict(family.fixed)).items():
        if hf.get(key) not in (None, value):
            raise UserError(f"{key}: {hf[key]!r} is not supported by the decoder")
    counts = (*SIZES.values(), "num_key_value_heads", "head_dim", "sliding_window")
    optional = {key for key, default in family.defaults.items() if default is None}
    optional |= {"num_key_value_heads", "head_dim", "sliding_window"}
    for key in (*counts, "sliding_window_pattern", "no_rope_layer_interval"):
        value: Any = values.get(key)
        count = fits(value, int) and 0 < value <= _MOST
        if key in values and not count and not (value is None and key in optional):
            raise UserError(
                f"{key}: {shown(value)} is not a positive whole number that can be meant"
            )
    if values["num_hidden_layers"] > _MOST_LAYERS:
        raise UserError(f"num_hidden_layers: {values['num_hidden_layers']} is absurd")
    for key in (
        *("rms_norm_eps", "query_pre_attn_scalar", "logits_scaling"),
        *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    ):
        if key in values and not (fits(values[key], Number) and values[key] > 0):
            raise UserError(f"{key}: {shown(values[key])} is not a positive number")
    return values


def _activation(family: Family, values: Json) -> str:
    name = values[family.activation]
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{family.activation}: '{name}' is not supported (known: {known})")
    return _ACTIVATIONS[name]


def _sliding(family: Family, values: Json, hf: Json) -> list[bool]:
    """Which layers have a sliding window."""
    types, layers = hf.get("layer_types"), values["num_hidden_layers"]
    if types is None:
        return family.slides(values)
    unknown = sorted(set(types) - set(_LAYER_TYPES))
    if unknown or len(types) != layers:
        raise UserError(
            f"layer_types: {len(types)} entries for {layers} layers; "
            f"not supported: {', '.join(unknown) or 'none'}"
        )
    sliding = [_LAYER_TYPES[kind] for kind in types]
    if "layer_types" not in family.defaults and sliding != family.slides(values):
        raise UserError("layer_types: not supported in this family, whose layers are all alike")
    return sliding


def _windows(values: Json, sliding: list[bool]) -> tuple[int, ...]:
    if not any(sliding):
        return ()
    size = values["sliding_window"] if values.get("use_sliding_window", True) else None
    if not size:
        raise UserError("sliding_window: missing or switched off, although some layers have one")
    return tuple(size if slides else 0 for slides in sliding)


def _name_of(table: Mapping[str, Any], value: Any) -> str:
    return next(name for name, known in table.items() if known == value)


def _normal_form(config: DecoderConfig) -> DecoderConfig:
    changes: dict[str, Any] = {
        "vocab_used": 0,
        "query_scale": config.scale,
        "windows": config.windows if any(config.windows) else (),
        "ropes": config.ropes if set(config.ropes) - {"global"} else (),
        "rotary_dim": config.rotary_dim or config.head_dim,
        "qk_norm_whole": config.qk_norm and config.qk_norm_whole,
    }
    if config.ropes and "global" not in config.ropes:
        changes |= {"rope_theta": 0.0, "rope_scaling": None}
    local = "local" in config.ropes
    changes["local_rope_theta"] = local and (config.local_rope_theta or config.rope_theta)
    changes["local_rope_scaling"] = config.local_rope_scaling if local else None
    return config.replace(**changes)


def _check_expressible(config: DecoderConfig, read_back: DecoderConfig, family: str) -> None:
    lost = [
        f"{name}: {want!r} would be read as {got!r}"
        for name, want, got in differences(config, read_back)
    ]
    if lost:
        raise UserError(f"a '{family}' model cannot express this decoder: " + "; ".join(lost))
