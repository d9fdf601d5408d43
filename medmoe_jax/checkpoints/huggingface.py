"""Decoder weights in and out of Hugging Face checkpoints (config.json and safetensors).

Reading streams: a slice of one tensor at a time goes from the mapped file into its place in a
sharded, stacked `[L, ...]` buffer on the devices, so that the host never holds the model, and a
process reads only the rows and columns of its own devices.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives numpy the bfloat16 of safetensors
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medmoe_jax.base import decoder, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.families import FAMILIES, config_from_hf, config_to_hf, family_of
from medmoe_jax.checkpoints.files import read_json, write_json
from medmoe_jax.errors import UserError

__all__ = ["FAMILIES", "config_from_hf", "load", "locate", "read_config", "save_hf"]

HUB = "hf://"
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16")
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # a table that old releases saved
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def locate(source: str | Path) -> Path:
    """The local folder of a model: itself, or for `hf://org/name[@revision]` a snapshot of it.

    Raises:
      UserError: no such folder, or the Hub cannot provide the model.
    """
    if not str(source).startswith(HUB):
        if not Path(source).is_dir():
            raise UserError(f"{source}: no such folder (a model on the Hub is {HUB}org/name)")
        return Path(source)
    from huggingface_hub import errors, snapshot_download

    name, _, revision = str(source).removeprefix(HUB).partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(_DOWNLOADED))
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{source}: {error}") from error


def read_config(source: str | Path) -> DecoderConfig:
    """The decoder's configuration of a local folder or a `hf://` model.

    Raises:
      UserError: see `locate` and `config_from_hf`; the message names the file.
    """
    return _read_config(locate(source))[1]


def load(
    source: str | Path, dtype=jnp.bfloat16, shardings: Mapping[str, Any] | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model.

    Args:
      source: a folder with config.json and safetensors files, or `hf://org/name[@revision]`.
      dtype: of the parameters returned, float32 or bfloat16.
      shardings: a tree like the parameters, of `NamedSharding`s or `SingleDeviceSharding`s; None
        puts everything on the first device.

    Returns:
      The configuration and the parameter tree of `base.decoder`.

    Raises:
      UserError: see `read_config`; or files or tensors are missing, damaged, unknown or of
        another shape. One error lists all of them, and nothing has been loaded by then.
    """
    folder = locate(source)
    family, config = _read_config(folder)
    plan = list(families.tensors(config, family))
    with contextlib.ExitStack() as stack:
        files = _check(folder, config, plan, stack)
        pieces = {part.path: [] for tensor in plan for part in tensor.parts}
        for tensor in plan:
            for part in tensor.parts:
                reader = functools.partial(_read_rows, files[tensor.name], tensor.name, part)
                pieces[part.path].append(reader)
        leaves = []
        for path, shape in decoder.shapes(config).items():
            default = SingleDeviceSharding(jax.local_devices()[0])
            sharding = trees.get(shardings, path) if shardings is not None else default
            leaves.append((path, _place(path, shape, np.dtype(dtype), sharding, pieces[path])))
    return config, trees.unflatten(leaves)


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    family: str,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 2 * 2**30,
) -> Path:
    """Write a model that transformers loads, in the parameters' own dtypes.

    The folder appears whole or not at all. The host holds one shard at a time.

    Args:
      directory: a path at which there is nothing yet, or an empty folder.
      config, params: as `load` returns them; every leaf is addressable by this process.
      family: a key of `FAMILIES`.
      extra: more fields of config.json, such as `bos_token_id` and `eos_token_id`; transformers
        uses the family's own defaults for those left out.
      max_shard_bytes: largest safetensors file, unless one tensor is larger.

    Returns:
      The folder.

    Raises:
      UserError: the folder is not empty, or the family cannot express the decoder.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; give the path of a new folder")
    hf = config_to_hf(config, family)
    hf["torch_dtype"] = str(np.dtype(params["embed"].dtype))
    shards = _shards(list(families.tensors(config, family)), params, max_shard_bytes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_json(partial / _CONFIG, {**hf, **(extra or {})})
        _write_shards(partial, shards, params)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _read_config(folder: Path) -> tuple[str, DecoderConfig]:
    hf = read_json(folder / _CONFIG)
    try:
        return family_of(hf), config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{folder / _CONFIG}: {error}") from None


# Reading --------------------------------------------------------------------------------------


def _listed(folder: Path) -> tuple[dict[str, str], list[str]]:
    """`(tensor to file as the index says, files)`; without an index only the files."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / _INDEX}: has no 'weight_map'")
        return weight_map, sorted(set(weight_map.values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if _SINGLE in files or len(files) == 1:
        return {}, [_SINGLE] if _SINGLE in files else files
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files but no {_INDEX}")
    raise UserError(f"{folder}: no safetensors file (other formats must be converted first)")


def _check(folder, config, plan, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Open every file and compare it with the plan; returns `{tensor: open file}`."""
    weight_map, names = _listed(folder)
    problems, lost, found = [], set(), {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except FileNotFoundError:
            problems.append(f"{name}: missing")
            lost.add(name)
        except SafetensorError as error:
            problems.append(f"{name}: truncated or damaged ({error})")
            lost.add(name)
        else:
            found |= dict.fromkeys(file.keys(), file)
    for tensor in plan:
        if tensor.name not in found:
            if (weight_map.get(tensor.name) if weight_map else names[0]) not in lost:
                problems.append(f"{tensor.name}: missing")
            continue
        view = found[tensor.name].get_slice(tensor.name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != tensor.shape:
            problems.append(f"{tensor.name}: shape {shape}, {_CONFIG} asks for {tensor.shape}")
        if dtype not in _FLOATS:
            problems.append(f"{tensor.name}: dtype {dtype} is none of {', '.join(_FLOATS)}")
    for name in sorted(set(found) - {tensor.name for tensor in plan}):
        if config.tied and name == _HEAD and _EMBED in found:
            if not _same(found, _HEAD, _EMBED):
                problems.append(f"{name}: differs from {_EMBED}, but tie_word_embeddings is true")
        elif not _IGNORED.search(name):
            problems.append(f"{name}: unknown to this architecture")
    if problems:
        raise UserError(f"{folder}: {len(problems)} problems\n  " + "\n  ".join(problems))
    return found


def _same(files: Mapping[str, Any], a: str, b: str) -> bool:
    return np.array_equal(files[a].get_tensor(a), files[b].get_tensor(b))


def _read_rows(file, name: str, part, index: tuple[slice, ...]) -> np.ndarray:
    """Rows and columns `index` of one part of a tensor."""
    rows = slice(*index[0].indices(part.stop - part.start))
    rows = slice(part.start + rows.start, part.start + rows.stop)
    return file.get_slice(name)[(rows, *index[1:])]


def _place(path: str, shape, dtype, sharding: Sharding, readers: list[Callable]) -> jax.Array:
    """A leaf on the devices, filled layer by layer in one donated buffer."""
    if not path.startswith("layers."):
        return _to_devices(shape, dtype, sharding, readers[0])
    flip = families.transposed(path)
    stored = shape[:0:-1] if flip else shape[1:]
    slice_sharding = _slice_sharding(sharding, len(shape), flip)
    zeros = jax.jit(_zeros, static_argnums=(0, 1), out_shardings=sharding)
    write = jax.jit(_write_layer, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    stack = zeros(shape, dtype)
    for layer, reader in enumerate(readers):
        x = _to_devices(stored, dtype, slice_sharding, reader)
        # Waiting keeps the host from queueing a whole model of slices ahead of the devices.
        stack = write(stack, x, np.int32(layer), flip).block_until_ready()
    return stack


def _zeros(shape, dtype):
    return jnp.zeros(shape, dtype)


def _write_layer(stack, x, layer, flip: bool):
    return jax.lax.dynamic_update_index_in_dim(stack, x.T if flip else x, layer, 0)


def _slice_sharding(sharding: Sharding, rank: int, flip: bool) -> Sharding:
    """The sharding of one layer as it lies on disk, such that writing it moves nothing."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"shardings: {type(sharding).__name__} is not a NamedSharding")
    axes = (*sharding.spec, *(None,) * (rank - len(sharding.spec)))[1:]
    spec = PartitionSpec(*(axes[::-1] if flip else axes))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _to_devices(shape, dtype, sharding: Sharding, read: Callable) -> jax.Array:
    """An array whose shards are read one by one; a slice that several devices hold, once."""
    known: dict[str, np.ndarray] = {}

    def shard(index):
        key = str(index)
        if key not in known:
            known[key] = np.ascontiguousarray(read(index)).astype(dtype, copy=False)
        return known[key]

    return jax.make_array_from_callback(shape, sharding, shard)


# Writing --------------------------------------------------------------------------------------


def _shards(plan, params, max_bytes: int) -> list[list]:
    """Consecutive tensors, as many a shard as fit."""
    shards, room = [], 0
    for tensor in plan:
        size = _bytes(tensor, params)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _bytes(tensor, params) -> int:
    dtype = np.dtype(trees.get(params, tensor.parts[0].path).dtype)
    return int(np.prod(tensor.shape)) * dtype.itemsize


def _write_shards(folder: Path, shards: list[list], params) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else _SINGLE
        arrays = {tensor.name: _fetch(tensor, params) for tensor in shard}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        total = sum(_bytes(tensor, params) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)


def _fetch(tensor, params) -> np.ndarray:
    """One HF tensor from its leaves."""
    rows = []
    for part in tensor.parts:
        x = _layer(trees.get(params, part.path), part.layer)
        rows.append(x.T if families.transposed(part.path) else x)
    return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])


def _layer(leaf, layer: int | None) -> np.ndarray:
    if layer is None:
        return np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        return leaf[layer]
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, np.int32(layer), keepdims=False))
