"""Decoders, and adapters over them, as GGUF files for llama.cpp.

A decoder's fields are read back before a tensor is made: one that the file would not describe as it
is, is an error and nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.base import rope
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.families import FAMILIES
from medmoe_jax.checkpoints.files import new_folder
from medmoe_jax.checkpoints.folded import FoldedWeights
from medmoe_jax.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    Json,
    architecture_fields,
    config_json,
    name_of,
    pair_rows,
)
from medmoe_jax.checkpoints.gguf_file import GgufFile, GgufTensor
from medmoe_jax.checkpoints.hf_config import config_from_hf, config_to_hf, differences
from medmoe_jax.checkpoints.huggingface import write_companions
from medmoe_jax.checkpoints.peft_export import stacked
from medmoe_jax.checkpoints.peft_names import linear_modules
from medmoe_jax.errors import UserError

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
# What matrices can be written as, by the names of `--dtype`; vectors are float32.
KINDS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q5_1": "Q5_1",
    "q5_0": "Q5_0",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}
_PLAIN = "llama"  # the architecture of decoders whose family has none of its own
_ROWS = "Q8_0"  # embedding and head in a file of fewer bits, whose errors reach every token


def save_gguf(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    family: str,
    *,
    kind: str = "float16",
    members: Sequence[tuple[BankSpec, Any]] = (),
    fields: Mapping[str, Any] | None = None,
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder with `model.gguf`.

    It appears whole or not at all. The host holds one tensor at a time. Several processes call this
    alike, and the first one writes.

    Args:
      directory, config, params, family, members, companions: as of `huggingface.save_hf`; of a
        model with other parts the decoder alone is written.
      kind: of matrices, a key of `KINDS`; rows that do not fill its blocks are float16.
      fields: more of them, such as the tokenizer's.

    Raises:
      UserError: llama.cpp has no architecture that expresses the decoder, a value is beyond what
        `kind` holds, a member's gate depends on the token, or the folder is not empty or cannot be
        written.
    """
    for spec, _ in members:
        lifecycle.check_mergeable(spec)
    arch, hf = _architecture(config, family)
    name_in_file = name_of(arch, config.n_layers)
    plan = {name_in_file(tensor.name): tensor for tensor in families.tensors(config, arch.family)}
    divisors = _divisors(arch, config)
    own = architecture_fields(arch, config, hf)
    _check(arch, config, own, plan, divisors)
    weights = FoldedWeights(params, members, np.float32)
    described = {name: _described(tensor, kind) for name, tensor in plan.items()}
    described |= {name: (values.shape, "F32") for name, values in divisors.items()}
    own |= {
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }

    def value(name: str) -> np.ndarray:
        if name in divisors:
            return divisors[name]
        return _as_filed(arch, config, plan[name], weights.tensor(plan[name]))

    _write(directory, MODEL, arch, {**own, **(fields or {})}, described, value, companions)
    return Path(directory)


def save_gguf_adapter(
    directory: str | Path,
    config: DecoderConfig,
    family: str,
    members: Sequence[tuple[BankSpec, Any]],
    *,
    kind: str = "float32",
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder with `adapter.gguf`: banks as one LoRA adapter over a model in a GGUF file.

    Arguments as of `peft_export.save_peft`, whose ranks and factors these are, and of `save_gguf`.

    Raises:
      UserError: see `peft_export.stacked` and `save_gguf`.
    """
    arch, _ = _architecture(config, family)
    weights = linear_modules(config, arch.family)
    name = name_of(arch, config.n_layers)
    arrays = {}
    for module, (a_RxD, b_OxR) in stacked(config, arch.family, members, np.float32).items():
        weight = weights[module]
        arrays[f"{name(weight.name)}.lora_a"] = a_RxD
        arrays[f"{name(weight.name)}.lora_b"] = _as_filed(arch, config, weight, b_OxR)
    described = {name: (x.shape, KINDS[kind]) for name, x in arrays.items()}
    # An alpha of 0 says that s is inside the factors, whose ranks differ.
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    _write(directory, ADAPTER, arch, fields, described, arrays.__getitem__, companions)
    return Path(directory)


def _write(
    directory: str | Path,
    name: str,
    arch: Architecture,
    fields: Mapping[str, Any],
    described: Mapping[str, tuple[tuple[int, ...], str]],
    value: Callable[[str], np.ndarray],
    companions: Mapping[str, Any] | None,
) -> None:
    """Write a folder with a file, whose tensors are made one by one, and what stands beside it."""
    with new_folder(directory) as write, _file(name, arch.name, fields) as file:
        write(functools.partial(write_companions, companions or {}))
        write(functools.partial(file.begin, described))
        for tensor in described:
            write(functools.partial(file.add, tensor, value(tensor)))
        write(file.end)


_FILE_TYPES = {
    name: "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}" for name, kind in KINDS.items()
}


def _architecture(config: DecoderConfig, family: str) -> tuple[Architecture, Json]:
    """The architecture that a family is written as, and the decoder's config.json there."""
    decoder = (*FAMILIES[family].within[1:], family)[0]
    own = [arch for arch in ARCHITECTURES.values() if arch.family == decoder]
    arch = (*own, ARCHITECTURES[_PLAIN])[0]
    try:
        return arch, config_to_hf(config, arch.family)
    except UserError as error:
        raise UserError(f"no GGUF file can hold this '{family}' decoder: {error}") from None


def _divisors(arch: Architecture, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Tensors by which the file scales rotary frequencies one by one, float32 `[F]`."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    plain, _, _ = rope.frequencies(config.replace(rope_scaling=None), "global")
    short, long, _ = rope.frequencies(config, "global")
    if not arch.factors or (len(arch.factors) == 1 and np.any(short != long)):
        raise UserError(
            f"rope_scaling: '{scaling.kind}' has no place in a GGUF file of architecture "
            f"'{arch.name}'"
        )
    tables = zip(arch.factors, (short, long), strict=False)
    return {name: (plain / table).astype(np.float32) for name, table in tables}


def _check(arch: Architecture, config: DecoderConfig, fields, plan, divisors) -> None:
    """Raise UserError unless the file, read back, describes the same decoder."""
    nothing = np.zeros((1, 0), np.uint8)
    tensors = {name: GgufTensor(name, t.shape, "F32", nothing) for name, t in plan.items()}
    tensors |= {
        name: GgufTensor(name, x.shape, "F32", x[None].view(np.uint8))
        for name, x in divisors.items()
    }
    file = GgufFile(Path(MODEL), {**fields, "general.architecture": arch.name}, tensors)
    back = config_from_hf(config_json(file))
    same = {"rope_scaling": back.rope_scaling} if divisors and _alike(config, back) else {}
    lost = [
        f"{name}: {want!r} would be read as {got!r}"
        for name, want, got in differences(config.replace(**same), back)
    ]
    if lost:
        raise UserError(
            f"a GGUF file of architecture '{arch.name}' cannot express this decoder: "
            + "; ".join(lost)
        )


def _alike(a: DecoderConfig, b: DecoderConfig) -> bool:
    """Whether rotary frequencies are equal, whatever they are computed from."""
    pairs = zip(rope.frequencies(a, "global"), rope.frequencies(b, "global"), strict=True)
    return all(np.allclose(x, y, rtol=1e-6, atol=0) for x, y in pairs)


def _described(tensor: families.Tensor, kind: str) -> tuple[tuple[int, ...], str]:
    """A tensor's shape and kind in the file."""
    kind = KINDS[kind] if len(tensor.shape) > 1 else "F32"
    if tensor.parts[0].layer is None and kind.startswith(("Q4", "Q5")):
        kind = _ROWS
    numbers, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return tensor.shape, kind if tensor.shape[-1] % numbers == 0 else "F16"


def _as_filed(
    arch: Architecture, config: DecoderConfig, tensor: families.Tensor, x: np.ndarray
) -> np.ndarray:
    """A tensor, or the B of an adapter on it, with rows and offset as the file has them."""
    path = tensor.parts[0].path
    if arch.paired and path.startswith(("layers.attn.q.", "layers.attn.k.")):
        heads = x.reshape(-1, config.head_dim, *x.shape[1:])
        x = heads[:, np.argsort(pair_rows(config))].reshape(x.shape)
    return x + np.float32(arch.offset) if path.endswith("norm") else x


@contextlib.contextmanager
def _file(name: str, arch: str, fields: Mapping[str, Any]) -> Generator[_File]:
    """A file that is closed at the end, also of a failure."""
    file = _File(name, arch, fields)
    try:
        yield file
    finally:
        file.close()


class _File:
    """A GGUF file that grows in a folder; only the first process opens one."""

    def __init__(self, name: str, arch: str, fields: Mapping[str, Any]):
        self._name = name
        self._writer = gguf.GGUFWriter(None, arch)
        self._kinds: dict[str, str] = {}
        for name, value in fields.items():
            if isinstance(value, list):
                self._writer.add_array(name, value)
            else:
                self._writer.add_key_value(name, value, _TYPES[type(value)])

    def begin(self, described: Mapping[str, tuple[tuple[int, ...], str]], folder: Path) -> None:
        """Write header, fields and descriptions."""
        writer = self._writer
        for name, (shape, kind) in described.items():
            self._kinds[name] = kind
            number = gguf.GGMLQuantizationType[kind]
            stored = gguf.quant_shape_to_byte_shape(shape, number)
            size = int(np.prod(stored))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=number)
        writer.write_header_to_file(folder / self._name)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    def add(self, name: str, x: np.ndarray, folder: Path) -> None:
        """Write the next tensor, in the order of the descriptions."""
        del folder  # the file is open
        kind = self._kinds[name]
        if not np.isfinite(x).all():
            raise UserError(f"{name}: NaN or infinity, which no export may hold; train it again")
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
        # Blocks have their scales in float16.
        if kind not in ("F32", "BF16") and np.abs(x).max() > 65504:
            raise UserError(
                f"{name}: has values beyond 65504, the most that float16 holds; write bfloat16 or "
                "float32"
            )
        # The writer's own way (ndarray.tofile) raises an error with no number on a full disk.
        out = self._out
        self._writer.write_padding(out, out.tell())
        out.write(np.ascontiguousarray(data).data)
        self._writer.write_padding(out, data.nbytes)

    def end(self, folder: Path) -> None:
        """Wait until all is on the disk."""
        del folder
        self._out.flush()
        os.fsync(self._out.fileno())

    @property
    def _out(self) -> io.BufferedWriter:
        """The one that is open: the writer could make several, and is not asked to."""
        return (self._writer.fout or [])[0]

    def close(self) -> None:
        """Close the file. What could not be written has been said before."""
        with contextlib.suppress(OSError):
            self._writer.close()


_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}
