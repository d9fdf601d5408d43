"""The architectures of GGUF files as data: which family each is, and how its file differs.

A file has the weights of a Hugging Face checkpoint under names of its own, which the `gguf` package
maps, some of them rewritten (`Architecture`), and its fields say what config.json would say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from medmoe_jax.base import rope
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints.family import ORIGINAL, PARTIAL
from medmoe_jax.checkpoints.gguf_file import GgufFile
from medmoe_jax.errors import UserError

Json = dict[str, Any]
# Field of config.json: that of the file, behind the architecture's name.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_LOCAL_THETA = "rope.freq_base_swa"
_HEADS, _KEY, _VALUE = "attention.head_count_kv", "attention.key_length", "attention.value_length"
_ROTATED, _WINDOW, _PATTERN = (
    "rope.dimension_count",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
)
_SCALING = "rope.scaling."
_CAUSAL = "attention.causal"
_SCALED = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Fields that say nothing that the tensors do not.
_IDLE = ("vocab_size", "tensor_data_layout")
# Tensors that hold divisors of rotary frequencies: for short texts, for long ones, for all.
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
      name: of the architecture.
      family: a key of `families.FAMILIES`.
      paired: whether the dimensions that rotate together lie side by side in q's and k's rows; they
        are half a head apart elsewhere.
      offset: what norms have beyond those of the Hugging Face checkpoint.
      windows: whether the file may name a sliding window.
      query: the square of what scores are divided by, where it is not the head's dimension.
      caps: whether the file has caps of scores and logits.
      factors: the tensors, of `FACTORS`, with which llama.cpp scales frequencies one by one.
      more: further fields of config.json.
      read: the fields of the file that `more` reads.
    """

    name: str
    family: str
    paired: bool = False
    offset: float = 0.0
    windows: bool = False
    query: Callable[[Json], int] | None = None
    caps: bool = False
    factors: tuple[str, ...] = ()
    more: Callable[[GgufFile], Json] = lambda file: {}
    read: tuple[str, ...] = ()


def _gemma_query(large: int) -> Callable[[Json], int]:
    """The largest Gemma scales scores by the width of a head's share, the others by the head's."""

    def query(hf: Json) -> int:
        if hf["num_hidden_layers"] == large:
            return hf["hidden_size"] // hf["num_attention_heads"]
        return hf["head_dim"]

    return query


def _gemma3_layers(file: GgufFile) -> Json:
    pattern = file.field(f"gemma3.{_PATTERN}", (int, list), 6)
    kinds = {True: "sliding_attention", False: "full_attention"}
    # `rope.freq_base` is that of the global layers; a field of the local ones' is rarely there.
    local = {"rope_local_base_freq": file.field(f"gemma3.{_LOCAL_THETA}", float, 1e4)}
    if isinstance(pattern, list):
        return local | {"layer_types": [kinds[bool(slides)] for slides in pattern]}
    return local | {"sliding_window_pattern": pattern}


def _llama_biases(file: GgufFile) -> Json:
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", "llama", paired=True, factors=FACTORS[2:], more=_llama_biases),
        Architecture("qwen2", "qwen2"),
        Architecture("qwen3", "qwen3"),
        Architecture(
            "gemma2", "gemma2", offset=1.0, windows=True, query=_gemma_query(46), caps=True
        ),
        Architecture(
            "gemma3",
            "gemma3_text",
            offset=1.0,
            windows=True,
            query=_gemma_query(62),
            more=_gemma3_layers,
            read=(_PATTERN, _LOCAL_THETA),
        ),
        Architecture("phi3", "phi3", windows=True, factors=FACTORS[:2]),
    )
}


def architecture_of(file: GgufFile) -> Architecture:
    """What a file is. Raises UserError for an architecture that is not known."""
    if file.field("split.count", int, 0) > 1:  # but the first has no other fields
        raise UserError(
            f"{file.path}: split.count: one of several files; join them "
            "(llama-gguf-split --merge) and give the whole"
        )
    name = file.field("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file.path}: general.architecture: '{name}' is none of {known}")
    return ARCHITECTURES[name]


def config_json(file: GgufFile) -> Json:
    """What the config.json of the same model says.

    Raises:
      UserError: a field is missing, of another type, or of a kind that is not known.
    """
    arch = architecture_of(file)

    def get(name: str, kind, default: Any = ...):
        return file.field(f"{arch.name}.{name}", kind, default)

    _check_known(file, arch)
    hf: Json = {theirs: get(name, int) for theirs, name in _SIZES.items()}
    heads = hf["num_attention_heads"]
    sizes = {name: hf[theirs] for theirs, name in _SIZES.items()}
    sizes[_KEY] = get(_KEY, int, hf["hidden_size"] // max(heads, 1))
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{file.path}: {arch.name}.{name}: {size} is below 1")
    hf |= {
        "model_type": arch.family,
        "vocab_size": _rows(file, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "num_key_value_heads": get(_HEADS, int, heads),
        "head_dim": sizes[_KEY],
        "rms_norm_eps": _shortest(get(_EPSILON, float)),
        "rope_theta": _shortest(get(_THETA, float, 1e4)),
    }
    if get(_VALUE, int, hf["head_dim"]) != hf["head_dim"]:
        raise UserError(f"{file.path}: {arch.name}.{_VALUE}: must be {_KEY}, {hf['head_dim']}")
    rotated = get(_ROTATED, int, hf["head_dim"])
    if rotated != hf["head_dim"]:
        hf[PARTIAL] = rotated / hf["head_dim"]
    if arch.windows:
        hf["sliding_window"] = get(_WINDOW, int, None) or None
    if arch.caps:
        hf |= {theirs: get(name, float) for theirs, name in _CAPS.items()}
    if arch.query:
        hf["query_pre_attn_scalar"] = arch.query(hf)
    return hf | arch.more(file) | _rope(file, get, hf)


def _check_known(file: GgufFile, arch: Architecture) -> None:
    """Raise UserError for a field of the architecture that would be ignored."""
    known = {*_SIZES.values(), _EPSILON, _THETA, _HEADS, _KEY, _VALUE, _ROTATED, _CAUSAL, *_IDLE}
    known |= {_SCALING + name for name in _SCALED}
    known |= {_WINDOW} if arch.windows else set()
    known |= set(arch.read)
    known |= set(_CAPS.values()) if arch.caps else set()
    for name, value in file.fields.items():
        prefix, _, own = name.partition(".")
        if prefix == arch.name and value and own not in known:
            raise UserError(f"{file.path}: {name}: {str(value)[:80]} is not supported")
    if not file.field(f"{arch.name}.{_CAUSAL}", bool, True):
        raise UserError(f"{file.path}: {arch.name}.{_CAUSAL}: False is not supported")


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, where its double is 9.99999974737875e-06."""
    return float(str(np.float32(value)))


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise UserError(f"{file.path}: {name}: missing")
    return file.tensors[name].shape[0]


def _rope(file: GgufFile, get: Callable, hf: Json) -> Json:
    """The rotary scaling: of the fields, or of tensors with a divisor for every frequency."""
    factor = get(_SCALING + "factor", float, 0.0) or 1.0
    kind = get(_SCALING + "type", str, "linear")  # without a factor that is none
    kind = "none" if kind == "linear" and factor == 1.0 else kind
    original = get(_SCALING + "original_context_length", int, hf["max_position_embeddings"])
    attention = _shortest(get(_SCALING + "attn_factor", float, 1.0))
    divisors = [_divisors_in(file, name) for name in FACTORS if name in file.tensors]
    if divisors:
        if kind not in ("none", "longrope"):
            raise UserError(
                f"{file.path}: {_SCALING}type: '{kind}' beside divisors (rope_freqs and the like) "
                "is not supported"
            )
        scaling: Json = {"rope_type": "longrope", "attention_factor": attention}
        scaling |= {"short_factor": divisors[0], "long_factor": divisors[-1]}
        return {ORIGINAL: original, "rope_scaling": scaling}
    if attention != 1.0:
        raise UserError(f"{file.path}: {_SCALING}attn_factor: {attention} with '{kind}'")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": _shortest(factor)}
    return {"rope_scaling": scaling | ({ORIGINAL: original} if kind == "yarn" else {})}


def _divisors_in(file: GgufFile, name: str) -> list[float]:
    """The values of a tensor of `FACTORS`."""
    tensor = file.tensors[name]
    if len(tensor.shape) != 1:
        raise UserError(f"{file.path}: {name}: {len(tensor.shape)} dimensions, not one")
    found = [_shortest(x) for x in tensor.rows(slice(None))]
    if not all(0 < x < math.inf for x in found):
        raise UserError(f"{file.path}: {name}: its values must be finite and above 0")
    return found


def architecture_fields(arch: Architecture, config: DecoderConfig, hf: Json) -> Json:
    """The fields that say what config.json does, as `hf` and `config`, of the same decoder."""
    scaling = config.rope_scaling
    own: Json = {name: hf[theirs] for theirs, name in _SIZES.items()}
    own |= {
        "vocab_size": config.vocab_size,
        _EPSILON: float(config.norm_eps),
        _THETA: float(config.rope_theta),
        _HEADS: config.n_kv_heads,
        _KEY: config.head_dim,
        _VALUE: config.head_dim,
        _ROTATED: config.rotary_dim or config.head_dim,
    }
    if arch.windows and any(config.windows):
        own[_WINDOW] = max(config.windows)
    if arch.caps:
        own |= {name: float(hf[theirs] or 0) for theirs, name in _CAPS.items()}
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        own |= {_SCALING + "type": scaling.kind, _SCALING + "factor": float(scaling.factor)}
    if scaling is not None and scaling.kind in ("yarn", "longrope"):
        own[_SCALING + "original_context_length"] = scaling.original_max_positions
    if scaling is not None and scaling.kind == "longrope":
        own[_SCALING + "attn_factor"] = float(rope.frequencies(config, "global")[2])
    return {f"{arch.name}.{name}": value for name, value in own.items()}


def name_of(arch: Architecture, layers: int) -> Callable[[str], str]:
    """Maps a tensor's name in the Hugging Face checkpoint to that in the file."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    table = gguf.get_tensor_name_map(number, layers)

    def name(theirs: str) -> str:
        found = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
        # The package knows no head for an architecture whose models all share the embedding.
        return found or "output.weight"

    return name


def pair_rows(config: DecoderConfig) -> np.ndarray:
    """Where row i of a head as Hugging Face lays it out lies in a head of a `paired` file."""
    half = np.arange(config.head_dim // 2)
    return np.concatenate([2 * half, 2 * half + 1])
