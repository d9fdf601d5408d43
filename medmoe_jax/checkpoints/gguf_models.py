"""Decoder weights out of GGUF files, dequantised piece by piece into their shards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.gguf_architectures import (
    FACTORS,
    Architecture,
    architecture_of,
    config_json,
    name_of,
    pair_rows,
)
from medmoe_jax.checkpoints.gguf_file import GgufFile, GgufTensor, open_gguf
from medmoe_jax.checkpoints.hf_config import config_from_hf
from medmoe_jax.checkpoints.placing import fill_all
from medmoe_jax.errors import UserError


def describe(file: GgufFile) -> tuple[str, DecoderConfig]:
    """The family and the shapes of a file's decoder, all of whose tensors are there.

    Raises:
      UserError: an architecture, field or tensor that is not known, missing or of another shape.
    """
    arch = architecture_of(file)
    try:
        config = config_from_hf(config_json(file))
    except UserError as error:
        said = str(error).startswith(str(file.path))
        raise UserError(str(error) if said else f"{file.path}: {error}") from None
    _check(file, arch, config)
    return arch.family, config


def load(
    path: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    shardings: Mapping[str, Any] | None = None,
    quantise: str = "",
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model; arguments and result as of `huggingface.load`.

    Raises:
      UserError: see `open_gguf` and `describe`; nothing has been loaded by then.
    """
    file = open_gguf(path)
    arch, (_, config) = architecture_of(file), describe(file)
    parts = (
        (part, functools.partial(_read, arch, config, file.tensors[name], part))
        for name, tensor in _plan(arch, config).items()
        for part in tensor.parts
    )
    return config, fill_all(config, parts, dtype, shardings, quantise)


def _plan(arch: Architecture, config: DecoderConfig) -> dict[str, families.Tensor]:
    """The decoder's tensors by their names in the file."""
    name = name_of(arch, config.n_layers)
    return {name(tensor.name): tensor for tensor in families.tensors(config, arch.family)}


def _check(file: GgufFile, arch: Architecture, config: DecoderConfig) -> None:
    """Raise UserError with all that is missing, unknown or of another shape."""
    plan, problems = _plan(arch, config), []
    for name, tensor in plan.items():
        if name not in file.tensors:
            problems.append(f"{name}: missing")
        elif file.tensors[name].shape != tensor.shape:
            shape = file.tensors[name].shape
            problems.append(f"{name}: shape {shape}, the fields ask for {tensor.shape}")
    unknown = sorted(set(file.tensors) - set(plan) - set(FACTORS))
    problems += [f"{name}: unknown to this architecture" for name in unknown]
    if problems:
        raise UserError(f"{file.path}: {len(problems)} problems\n  " + "\n  ".join(problems))


def _read(
    arch: Architecture,
    config: DecoderConfig,
    stored: GgufTensor,
    part: families.Part,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Rows and columns `index` of one part of a tensor, as Hugging Face lays it out."""
    rows = np.arange(part.stop - part.start)[index[0]]
    if arch.paired and part.path.startswith(("layers.attn.q.", "layers.attn.k.")):
        h = config.head_dim
        rows = rows // h * h + pair_rows(config)[rows % h]
    x = stored.rows(part.start + rows, *index[1:])
    return x - np.float32(arch.offset) if part.path.endswith("norm") else x
