"""Banks and trained base leaves as PEFT's adapter directories; the equations stand in `peft`.

Axes: D input width, O output width, R the rank of a module's adapter.
A module's `lora_A` is `[R, D]`, its `lora_B` `[O, R]`. Every module has the same R and alpha = R:
readers that leave out `rank_pattern` and `alpha_pattern` would scale others wrongly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.files import Write, new_folder, save_tensors, write_json
from medmoe_jax.checkpoints.folded import FoldedWeights
from medmoe_jax.checkpoints.huggingface import write_companions
from medmoe_jax.checkpoints.peft_names import CONFIG, PREFIX, WEIGHTS, linear_modules, site_of
from medmoe_jax.checkpoints.peft_options import LEAVES, MAGNITUDE
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.host import to_host

# What vLLM takes as --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # {module: (A [R, D], B [O, R])}


class TrainedLeaves(NamedTuple):
    """Leaves of the base that were trained, and what is needed to say how.

    Attributes:
      paths: of these leaves.
      params: the base with them and with the banks that were merged.
      members: the banks that stand beside it.
      before: gives the base as it was loaded.
    """

    paths: Collection[str]
    params: Params
    members: Sequence[tuple[BankSpec, Any]]
    before: Callable[[], Params]


def save_peft(
    directory: str | Path,
    config: DecoderConfig,
    family: str,
    members: Sequence[tuple[BankSpec, Any]],
    *,
    base: str = "",
    revision: str = "",
    dtype: DTypeLike = np.float32,
    trained: TrainedLeaves | None = None,
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write banks, and base leaves that were trained, as one adapter that PEFT loads over the base.

    A module's rank is the sum of its banks' E·r, less what an allocator cleared, filled up with
    zeros to the largest; s, Λ and mixing weights are inside B, and PEFT's own scaling is 1. A fused
    module has the A of its sites above each other and a block-diagonal B. Trained kernels that are
    the base's with their rows scaled make it a DoRA adapter; modules with other trained leaves are
    saved whole, banks inside, and biases as they are. The folder appears whole or not at all;
    several processes call this alike, and the first one writes.

    Args:
      directory: a path at which there is nothing yet, or an empty folder.
      config, family: of the base; the family is a key of `families.FAMILIES`.
      members: the banks with their parameters, merged ones too, under any sharding.
      base, revision: what PEFT looks for when it is asked to load the base too: a folder or a Hub
        name, and of that a revision.
      dtype: of the tensors, float32 or bfloat16.
      trained: the base leaves, if any were.
      companions: more files by name; see `huggingface.write_companions`.

    Returns:
      The folder.

    Raises:
      UserError: the folder is not empty or cannot be written, there is nothing to write, one bank's
        gate depends on the token, or every layer was trained whole.
    """
    dtype = np.dtype(dtype)
    if trained and trained.paths:
        factors, arrays, fields = _beside_trained(config, family, members, trained, dtype)
    else:
        factors, arrays, fields = stacked(config, family, members, dtype), {}, {}
    rank = max(len(a_RxD) for a_RxD, _ in factors.values())
    arrays |= widened(factors, rank)
    with new_folder(directory) as write:
        write_adapter(write, arrays, adapter_fields(list(factors), rank, base, revision) | fields)
        write(functools.partial(write_companions, companions or {}))
    return Path(directory)


def write_adapter(write: Write, arrays: Mapping[str, np.ndarray], fields: dict[str, Any]) -> None:
    """Write tensors, by their names in the model, and adapter_config.json into a new folder."""
    named = {PREFIX + name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write(lambda folder: write_json(folder / CONFIG, fields))
    write(lambda folder: save_tensors(folder / WEIGHTS, named))


def serving(options: Mapping[str, Any]) -> Iterator[str]:
    """What a server needs to know of an adapter, from its adapter_config.json."""
    rank = options["r"]
    lacking = [key for key in ("modules_to_save", "use_dora") if options[key]]
    lacking += ["bias"] if options["bias"] != "none" else []
    if lacking:
        yield f"vLLM loads no adapter with {', '.join(lacking)}: give it --format=hf"
    elif rank > VLLM_RANKS[-1]:
        yield f"rank {rank} is more than vLLM takes ({VLLM_RANKS[-1]}): give it --format=hf"
    else:
        needed = next(r for r in VLLM_RANKS if r >= rank)
        yield f"rank {rank}; vLLM needs --enable-lora --max-lora-rank={needed}"


def stacked(
    config: DecoderConfig, family: str, members: Sequence[tuple[BankSpec, Any]], dtype: DTypeLike
) -> Factors:
    """`{module: (A [R, D], B [O, R])}` of banks as one adapter; arguments as of `save_peft`.

    Raises:
      UserError: there is no bank or nothing in them, or one's gate depends on the token.
    """
    if not members:
        raise UserError("there is no bank to write as an adapter")
    found = stack_all(config, family, members, dtype)
    if not found:
        raise UserError("every Λ of the banks to write is 0: there is nothing to write")
    return found


def stack_all(
    config: DecoderConfig, family: str, members: Sequence[tuple[BankSpec, Any]], dtype: DTypeLike
) -> Factors:
    """`stacked` for banks of which there may be none, with nothing in them."""
    for spec, _ in members:
        lifecycle.check_mergeable(spec)
    at = {site: lifecycle.members_at(members, site) for site in site_shapes(config)}
    modules = {
        module: _stacked(weight, at, np.dtype(dtype))
        for module, weight in linear_modules(config, family).items()
    }
    return {module: factors for module, factors in modules.items() if len(factors[0])}


def adapter_fields(modules: Sequence[str], rank: int, base: str, revision: str) -> dict[str, Any]:
    """adapter_config.json for modules of this rank, every scaling 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": revision or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def widened(factors: Factors, rank: int) -> dict[str, np.ndarray]:
    """`{name: tensor}`, filled up with zeros: A `[rank, D]` and B `[O, rank]` of every module."""
    a, b = LEAVES["LORA"]
    out = {}
    for module, (a_RxD, b_OxR) in factors.items():
        more = rank - len(a_RxD)
        out[f"{module}.{a}.weight"] = np.pad(a_RxD, ((0, more), (0, 0)))
        out[f"{module}.{b}.weight"] = np.pad(b_OxR, ((0, 0), (0, more)))
    return out


# Trained leaves -------------------------------------------------------------------------------


def _beside_trained(
    config: DecoderConfig, family: str, members, trained: TrainedLeaves, dtype: np.dtype
) -> tuple[Factors, dict[str, np.ndarray], dict[str, Any]]:
    """`(factors, other tensors, fields of adapter_config.json)` of banks and trained leaves."""
    plan = list(families.tensors(config, family))
    before = FoldedWeights(trained.before(), (), np.float32)
    now = FoldedWeights(trained.params, (), np.float32)
    own = [
        t
        for t in plan
        if any(part.path in trained.paths for part in t.parts)
        and not np.array_equal(now.tensor(t), before.tensor(t))
    ]
    kernels = [t for t in own if families.transposed(t.parts[0].path)]
    eps = float(ml_dtypes.finfo(trained.params["embed"].dtype).eps)
    scaled = _row_factors(kernels, now, before, eps)
    # A bias alone is saved as such; with anything else its module is, all of it.
    whole = {
        _module(t) for t in own if not t.name.endswith(".bias") and not (scaled and t in kernels)
    }
    factors = stack_all(config, family, members, dtype)
    factors = {module: pair for module, pair in factors.items() if module not in whole}
    weights = FoldedWeights(trained.params, trained.members, dtype)
    arrays = {t.name: weights.tensor(t) for t in plan if _module(t) in whole}
    fields: dict[str, Any] = {}
    if scaled:
        factors, magnitudes = _decomposed(
            config, family, factors, scaled, before, trained.members, dtype
        )
        arrays |= magnitudes
        fields["use_dora"] = True
    if not factors:
        factors = nothing(config, family, whole, dtype)
    if any(t.name.endswith(".bias") and _module(t) not in whole for t in own):
        fields["bias"] = "all"
        for t in plan:
            if t.name.endswith(".bias") and _module(t) not in whole:
                inside = ".base_layer" if _module(t) in factors else ""
                arrays[f"{_module(t)}{inside}.bias"] = weights.tensor(t)
    if config.tied and "embed" in trained.paths:
        body, head = families.FAMILIES[family].spellings[0].ends[::-1]
        if body in arrays:  # else no step changed it
            arrays[head] = arrays[body]
            whole.add(head.removesuffix(".weight"))
    if whole:
        fields["modules_to_save"] = sorted(whole)
    return factors, arrays, fields


def _module(tensor: families.Tensor) -> str:
    return tensor.name.rpartition(".")[0]


def _row_factors(
    kernels: Sequence[families.Tensor], now: FoldedWeights, before: FoldedWeights, eps: float
) -> dict[str, np.ndarray]:
    """`{module: g [O]}` if each kernel now is that of before times g, rounded; else empty.

    Every number says between which two its row's g lies: half a unit in the last place around it.
    """
    out = {}
    for tensor in kernels:
        w_OxD, old_OxD = (x.tensor(tensor).astype(np.float64) for x in (now, before))
        half_OxD = np.ldexp(0.501 * eps, np.frexp(w_OxD)[1] - 1)  # a float32 was rounded before
        there_OxD = old_OxD != 0
        ends = [
            np.divide(w_OxD + side * half_OxD, old_OxD, out=np.full_like(w_OxD, side * np.inf),
                      where=there_OxD)
            for side in (-1, 1)
        ]  # fmt: skip
        low_O, high_O = np.minimum(*ends).max(axis=1), np.maximum(*ends).min(axis=1)
        g_O = (low_O + high_O) / 2
        fits = (low_O <= high_O) & np.isfinite(g_O) & (g_O != 0)
        if not fits.all() or w_OxD[~there_OxD].any():
            return {}
        out[_module(tensor)] = g_O.astype(np.float32)
    return out


def _decomposed(
    config: DecoderConfig,
    family: str,
    factors: Factors,
    scaled: Mapping[str, np.ndarray],
    before: FoldedWeights,
    members,
    dtype: np.dtype,
) -> tuple[Factors, dict[str, np.ndarray]]:
    """Factors and magnitudes of a DoRA adapter: `m (W + B A) / |W + B A|` of rows.

    A scaled kernel g W with its banks b A is g (W + B A) with B = b / g, and m = g |W + B A|.
    """
    beside = stack_all(config, family, members, dtype)
    out, magnitudes = {}, {}
    for module, weight in linear_modules(config, family).items():
        if module not in factors and module not in scaled:
            continue
        O, D = weight.shape
        empty = (np.zeros((1, D), dtype), np.zeros((O, 1), dtype))
        a_RxD, b_OxR = (beside if module in scaled else factors).get(module, empty)
        g_O = scaled.get(module, np.ones(O, np.float32))
        b_OxR = (b_OxR.astype(np.float32) / g_O[:, None]).astype(dtype)
        v_OxD = before.tensor(weight) + b_OxR.astype(np.float32) @ a_RxD.astype(np.float32)
        out[module] = (a_RxD, b_OxR)
        magnitudes[f"{module}.{MAGNITUDE}"] = (g_O * np.linalg.norm(v_OxD, axis=1)).astype(dtype)
    return out, magnitudes


def nothing(config: DecoderConfig, family: str, whole: Collection[str], dtype: np.dtype) -> Factors:
    """A module with zeros: PEFT knows no adapter without one."""
    for module, weight in linear_modules(config, family).items():
        if module not in whole:
            O, D = weight.shape
            return {module: (np.zeros((1, D), dtype), np.zeros((O, 1), dtype))}
    raise UserError("every layer was trained whole, so no adapter holds it; use --format=hf")


# Banks ----------------------------------------------------------------------------------------


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
