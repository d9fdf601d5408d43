"""What adapter_config.json says of an adapter: its kind, the modules it sits on, their scaling.

The rules are PEFT's, so that a file means here what it means there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.checkpoints.patterns import compiled, looks_around
from medmoe_jax.checkpoints.peft_names import CONFIG
from medmoe_jax.errors import UserError
from medmoe_jax.kinds import Number, fits, shown, wrong_fields

# The tensors of a linear layer's adapter: A, B and, in AdaLoRA, Λ.
LEAVES = {"LORA": ("lora_A", "lora_B"), "ADALORA": ("lora_A", "lora_B", "lora_E")}
MAGNITUDE, TOKENS = "lora_magnitude_vector", "trainable_tokens_delta"
BIASES = ("none", "all", "lora_only")
# Options that change what an adapter computes, in ways that no bank or base leaf can.
REFUSED = (
    *("lora_bias", "target_parameters", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config"),
)
READ = (
    *("peft_type", "r", "init_r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "bias", "use_dora", "trainable_token_indices"),
    *("ensure_weight_tying", "init_lora_weights"),
)
# Of who made the adapter, of how it begins or trains, or of how it is run: not of what it computes.
ELSEWHERE = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_config", "megatron_core", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
)
# Initialisations that take a part out of the base's weights: the adapter fits the rest only.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


# The types of what is read; `r`, `init_r` and `lora_alpha` are numbers, which `problems` checks.
_KINDS: dict[str, Any] = {
    "peft_type": str | None,
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), bool | None),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, Any] | None),
    **dict.fromkeys(("target_modules", "exclude_modules"), str | list[str] | None),
    **dict.fromkeys(("layers_pattern", "modules_to_save"), str | list[str] | None),
    "layers_to_transform": int | list[int] | None,
    "trainable_token_indices": list[int] | dict[str, list[int]] | None,
    "bias": str | None,
    "lora_dropout": Number | None,
    "init_lora_weights": bool | str | None,
}
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Scaling:
    """What adapter_config.json says of one module: `s = alpha / r`, or `alpha / sqrt(r)`."""

    rank: int
    alpha: float
    root: bool

    @property
    def s(self) -> float:
        """The factor on the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.root else self.rank)


@dataclass(frozen=True)
class Options:
    """An adapter_config.json.

    Attributes:
      fields: as they stand in the file.
    """

    fields: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Options:
        """The file of an adapter's folder; UserError where it is none."""
        return cls(read_json(folder / CONFIG))

    @property
    def kind(self) -> str:
        """`LORA` or `ADALORA`."""
        return self.fields["peft_type"]

    @property
    def decomposed(self) -> bool:
        """Whether every module has a magnitude of its own (DoRA)."""
        return bool(self.fields.get("use_dora"))

    @property
    def tied(self) -> bool:
        """Whether what is done to an embedding is done to the head that is tied to it."""
        return bool(self.fields.get("ensure_weight_tying"))

    @property
    def bias(self) -> str:
        """Whose biases were trained: one of `BIASES`."""
        return self.fields.get("bias") or "none"

    @property
    def dropout(self) -> float:
        """The dropout of the adapter's input, in training."""
        return float(self.fields.get("lora_dropout") or 0.0)

    def problems(self) -> list[str]:
        """What cannot be honoured."""
        fields, kind = self.fields, self.fields.get("peft_type")
        if wrong := wrong_fields(fields, _KINDS):
            return [f"{CONFIG}: {problem}" for problem in wrong]
        if kind not in LEAVES:
            return [f"{CONFIG}: peft_type: {kind!r} is none of {', '.join(LEAVES)}"]
        out = [f"{key}: {fields[key]!r} is not supported" for key in REFUSED if fields.get(key)]
        if self.bias not in BIASES:
            out.append(f"bias: {self.bias!r} is none of {', '.join(BIASES)}")
        if _CHANGES_BASE.match(str(fields.get("init_lora_weights"))):
            out.append(
                f"init_lora_weights: {fields['init_lora_weights']!r} changes the base's weights; "
                "convert the adapter to a plain one with PEFT first"
            )
        adalora = kind == "ADALORA"
        out += _bad_number("init_r" if adalora else "r", fields, whole=True)
        out += _bad_number("lora_alpha", fields)
        # AdaLoRA's rank_pattern is another thing: masks of what is gone from the tensors already.
        for key in () if adalora else ("rank_pattern", "alpha_pattern"):
            for pattern in fields.get(key) or {}:
                out += _bad_number(pattern, fields[key], whole=key == "rank_pattern")
                out += _bad_pattern(key, pattern)
        for key in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(key), str) and self.tells_targets:
                out += _bad_pattern(key, fields[key])
        for key in ("modules_to_save", "layers_pattern"):
            for pattern in _listed(fields.get(key)):
                out += _bad_pattern(key, pattern)
        if not fields.get("target_modules") and not fields.get("modules_to_save"):
            out.append("target_modules is empty")
        return [f"{CONFIG}: {problem}" for problem in out]

    @property
    def tells_targets(self) -> bool:
        """Whether it says which modules have an adapter in a way that is read; `targets`."""
        given = (self.fields.get(key) for key in ("target_modules", "exclude_modules"))
        return not any(isinstance(one, str) and looks_around(one) for one in given)

    def notes(self) -> list[str]:
        """Fields that PEFT does not know; like PEFT, nothing is made of them."""
        known = {*READ, *REFUSED, *ELSEWHERE}
        unknown = [key for key, value in self.fields.items() if value and key not in known]
        what = "not known, and nothing was made of it"
        notes = [f"{CONFIG}: {', '.join(unknown)}: {what}"] if unknown else []
        if not self.tells_targets:
            notes.append(
                f"{CONFIG}: its target_modules look around, which is not read: the modules are "
                "those that have tensors in the file"
            )
        return notes

    def token_rows(self, module: str, is_embedding: bool) -> list[int]:
        """Tokens of an embedding or a head whose rows alone were trained."""
        given = self.fields.get("trainable_token_indices") or []
        if isinstance(given, Mapping):
            return next((rows for name, rows in given.items() if module.endswith(name)), [])
        return list(given) if is_embedding else []

    def targets(self, module: str, in_block: bool) -> bool:
        """Whether there is an adapter on a module; `in_block`: it is a linear layer of a block."""
        wanted = self.fields.get("target_modules") or []
        if _matches(self.fields.get("exclude_modules") or [], module):
            return False
        # What is saved whole takes no adapter.
        saved = _listed(self.fields.get("modules_to_save"))
        if any(compiled(rf"(^|.*\.){name}($|\..*)").match(module) for name in saved):
            return False
        if wanted == "all-linear":
            return in_block and self._in_layers(module)
        if not isinstance(wanted, str) and module in wanted:
            return True
        return _matches(wanted, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.fields.get("layers_to_transform")
        if layers in (None, []):
            return True
        patterns = _listed(self.fields.get("layers_pattern")) or ["[^.]*"]
        found = (
            compiled(rf".*?\.{pattern}\.(?P<number>\d{{1,6}})\.").match(f".{module}")
            for pattern in patterns
        )
        numbers = (match["number"] for match in found if match)
        number = next((int(one) for one in numbers if one), None)
        return number in ([layers] if isinstance(layers, int) else layers)

    def saves(self, parameter: str) -> bool:
        """Whether a tensor of the base lies in a module that was trained and saved whole."""
        names, parts = _listed(self.fields.get("modules_to_save")), parameter.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        return any(module.endswith(name) for module in modules for name in names)

    def scaling(self, module: str) -> Scaling:
        """The scaling of a module's adapter."""
        fields = self.fields
        if self.kind == "ADALORA":
            # Its s stays that of the initial rank, however few ranks are left.
            rank, alpha = fields["init_r"], fields["lora_alpha"]
            return Scaling(rank, float(alpha if alpha > 0 else rank), False)
        rank = _by_pattern(fields.get("rank_pattern"), module, fields["r"])
        alpha = _by_pattern(fields.get("alpha_pattern"), module, fields["lora_alpha"])
        return Scaling(rank, float(alpha), bool(fields.get("use_rslora")))


def _listed(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or []


def _bad_number(key: str, fields: Mapping[str, Any], whole: bool = False) -> list[str]:
    value: Any = fields.get(key)
    if fits(value, int if whole else Number) and (value > 0 if whole else abs(value) < _LARGEST):
        return []
    return [f"{key}: {shown(value)} is not a {'positive whole ' if whole else ''}number"]


def _bad_pattern(key: str, pattern: str) -> list[str]:
    try:
        compiled(pattern)
    except UserError as error:
        return [f"{key}: {error}"]
    return []


def _matches(patterns: str | Sequence[str], module: str) -> bool:
    """PEFT's rule: a regular expression on the whole name, or a list of ends of names."""
    if isinstance(patterns, str):
        return compiled(patterns).fullmatch(module) is not None
    return any(module == end or module.endswith(f".{end}") for end in patterns)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default):
    """The value of the first pattern that matches an end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if compiled(rf"(.*\.)?({pattern})$").match(module):
            return value
    return default
