"""Decoder weights in and out of Hugging Face checkpoints (config.json and safetensors).

A slice of one tensor at a time goes from the mapped file into its place (`placing`). Of a model
with other parts beside the decoder (`Family.beside`), reading leaves those out, and writing copies
them from the folder that the decoder came from.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives numpy the bfloat16 of safetensors
import numpy as np
from jax.typing import DTypeLike

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.families import FAMILIES, family_of
from medmoe_jax.checkpoints.files import (
    Write,
    new_folder,
    read_json,
    save_tensors,
    write_bytes,
    write_json,
)
from medmoe_jax.checkpoints.folded import FoldedWeights
from medmoe_jax.checkpoints.hf_config import config_from_hf, config_to_hf, unknown_fields
from medmoe_jax.checkpoints.placing import fill_all
from medmoe_jax.checkpoints.safetensors_files import (
    INDEX,
    SINGLE,
    OpenedFiles,
    StoredTensor,
    open_files,
)
from medmoe_jax.data.hub import hub_errors
from medmoe_jax.errors import UserError

HUB = "hf://"
CONFIG = "config.json"
_PROCESSORS = (
    *("processor_config.json", "preprocessor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json"),
)
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_DOWNLOADED += ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
# The same weights once more, as Mistral's own code names them, and other models in folders.
_LEFT = ("consolidated*.safetensors", "*/*.safetensors")


def published(source: str) -> tuple[str, str]:
    """`(name on the Hub, revision)` of a model, as far as it is known; else its path and "".

    A folder tells by its place in the Hub's cache. `_name_or_path` of its config.json does not: in
    that of a fine-tuned model stands the model that it began with.
    """
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
        return name, revision
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/([^/]+)/?$", f"/{source}")
    if cached:
        return f"{cached[1]}/{cached[2]}", cached[3]
    return source, ""


def locate(source: str | Path) -> Path:
    """The local folder of a model: itself, or for `hf://org/name[@revision]` a snapshot of it.

    Raises:
      UserError: no such folder, or the Hub cannot provide the model.
    """
    if not str(source).startswith(HUB):
        if not Path(source).is_dir():
            raise UserError(f"{source}: no such folder (a model on the Hub is {HUB}org/name)")
        return Path(source)
    from huggingface_hub import constants, snapshot_download

    name, _, revision = str(source).removeprefix(HUB).partition("@")
    with hub_errors(str(source)):
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(_DOWNLOADED),
                ignore_patterns=list(_LEFT),
                local_files_only=constants.HF_HUB_OFFLINE,  # else a revision's files are asked for
            )
        )


def read_config(source: str | Path) -> DecoderConfig:
    """The decoder's configuration of a local folder or a `hf://` model.

    Raises:
      UserError: see `locate` and `config_from_hf`; the message names the file.
    """
    return describe(locate(source))[1]


def describe(folder: Path) -> tuple[str, DecoderConfig]:
    """The family, a key of `FAMILIES`, and the decoder's configuration of a local folder.

    Raises:
      UserError: see `config_from_hf`; the message names the file.
    """
    path = folder / CONFIG
    hf = read_json(path)
    try:
        return family_of(hf), config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load(
    source: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    shardings: Mapping[str, Any] | None = None,
    quantise: str = "",
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model.

    Args:
      source: a folder with config.json and safetensors files, or `hf://org/name[@revision]`.
      dtype: of the parameters returned, float32 or bfloat16.
      shardings: a tree like the parameters, of `NamedSharding`s or `SingleDeviceSharding`s; None
        puts everything on the first device.
      quantise: a key of `base.quantised.KINDS` for the kernels, each layer's as it is read; ""
        leaves them in `dtype`.

    Returns:
      The configuration and the parameter tree of `base.decoder`.

    Raises:
      UserError: see `read_config`; or files or tensors are missing, damaged, unknown or of
        another shape. One error lists all of them, and nothing has been loaded by then.
    """
    folder = locate(source)
    family, config = describe(folder)
    with contextlib.ExitStack() as stack:
        opened = open_files(folder, stack)
        plan = _plan(opened, family, config)
        parts = (
            (part, functools.partial(opened.tensors[tensor.name].rows, part))
            for tensor in plan
            for part in tensor.parts
        )
        return config, fill_all(config, parts, dtype, shardings, quantise)


def notes(folder: Path) -> tuple[str, ...]:
    """What of a local folder is left out, for people. Raises UserError: see `read_config`."""
    path = folder / CONFIG
    hf = read_json(path)
    out = []
    if unknown := unknown_fields(hf):
        out.append(f"{path}: fields that are not known are left out: {', '.join(unknown)}")
    if within := FAMILIES[family_of(hf)].within:
        out.append(
            f"{path}: the decoder of '{within[0]}' is read; the model's other parts, such as what "
            "sees images, are left out, and an export copies them as they are"
        )
    return tuple(out)


def _plan(opened: OpenedFiles, family: str, config: DecoderConfig) -> list[families.Tensor]:
    """The tensors of the decoder as the files spell them; UserError unless all is there."""
    spelling = families.spelling_of(family, opened.tensors)
    plan = list(families.tensors(config, family, spelling))
    head, embedding = spelling.ends
    if config.tied and embedding not in opened.tensors and head in opened.tensors:
        # Of a tensor with two names safetensors.torch.save_model writes the first by the alphabet.
        plan = [replace(one, name=head) if one.name == embedding else one for one in plan]
    opened.check(plan, spelling.ends if config.tied else None, FAMILIES[family].beside)
    return plan


def _others(opened: OpenedFiles, beside: str) -> dict[str, StoredTensor]:
    """The tensors of a model's other parts."""
    return {name: stored for name, stored in opened.tensors.items() if re.search(beside, name)}


def _processors(folder: Path) -> dict[str, Path]:
    """The files that say how what other parts read is made ready, such as images."""
    return {name: folder / name for name in _PROCESSORS if (folder / name).is_file()}


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    family: str,
    *,
    members: Sequence[tuple[BankSpec, Any]] = (),
    dtype: DTypeLike | None = None,
    source: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    companions: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 2 * 2**30,
) -> Path:
    """Write a model that transformers loads.

    The folder appears whole or not at all. The host holds one file's tensors at a time. Several
    processes call this alike, and the first one writes.

    Args:
      directory: a path at which there is nothing yet, or an empty folder.
      config, params: as `load` returns them, under any sharding, kernels quantised or not.
      family: a key of `FAMILIES`.
      members: banks with their parameters, added to the kernels in float32 on the way.
      dtype: float32 or bfloat16, of what is written: one rounding from float32. None = the
        embedding's.
      source: the folder that the base came from: its `settings` are kept, its tensors' names, and
        the tensors of the model's other parts and what prepares their input, as they are. None
        makes them from `config`.
      extra: fields of config.json to add to it or to change, such as `eos_token_id`; transformers
        uses the family's own defaults for those left out.
      companions: more files by name: a path to copy, bytes, or a value to write as JSON.
      max_shard_bytes: largest safetensors file, unless one tensor is larger.

    Returns:
      The folder.

    Raises:
      UserError: the folder is not empty or cannot be written, the family cannot express the
        decoder, or a member's gate depends on the token.
    """
    for spec, _ in members:
        lifecycle.check_mergeable(spec)
    dtype = np.dtype(dtype or params["embed"].dtype)
    hf = settings(config, family, source)
    files = {CONFIG: _with_dtype({**hf, **(extra or {})}, str(dtype)), **(companions or {})}
    if source and FAMILIES[family].beside:
        files = _processors(source) | files
    weights = FoldedWeights(params, members, dtype)
    with contextlib.ExitStack() as stack:
        plan, others = families.tensors(config, family), {}
        if source and (beside := FAMILIES[family].beside):
            opened = open_files(source, stack)
            plan, others = _plan(opened, family, config), _others(opened, beside)
        entries = [*_entries(plan, weights), *_copies(others)]
        with new_folder(directory) as write:
            write(functools.partial(write_companions, files))
            _write_shards(write, _shards(entries, max_shard_bytes))
    return Path(directory)


def settings(config: DecoderConfig, family: str, source: Path | None) -> dict[str, Any]:
    """The fields of a model's config.json: those of the folder it came from, or made anew.

    Without `_name_or_path`: what is written is not the model that the source was loaded from.
    """
    hf = read_json(source / CONFIG) if source else config_to_hf(config, family)
    return {key: value for key, value in hf.items() if key != "_name_or_path"}


def _with_dtype(hf: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says in what precision its model is, under the older name of the field."""

    def said(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in fields.items() if key != "dtype"},
                "torch_dtype": dtype}  # fmt: skip

    inner = FAMILIES[family_of(hf)].within[:1]
    return said(hf) | {key: said(hf[key]) for key in inner}


def write_companions(files: Mapping[str, Any], folder: Path) -> None:
    """Files by name: a path to copy, bytes, or a value to write as JSON."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        elif isinstance(content, bytes):
            write_bytes(folder / name, content)
        else:
            write_json(folder / name, content)


class _TensorEntry(NamedTuple):
    """A tensor to write: its size in bytes, and what makes it."""

    name: str
    size: int
    make: Callable[[], np.ndarray]


def _entries(plan: Iterable[families.Tensor], weights: FoldedWeights) -> list[_TensorEntry]:
    itemsize = weights.dtype.itemsize
    return [
        _TensorEntry(
            tensor.name,
            math.prod(tensor.shape) * itemsize,
            functools.partial(weights.tensor, tensor),
        )
        for tensor in plan
    ]


def _copies(others: Mapping[str, StoredTensor]) -> list[_TensorEntry]:
    return [_TensorEntry(name, stored.size, stored.read) for name, stored in others.items()]


def _shards(entries: Sequence[_TensorEntry], max_bytes: int) -> list[list[_TensorEntry]]:
    """Consecutive tensors, as many a shard as fit."""
    shards, room = [], 0
    for entry in entries:
        if not shards or entry.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.size
    return shards


def _write_shards(write: Write, shards: Sequence[Sequence[_TensorEntry]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else SINGLE
        arrays = {entry.name: entry.make() for entry in shard}
        write(lambda folder, name=name, arrays=arrays: save_tensors(folder / name, arrays))
        weight_map |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        total = sum(entry.size for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write(functools.partial(write_companions, {INDEX: index}))
