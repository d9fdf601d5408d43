"""Decoder weights in and out of Hugging Face checkpoints (config.json and safetensors).

Reading streams: a slice of one tensor at a time goes from the mapped file into its place in a
sharded, stacked `[L, ...]` buffer on the devices, so that the host never holds the model, and a
process reads only the rows and columns of its own devices.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives numpy the bfloat16 of safetensors
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import decoder, quantised, trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.families import FAMILIES, config_from_hf, config_to_hf, family_of
from medmoe_jax.checkpoints.files import (
    Write,
    new_folder,
    read_json,
    save_tensors,
    write_bytes,
    write_json,
)
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.host import to_host
from medmoe_jax.parallel.rules import fitted

__all__ = [
    "CONFIG",
    "FAMILIES",
    "INDEX",
    "config_from_hf",
    "listed",
    "load",
    "locate",
    "open_tensors",
    "place",
    "read_config",
    "read_rows",
    "save_hf",
]

HUB = "hf://"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16")
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_PIECE_BYTES = 2**25  # of a tensor without layers, read at once
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
    from huggingface_hub import constants, errors, snapshot_download

    name, _, revision = str(source).removeprefix(HUB).partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(_DOWNLOADED),
                local_files_only=constants.HF_HUB_OFFLINE,  # else a revision's files are asked for
            )
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
    source: str | Path,
    dtype=jnp.bfloat16,
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
    family, config = _read_config(folder)
    plan = list(families.tensors(config, family))
    with contextlib.ExitStack() as stack:
        files = open_tensors(folder, config.tied, plan, stack)
        pieces = {part.path: [] for tensor in plan for part in tensor.parts}
        for tensor in plan:
            for part in tensor.parts:
                reader = functools.partial(read_rows, files[tensor.name], tensor.name, part)
                pieces[part.path].append(((part.layer,), reader))
        leaves = []
        for path, leaf in trees.flatten(decoder.abstract(config, np.dtype(dtype))):
            encode = quantised.encoder(quantise, path)
            here = SingleDeviceSharding(jax.local_devices()[0])
            sharding = trees.get(shardings, path) if shardings is not None else here
            leaves.append((path, place(path, leaf, sharding, pieces[path], encode)))
    return config, trees.unflatten(leaves)


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    family: str,
    *,
    members: Sequence[tuple[BankSpec, Any]] = (),
    dtype=None,
    source: Mapping[str, Any] | None = None,
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
      source: the config.json to write; None makes one from `config`.
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
    hf = {**(source or config_to_hf(config, family)), **(extra or {}), "torch_dtype": str(dtype)}
    hf.pop("dtype", None)  # the newer name of the same field, which older releases do not know
    files = {CONFIG: hf, **(companions or {})}
    shards = _shards(list(families.tensors(config, family)), dtype, max_shard_bytes)
    with new_folder(directory) as write:
        write(functools.partial(write_companions, files))
        _write_shards(write, shards, _Weights(jax.tree.map(jnp.asarray, params), members, dtype))
    return Path(directory)


def _read_config(folder: Path) -> tuple[str, DecoderConfig]:
    hf = read_json(folder / CONFIG)
    try:
        return family_of(hf), config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


# Reading --------------------------------------------------------------------------------------


def listed(folder: Path) -> tuple[dict[str, str], list[str]]:
    """`(tensor to file as the index says, files)`; without an index only the files.

    Raises:
      UserError: there is no such file, or it cannot be said which files belong together.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no 'weight_map'")
        return weight_map, sorted(set(weight_map.values()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if _SINGLE in files or len(files) == 1:
        return {}, [_SINGLE] if _SINGLE in files else files
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files but no {INDEX}")
    raise UserError(f"{folder}: no safetensors file (other formats must be converted first)")


def open_tensors(
    folder: Path, tied: bool, plan: Sequence[families.Tensor], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Open every safetensors file of a folder and compare them with a plan.

    Args:
      folder: a local one.
      tied: whether the head may be there although it is the embedding.
      plan: the tensors that must be there; no other may.
      stack: closes the files.

    Returns:
      `{tensor: open file}`.

    Raises:
      UserError: files or tensors are missing, damaged, unknown or of another shape: all of them.
    """
    weight_map, names = listed(folder)
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
            problems.append(f"{tensor.name}: shape {shape}, {CONFIG} asks for {tensor.shape}")
        if dtype not in _FLOATS:
            problems.append(f"{tensor.name}: dtype {dtype} is none of {', '.join(_FLOATS)}")
    for name in sorted(set(found) - {tensor.name for tensor in plan}):
        if tied and name == _HEAD and _EMBED in found:
            if not _same(found, _HEAD, _EMBED):
                problems.append(f"{name}: differs from {_EMBED}, but tie_word_embeddings is true")
        elif not _IGNORED.search(name):
            problems.append(f"{name}: unknown to this architecture")
    if problems:
        raise UserError(f"{folder}: {len(problems)} problems\n  " + "\n  ".join(problems))
    return found


def _same(files: Mapping[str, Any], a: str, b: str) -> bool:
    return np.array_equal(files[a].get_tensor(a), files[b].get_tensor(b))


def read_rows(file, name: str, part: families.Part, index: tuple[slice, ...]) -> np.ndarray:
    """Rows and columns `index` of one part of a tensor in an open file."""
    rows = slice(*index[0].indices(part.stop - part.start))
    rows = slice(part.start + rows.start, part.start + rows.stop)
    return file.get_slice(name)[(rows, *index[1:])]


def place(
    path: str,
    leaf,
    sharding,
    readers: Iterable[tuple[tuple, Callable]],
    encode: Callable = lambda x: x,
    start=None,
):
    """A leaf on the devices, filled piece by piece in donated buffers.

    Args:
      path, leaf: its name, and its shape and dtype as floats.
      sharding: of what is stored: one, or one an array.
      readers: `(index, read)` of every piece: `index` is its place on the leading axes, such as its
        layer, and `read` gives rows and columns of it as they lie on disk. A leaf without layers
        has one, whose index is not looked at.
      encode: what a piece's values are stored as (`base.quantised.encoder`).
      start: an array whose values stay where no piece goes; None = zeros.
    """
    readers = list(readers)
    if not path.startswith("layers."):
        return _by_rows(leaf, sharding, readers[0][1])
    flip = families.transposed(path)
    leading = len(readers[0][0]) if readers else 1

    shape = leaf.shape[: leading - 1 : -1] if flip else leaf.shape[leading:]
    slice_sharding = _slice_sharding(jax.tree.leaves(sharding)[0], leading, shape, flip)
    pieces = (
        (_to_devices(shape, leaf.dtype, slice_sharding, read), tuple(map(np.int32, index)))
        for index, read in readers
    )
    write = _layer_writer(encode, flip, leading, sharding)
    return _filled(jax.eval_shape(encode, leaf), sharding, write, pieces, start)


# Cached: leaves that are written alike, in this model or the next, share a compiled program.
@functools.cache
def _layer_writer(encode: Callable, flip: bool, leading: int, sharding):
    """`(stack, piece as on disk, place on the leading axes) -> stack`; the stack is donated."""

    def write(stack, x, index):
        new = encode(x.T if flip else x)

        def put(stack, piece):
            at = (*index, *(0,) * piece.ndim)
            return jax.lax.dynamic_update_slice(
                stack, piece.reshape((1,) * leading + piece.shape), at
            )

        return jax.tree.map(put, stack, new)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _by_rows(leaf, sharding: Sharding, read: Callable):
    """A leaf without layers: a piece is some rows of every shard, so that no shard moves.

    Axes: S shards of the rows, R rows of a shard.
    """
    R = sharding.shard_shape(leaf.shape)[0]
    S, rest = leaf.shape[0] // R, leaf.shape[1:]
    step = max(1, _PIECE_BYTES * R // (math.prod(leaf.shape) * leaf.dtype.itemsize))
    spread = sharding
    if isinstance(sharding, NamedSharding):
        axes = (*sharding.spec, None)
        spec = PartitionSpec(axes[0], None, *axes[1 : len(leaf.shape)])
        spread = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    def piece(start: int):
        def rows(index):
            shards, within, *columns = index
            first = (shards.start or 0) * R + start + (within.start or 0)
            return read((slice(first, first + size), *columns))[None]

        size = min(step, R - start)
        return _to_devices((S, size, *rest), leaf.dtype, spread, rows), np.int32(start)

    write = _row_writer((S, R, *rest), sharding)
    return _filled(leaf, sharding, write, map(piece, range(0, R, step)))


@functools.cache
def _row_writer(by_shard: tuple[int, ...], sharding: Sharding):
    """`(leaf, rows of every shard, the first of them) -> leaf`; the leaf is donated."""

    def write(out, x, start):
        new = jax.lax.dynamic_update_slice_in_dim(out.reshape(by_shard), x, start, axis=1)
        return new.reshape(out.shape)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _filled(stored, sharding, write: Callable, pieces, start=None):
    """An array like `stored`: zeros or `start`, with `write(buffers, *piece)` of every piece."""
    given = () if start is None else (start,)
    buffers = _buffer_maker(stored, sharding)(*given)
    for piece in pieces:
        # Waiting keeps the host from queueing a whole model of pieces ahead of the devices.
        buffers = jax.block_until_ready(write(buffers, *piece))
    return buffers


@functools.cache
def _buffer_maker(stored, sharding):
    """`(start or nothing) -> buffers` like `stored`."""

    def make(*start):
        if start:
            return start[0].astype(stored.dtype)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored)

    return jax.jit(make, out_shardings=sharding)


def _slice_sharding(sharding: Sharding, leading: int, shape, flip: bool) -> Sharding:
    """The sharding of one piece as it lies on disk, such that writing it moves nothing."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"shardings: {type(sharding).__name__} is not a NamedSharding")
    axes = (*sharding.spec, *(None,) * (leading + len(shape) - len(sharding.spec)))[leading:]
    spec = PartitionSpec(*(axes[::-1] if flip else axes))
    return fitted(NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind), shape)


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


def write_companions(files: Mapping[str, Any], folder: Path) -> None:
    """Files by name: a path to copy, bytes, or a value to write as JSON."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        elif isinstance(content, bytes):
            write_bytes(folder / name, content)
        else:
            write_json(folder / name, content)


def _shards(plan, dtype: np.dtype, max_bytes: int) -> list[list]:
    """Consecutive tensors, as many a shard as fit."""
    shards, room = [], 0
    for tensor in plan:
        size = _bytes(tensor, dtype)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _bytes(tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _write_shards(write: Write, shards: list[list], weights: _Weights) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else _SINGLE
        arrays = {tensor.name: weights.tensor(tensor) for tensor in shard}
        write(lambda folder, name=name, arrays=arrays: save_tensors(folder / name, arrays))
        weight_map |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        total = sum(_bytes(tensor, weights.dtype) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write(functools.partial(write_companions, {INDEX: index}))


class _Weights:
    """The tensors of a checkpoint, each made when it is asked for."""

    def __init__(self, params, members: Sequence[tuple[BankSpec, Any]], dtype: np.dtype):
        sites = dict.fromkeys(site for spec, _ in members for site in spec.sites)
        self.dtype = dtype
        self._params = params
        self._members = {
            f"layers.{site}.kernel": lifecycle.members_at(members, site) for site in sites
        }

    def tensor(self, tensor: families.Tensor) -> np.ndarray:
        """One HF tensor from its leaves."""
        rows = []
        for part in tensor.parts:
            specs, banks = self._members.get(part.path, ((), []))
            leaf = trees.get(self._params, part.path)
            if part.layer is None:
                x = to_host(leaf).astype(self.dtype)
            else:
                x = to_host(_read_layer(specs, self.dtype, leaf, banks, np.int32(part.layer)))
            rows.append(x.T if families.transposed(part.path) else x)
        return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_layer(specs: tuple[BankSpec, ...], dtype, leaf, banks, layer):
    return lifecycle.kernel_with(specs, leaf, banks, layer).astype(dtype)
