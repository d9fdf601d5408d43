"""Banks from and to PEFT's adapter directories (adapter_config.json, adapter_model.safetensors).

Axes: N layers of a bank, D input width, E experts, r rank, O output width.
A module is a linear layer of the Hugging Face model, fused ones included; PEFT stores its
`lora_A` as `[r, D]`, its `lora_B` as `[O, r]` and adds `scaling · lora_B lora_A` to its weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  gives numpy the bfloat16 of safetensors
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.files import new_folder, read_json, save_tensors, write_json
from medmoe_jax.checkpoints.huggingface import write_companions
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.host import to_host

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The tensors of a module: A, B and, in AdaLoRA, Λ.
_LAYOUTS = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
}
# Options that change what an adapter computes, or which other weights belong to it.
_REFUSED = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("velora_config", "monteclora_config"),
)
# Initialisations that take a part out of the base's weights: the adapter fits the rest only.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


@dataclass(frozen=True)
class _Scaling:
    """What adapter_config.json says of one module: `s = alpha / r`, or `alpha / sqrt(r)`."""

    rank: int
    alpha: float
    root: bool

    @property
    def s(self) -> float:
        return self.alpha / (self.rank**0.5 if self.root else self.rank)


def read_peft(
    folder: str | Path, config: DecoderConfig, family: str, name: str
) -> tuple[BankSpec, dict[str, Any]]:
    """A PEFT LoRA or AdaLoRA adapter as a bank of one always-on expert.

    Modules of unequal rank are padded with zeros to the largest, and modules that the adapter
    leaves out are zero; where scalings differ, each module's is moved into its B. A fused module
    becomes several sites with the same A.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config, family: the base it was trained on; the family is a key of `families.FAMILIES`.
      name: of the bank.

    Returns:
      The specification and the parameters, float32 numpy arrays as `adapters.bank.shapes`.

    Raises:
      UserError: a file is missing or damaged, the adapter does what a bank cannot, or it belongs
        to another base; one message lists everything.
    """
    folder = Path(folder)
    options = read_json(folder / CONFIG)
    modules = linear_modules(config, family)
    problems = _unsupported(options)
    if not problems:
        scalings = {m: _scaling(options, m) for m in modules if _targeted(options, m, modules)}
        found, problems = _read_tensors(folder / WEIGHTS, options["peft_type"], modules, scalings)
    if problems:
        raise UserError(
            f"{folder}: not an adapter that fits this base ({family}, {config.n_layers} layers, "
            f"width {config.d_model}); {len(problems)} problems\n  " + "\n  ".join(problems)
        )
    return _bank(name, options, config, modules, scalings, found)


def save_peft(
    directory: str | Path,
    config: DecoderConfig,
    family: str,
    members: Sequence[tuple[BankSpec, Any]],
    *,
    base: str = "",
    dtype: DTypeLike = np.float32,
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write banks as one LoRA adapter that PEFT loads over their base.

    A module's rank is the sum of its banks' E·r, less what an allocator cleared; s, Λ and mixing
    weights are inside B, and PEFT's own scaling is 1. A fused module has the A of its sites above
    each other and a block-diagonal B. The folder appears whole or not at all; several processes
    call this alike, and the first one writes.

    Args:
      directory: a path at which there is nothing yet, or an empty folder.
      config, family: of the base; the family is a key of `families.FAMILIES`.
      members: the banks with their parameters, under any sharding.
      base: what PEFT looks for when it is asked to load the base too: a folder or a Hub name.
      dtype: of the tensors, float32 or bfloat16.
      companions: more files by name; see `huggingface.write_companions`.

    Returns:
      The folder.

    Raises:
      UserError: the folder is not empty or cannot be written, there is no bank or nothing in
        them, or one's gate depends on the token.
    """
    ranks, arrays = {}, {}
    for module, factors in stacked(config, family, members, dtype).items():
        ranks[module] = len(factors[0])
        names = (f"{_PREFIX}{module}.{leaf}" for leaf in _LAYOUTS["LORA"])
        arrays |= zip(names, factors, strict=True)
    options = _options(ranks, base)
    with new_folder(directory) as write:
        write(lambda folder: write_json(folder / CONFIG, options))
        write(lambda folder: save_tensors(folder / WEIGHTS, arrays))
        write(functools.partial(write_companions, companions or {}))
    return Path(directory)


def stacked(
    config: DecoderConfig, family: str, members: Sequence[tuple[BankSpec, Any]], dtype: DTypeLike
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{module: (A [r, D], B [O, r])}` of banks as one adapter; arguments as of `save_peft`.

    Raises:
      UserError: there is no bank or nothing in them, or one's gate depends on the token.
    """
    for spec, _ in members:
        lifecycle.check_mergeable(spec)
    if not members:
        raise UserError("there is no bank to write as an adapter")
    at = {site: lifecycle.members_at(members, site) for site in site_shapes(config)}
    modules = {
        module: _stacked(weight, at, np.dtype(dtype))
        for module, weight in linear_modules(config, family).items()
    }
    found = {module: factors for module, factors in modules.items() if len(factors[0])}
    if not found:
        raise UserError("every Λ of the banks to write is 0: there is nothing to write")
    return found


def linear_modules(config: DecoderConfig, family: str) -> dict[str, families.Tensor]:
    """`{name: weight}` of the linear layers of every block of the Hugging Face model, in order."""
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in families.tensors(config, family)
        if families.transposed(tensor.parts[0].path)
    }


def site_of(part: families.Part) -> str:
    """The site whose kernel a part of a module's weight is."""
    return part.path.removeprefix("layers.").removesuffix(".kernel")


# Reading --------------------------------------------------------------------------------------


def _unsupported(options: Mapping[str, Any]) -> list[str]:
    """Options that a bank cannot honour."""
    kind = options.get("peft_type")
    if kind not in _LAYOUTS:
        return [f"{CONFIG}: peft_type: {kind!r} is none of {', '.join(_LAYOUTS)}"]
    problems = [f"{key}: {options[key]!r} is not supported" for key in _REFUSED if options.get(key)]
    if options.get("bias", "none") != "none":
        problems.append(f"bias: {options['bias']!r}; only 'none' can be imported")
    if _CHANGES_BASE.match(str(options.get("init_lora_weights"))):
        problems.append(
            f"init_lora_weights: {options['init_lora_weights']!r} changes the base's weights; "
            "convert the adapter to a plain one with PEFT first"
        )
    adalora = kind == "ADALORA"
    problems += _bad_number("init_r" if adalora else "r", options, whole=True)
    problems += _bad_number("lora_alpha", options)
    # AdaLoRA's rank_pattern is another thing: masks of what is gone from the tensors already.
    for key in () if adalora else ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(key) or {}:
            problems += _bad_number(pattern, options[key], whole=key == "rank_pattern")
            problems += _bad_pattern(key, pattern)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(options.get(key), str):
            problems += _bad_pattern(key, options[key])
    if not options.get("target_modules"):
        problems.append("target_modules is empty")
    return [f"{CONFIG}: {problem}" for problem in problems]


def _bad_number(key: str, fields: Mapping[str, Any], whole: bool = False) -> list[str]:
    value = fields.get(key)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if fits and math.isfinite(value) and (value > 0 or not whole):
        return []
    return [f"{key}: {value!r} is not a {'positive whole ' if whole else ''}number"]


def _bad_pattern(key: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{key}: {pattern!r} is not a regular expression ({error})"]
    return []


def _matches(patterns: str | list[str], module: str) -> bool:
    """PEFT's rule: a regular expression on the whole name, or a list of ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in patterns)


def _targeted(options, module: str, modules: Mapping[str, families.Tensor]) -> bool:
    """Whether adapter_config.json puts an adapter on a module."""
    targets, layers = options["target_modules"], options.get("layers_to_transform")
    if _matches(options.get("exclude_modules") or [], module):
        return False
    if targets != "all-linear" and not _matches(targets, module):
        return False
    if layers in (None, []):
        return True
    pattern = options.get("layers_pattern") or ["layers"]
    chosen = [layers] if isinstance(layers, int) else layers
    return "layers" in pattern and modules[module].parts[0].layer in chosen


def _scaling(options: Mapping[str, Any], module: str) -> _Scaling:
    if options["peft_type"] == "ADALORA":
        # Its s stays that of the initial rank, however few ranks are left.
        rank, alpha = options["init_r"], options["lora_alpha"]
        return _Scaling(rank, float(alpha if alpha > 0 else rank), False)
    rank = _by_pattern(options.get("rank_pattern"), module, options["r"])
    alpha = _by_pattern(options.get("alpha_pattern"), module, options["lora_alpha"])
    return _Scaling(rank, float(alpha), bool(options.get("use_rslora")))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default):
    """The value of the first pattern that matches an end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_tensors(path: Path, kind: str, modules, scalings):
    """`({module: its tensors in the layout's order, float32}, problems)`."""
    layout, found, problems = _LAYOUTS[kind], {}, []
    try:
        with safe_open(path, framework="np") as file:
            keys = set(file.keys())
            for module, scaling in scalings.items():
                names = [f"{_PREFIX}{module}.{leaf}" for leaf in layout]
                problems += [f"{name}: missing" for name in names if name not in keys]
                if keys.issuperset(names):
                    found[module] = [file.get_tensor(name).astype(np.float32) for name in names]
                    problems += _misshapen(names, found[module], modules[module].shape, scaling)
                    problems += [
                        f"{name}: NaN or infinity"
                        for name, tensor in zip(names, found[module], strict=True)
                        if not np.isfinite(tensor).all()
                    ]
                keys -= set(names)
    except FileNotFoundError:
        return {}, [f"{path.name}: missing (other formats must be converted first)"]
    except SafetensorError as error:
        return {}, [f"{path.name}: truncated or damaged ({error})"]
    for key in sorted(keys):
        module = re.sub(r"\.lora_[ABE](\.weight)?$", "", key.removeprefix(_PREFIX))
        known = module in modules
        why = f"is left out by {CONFIG}" if known else "is no linear layer of this base"
        problems.append(f"{key}: '{module}' {why}")
    if not found and not problems:
        problems.append(f"{CONFIG}: target_modules matches no linear layer of this base")
    return found, problems


def _misshapen(names, tensors, weight_shape, scaling: _Scaling) -> Iterator[str]:
    """Tensors that do not fit the module's weight `[O, D]`; only AdaLoRA prunes ranks."""
    O, D = weight_shape
    rank = tensors[2].shape[0] if len(tensors) == 3 else scaling.rank
    for name, tensor, shape in zip(names, tensors, ((rank, D), (O, rank), (rank, 1)), strict=False):
        if tensor.shape != shape or rank > scaling.rank:
            yield f"{name}: shape {tensor.shape}, expected {shape} (rank {scaling.rank})"


def _bank(name, options, config, modules, scalings, found) -> tuple[BankSpec, dict[str, Any]]:
    layers = [modules[module].parts[0].layer for module in found]
    present = {site_of(part) for module in found for part in modules[module].parts}
    rank = max(scaling.rank for scaling in scalings.values())
    equal = len(set(scalings.values())) == 1
    first = next(iter(scalings.values()))
    spec = BankSpec(
        name=name,
        sites=tuple(site for site in site_shapes(config) if site in present),
        start=min(layers),
        stop=max(layers) + 1,
        rank=rank,
        alpha=first.alpha if equal else float(rank),
        rank_stabilised=first.root and equal,
        dropout=float(options.get("lora_dropout") or 0.0),
        learned_scale=options["peft_type"] == "ADALORA",
    )
    params: dict[str, Any] = {}
    for site in spec.sites:
        D, O = site_shapes(config)[site]
        params[site] = {
            "lora_a": np.zeros((spec.layers, D, 1, rank), np.float32),
            "lora_b": np.zeros((spec.layers, 1, rank, O), np.float32),
        }
        if spec.learned_scale:
            params[site]["scale"] = np.zeros((spec.layers, 1, rank), np.float32)
    for module, (a_rxD, b_Oxr, *scale_rx1) in found.items():
        r = a_rxD.shape[0]
        for part in modules[module].parts:
            leaves, i = params[site_of(part)], part.layer - spec.start
            leaves["lora_a"][i, :, 0, :r] = a_rxD.T
            b_rxO = b_Oxr[part.start : part.stop].T
            leaves["lora_b"][i, 0, :r] = b_rxO if equal else scalings[module].s * b_rxO
            if scale_rx1:
                leaves["scale"][i, 0, :r] = scale_rx1[0][:, 0]
    return spec, params


# Writing --------------------------------------------------------------------------------------


def _options(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """adapter_config.json for modules of these ranks, every scaling 1."""
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _stacked(weight: families.Tensor, at, dtype) -> tuple[np.ndarray, np.ndarray]:
    """A `[R, D]` and B `[O, R]` of one module: all banks on all its sites, R = 0 without any."""
    O, D = weight.shape
    a, blocks = [np.zeros((0, D), dtype)], []
    for part in weight.parts:
        for spec, p in zip(*at[site_of(part)], strict=True):
            if spec.start <= part.layer < spec.stop:
                a_DxR, b_RxO = map(
                    to_host, _factors(spec, dtype, p, np.int32(part.layer - spec.start))
                )
                if spec.learned_scale:
                    # What an allocator cleared adds nothing: Λ, inside B, is 0 there.
                    stays_R = b_RxO.any(axis=1)
                    a_DxR, b_RxO = a_DxR[:, stays_R], b_RxO[stays_R]
                a.append(a_DxR.T)
                blocks.append((slice(part.start, part.stop), b_RxO.T))
    b_OxR = np.zeros((O, sum(b.shape[1] for _, b in blocks)), dtype)
    start = 0
    for rows, b in blocks:
        b_OxR[rows, start : start + b.shape[1]] = b
        start += b.shape[1]
    return np.concatenate(a), b_OxR


@functools.partial(jax.jit, static_argnums=(0, 1))
def _factors(spec: BankSpec, dtype, site_params, layer):
    one = jax.tree.map(lambda leaf: leaf[layer], site_params)
    return jax.tree.map(lambda x: x.astype(dtype), lifecycle.factors(spec, one))
