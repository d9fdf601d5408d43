"""Rotary embeddings in a config.json: `rope_scaling`, `rope_parameters` and fields beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medmoe_jax.base.config import DecoderConfig, RopeScaling
from medmoe_jax.checkpoints.family import LOCAL_THETA, ORIGINAL, PARTIAL, Family, Json
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import Number, check_fields, fits

# Keys of a rope scaling that must and that may be there.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (
        (),
        (
            "factor",
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "mscale",
            "mscale_all_dim",
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", ORIGINAL, "attention_factor")),
}
_FIELDS = {ORIGINAL: "original_max_positions"}  # the other keys have our field's name
_HINTS: dict[str, Any] = {
    **{name: Number for needed, more in _KEYS.values() for name in (*needed, *more)},
    **{name: list[Number] for name in ("short_factor", "long_factor")},
    **{"truncate": bool, ORIGINAL: int, PARTIAL: Number, "rope_theta": Number},
    **{"rope_type": str, "type": str},
}
_IGNORED = {ORIGINAL, "finetuned"}
_ANY = ("truncate", "mscale", "mscale_all_dim")  # of these 0 says something
_FULL, _SLIDING = "full_attention", "sliding_attention"
# The fields that `read` looks at.
ROPE_FIELDS = ("rope_scaling", "rope_parameters", "rope_theta", ORIGINAL, PARTIAL, LOCAL_THETA)


def read(family: Family, values: Json, hf: Json) -> dict[str, Any]:
    """The `DecoderConfig` fields of the rotary embeddings.

    Args:
      family: of the model.
      values: the family's fields with defaults filled in.
      hf: config.json, or the part that describes the decoder.

    Raises:
      UserError: an unknown kind or key, or one that this family cannot have.
    """
    old, new = _given(hf, "rope_scaling"), _given(hf, "rope_parameters")
    by_layer = {key: new.pop(key) for key in (_FULL, _SLIDING) if key in new}
    if LOCAL_THETA not in family.defaults:
        if by_layer or any(isinstance(value, Mapping) for value in new.values()):
            raise UserError("rope_parameters: one set a layer type is not supported in this family")
        theta, scaling, dim = _embedding(family, values, hf, old or new, values["rope_theta"])
        return _fields(theta, scaling, dim)
    # One type of layers only leaves a default at the level of the types.
    if new not in ({}, {"rope_type": "default"}):
        raise UserError(f"rope_parameters: needs one set a layer type, has {sorted(new)}")
    if "type" in old:
        raise UserError("rope_scaling: 'type' is read by some releases only; write 'rope_type'")
    given = {key: _given(by_layer, key) for key in (_FULL, _SLIDING)}
    given[_FULL] |= old
    theta, scaling, dim = _embedding(family, values, hf, given[_FULL], values["rope_theta"])
    local = _embedding(family, values, hf, given[_SLIDING], values[LOCAL_THETA])
    return _fields(theta, scaling, dim) | {
        "local_rope_theta": local[0],
        "local_rope_scaling": local[1],
    }


def write(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The fields of config.json that `read` reads, in the form that every release knows."""
    scaling = config.rope_scaling
    hf: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling is not None:
        required, optional = _KEYS[scaling.kind]
        default = RopeScaling(scaling.kind)
        fields: dict[str, Any] = {"rope_type": scaling.kind}
        hf["rope_scaling"] = fields
        for key in (*required, *optional):
            name = _FIELDS.get(key, key)
            value = getattr(scaling, name)
            if key in (*required, "factor") or value != getattr(default, name):
                fields[key] = list(value) if isinstance(value, tuple) else value
    own = {
        ORIGINAL: scaling.original_max_positions if scaling else config.max_positions,
        PARTIAL: (config.rotary_dim or config.head_dim) / config.head_dim,
        LOCAL_THETA: config.local_rope_theta,
    }
    return hf | {key: value for key, value in own.items() if key in family.defaults}


def _not_null(given: Json) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _given(hf: Json, name: str) -> dict[str, Any]:
    given = hf.get(name) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{name}: {given!r} is not a set of fields")
    return _not_null(given)


def _fields(theta: float, scaling: RopeScaling | None, dim: int) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": dim}


def _embedding(
    family: Family, values: Json, hf: Json, given: dict[str, Any], theta: float
) -> tuple[float, RopeScaling | None, int]:
    """`(theta, scaling, rotated dimensions or 0)` of one set of keys."""
    given = dict(given)
    check_fields(given, _HINTS, "rope_scaling")
    theta = _number("rope_theta", given.pop("rope_theta", None) or theta or 10000.0)
    if theta <= 0:
        raise UserError(f"rope_theta: {theta} is not above 0")
    kinds = [given.pop(key, None) for key in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    kind = family.rope_aliases.get(kind, kind)
    dim = _rotated(family, values, given.pop(PARTIAL, None) or hf.get(PARTIAL) or 1.0)
    if kind not in (family.rope_kinds or _KEYS):
        known = ", ".join(family.rope_kinds or _KEYS)
        raise UserError(f"rope_scaling: '{kind}' is none of {known}")
    required, optional = _KEYS[kind]
    missing = [key for key in required if key not in given]
    unknown = sorted(set(given) - {*required, *optional} - _IGNORED)
    if missing or unknown:
        raise UserError(f"rope_scaling '{kind}': missing {missing}, not supported {unknown}")
    if kind == "default":
        return theta, None, dim
    positions = values["max_position_embeddings"]
    original = values.get(ORIGINAL) or hf.get(ORIGINAL) or given.get(ORIGINAL) or positions
    computed = {ORIGINAL: original, "factor": given.get("factor") or positions / original}
    given |= {key: value for key, value in computed.items() if key in optional}
    fields = {_FIELDS.get(k, k): given[k] for k in (*required, *optional) if k in given}
    for name, value in fields.items():
        numbers = value if isinstance(value, list) else [value]
        numbers = [_number(f"rope_scaling.{name}", x) for x in numbers]
        if name not in _ANY and min(numbers, default=1.0) <= 0:
            raise UserError(f"rope_scaling.{name}: {min(numbers)} is not above 0")
        fields[name] = tuple(numbers) if isinstance(value, list) else value
    scaling = RopeScaling(kind, **fields)
    if kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError("rope_scaling.low_freq_factor: must be below high_freq_factor")
    return theta, scaling, dim


def _number(name: str, value: Any) -> float:
    if not isinstance(value, bool) and not fits(value, Number):
        raise UserError(f"{name}: {value!r} is not a number")
    return float(value)


def _rotated(family: Family, values: Json, share: Any) -> int:
    """How many leading dimensions of a head are rotated, 0 = all."""
    if share == 1.0:
        return 0
    if PARTIAL not in family.defaults:
        raise UserError(f"{PARTIAL}: {share} is not supported in this family")
    dim = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    return int(dim * _number(PARTIAL, share))
