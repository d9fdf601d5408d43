"""A routed bank, and the banks beside it, in the format of directory that MING-MOE's code loads.

Axes: L layers of the model, N those of a bank, D input width, E experts, O output width, R the rank
that all have.
That code (arXiv 2404.09027, read in public) takes three files: PEFT's adapter, which it merges into
the base first; the `experts` of `released.LAYOUTS` in a pickle of torch; and a config.json that
says how many experts there are and how many of them a token picks. It puts experts on every
projection of every feed-forward network, so those that a bank leaves out are zeros here, and takes
one rank and one alpha for all of it from adapter_config.json: factors are filled up with zeros, s
and Λ are inside B, and alpha is the rank. It reads a router's bias, whether there is one or not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.adapters import bank as bank_lib
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import trees
from medmoe_jax.base.config import GROUPS, DecoderConfig
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints import peft_export
from medmoe_jax.checkpoints.files import new_folder
from medmoe_jax.checkpoints.huggingface import settings, write_companions
from medmoe_jax.checkpoints.peft_names import PREFIX, linear_modules, site_of
from medmoe_jax.checkpoints.released import LAYOUTS, MODEL, OTHERS, TOP_K, VIEWS
from medmoe_jax.checkpoints.torch_files import save_torch
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.host import to_host

_FFN = (*GROUPS["mlp.in"], *GROUPS["mlp.out"])
(_LAYOUT,) = (layout for layout in LAYOUTS if layout.gate == "token")


def save_released(
    directory: str | Path,
    config: DecoderConfig,
    family: str,
    members: Sequence[tuple[BankSpec, Any]],
    *,
    base: str = "",
    revision: str = "",
    source: Path | None = None,
    dtype: DTypeLike = np.float32,
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write one routed bank as experts and routers, and all other banks as an adapter beside them.

    The folder appears whole or not at all; several processes call this alike, and the first one
    writes.

    Args:
      directory: a path at which there is nothing yet, or an empty folder.
      config, family: of the base; the family is a key of `families.FAMILIES`.
      members: the banks with their parameters, merged ones too, under any sharding.
      base, revision: where the base is: a folder or a Hub name, and of that a revision.
      source: the folder that the base came from, whose config.json is written with more fields.
      dtype: of the tensors, float32 or bfloat16.
      companions: more files by name; see `huggingface.write_companions`.

    Returns:
      The folder.

    Raises:
      UserError: the folder is not empty or cannot be written, there is not one routed bank, or the
        format cannot express it; the message says what of it.
    """
    dtype = np.dtype(dtype)
    spec, params = _routed(members)
    _check(spec, config, family)
    beside = [(other, p) for other, p in members if other is not spec]
    factors = peft_export.stack_all(config, family, beside, dtype)
    factors = factors or peft_export.nothing(config, family, (), dtype)
    rank = max(spec.rank, *(len(a_RxD) for a_RxD, _ in factors.values()))
    experts = _tensors(_everywhere(spec, params, config, rank), spec.experts, config, family)
    experts = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in experts}
    fields = settings(config, family, source) | {
        "num_experts": spec.experts,
        TOP_K: spec.top_k,
        "share_expert": False,
        "expert_selection": "topk",
        "use_rslora": False,
    }
    with new_folder(directory) as write:
        peft_export.write_adapter(
            write,
            peft_export.widened(factors, rank),
            peft_export.adapter_fields(list(factors), rank, base, revision),
        )
        write(lambda folder: save_torch(folder / OTHERS, experts))
        write(functools.partial(write_companions, {**(companions or {}), MODEL: fields}))
    return Path(directory)


def _routed(members: Sequence[tuple[BankSpec, Any]]) -> tuple[BankSpec, Any]:
    routed = [(spec, params) for spec, params in members if spec.routed]
    if not routed:
        raise UserError("no bank has a router, which this format is for; use --format=peft")
    if len(routed) > 1:
        names = ", ".join(spec.name for spec, _ in routed)
        raise UserError(f"this format holds one bank with routers, not {names}; --off=BANK")
    return routed[0]


def _check(spec: BankSpec, config: DecoderConfig, family: str) -> None:
    """Raise UserError for what those experts cannot be."""
    modules = linear_modules(config, family).items()
    fused = [m for m, weight in modules if len(weight.parts) > 1 and _on_ffn(weight.parts[0])]
    what = {
        f"gate '{spec.gate}', not '{_LAYOUT.gate}'": spec.gate != _LAYOUT.gate,
        f"form '{spec.form}', not 'lora'": spec.form != "lora",
        "renormalise=False, where the weights of a token's picks must sum to one": (
            not spec.renormalise
        ),
        f"{' '.join(spec.sites)}, where only {' '.join(_FFN)} can be": set(spec.sites) - set(_FFN),
        f"a router for each projection, which are one in {', '.join(fused[:1])}": fused,
    }
    if found := [words for words, lacks in what.items() if lacks]:
        raise UserError(f"bank '{spec.name}' does not fit this format: it has {'; '.join(found)}")


def _on_ffn(part: Any) -> bool:
    return site_of(part) in _FFN


def _everywhere(
    spec: BankSpec, params: Params, config: DecoderConfig, rank: int
) -> dict[str, dict[str, np.ndarray]]:
    """`{site: {leaf: float32}}` of the bank on all sites and layers, zeros where it has nothing.

    s and Λ are inside B.
    """
    wide = spec.replace(
        sites=_FFN, start=0, stop=config.n_layers, rank=rank, router_bias=True, learned_scale=False
    )
    out: dict[str, dict[str, np.ndarray]] = {}
    for site, shapes in bank_lib.shapes(wide, config).items():
        out[site] = {leaf: np.zeros(shape, np.float32) for leaf, shape in trees.flatten(shapes)}
        own = {leaf: to_host(x) for leaf, x in trees.flatten(params.get(site, {}))}
        if own:
            own["lora_b"] = spec.s * own["lora_b"] * own.pop("scale", np.ones(1))[..., None]
        for leaf, x in own.items():
            out[site][leaf][spec.start : spec.stop][tuple(map(slice, x.shape))] = x
    return out


def _tensors(
    leaves: Mapping[str, Mapping[str, np.ndarray]], experts: int, config: DecoderConfig, family: str
) -> Iterator[tuple[str, np.ndarray]]:
    """`(name, tensor)` of all experts and routers."""
    for module, weight in linear_modules(config, family).items():
        part = weight.parts[0]
        if _on_ffn(part) and part.layer is not None:
            for leaf, name in _LAYOUT.tensors.items():
                for e in range(experts if "{e}" in name else 1):
                    x = VIEWS[leaf](leaves[site_of(part)][leaf], part.layer, e)
                    yield f"{PREFIX}{module}.{name.format(e=e)}", x
