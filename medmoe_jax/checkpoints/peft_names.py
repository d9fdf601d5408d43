"""What the files of a PEFT adapter are called, and the tensors in them.

A tensor's name is `base_model.model.MODULE.LEAF`, where a module is one of the Hugging Face model.
Tools vary it: without the prefix, with the name of the adapter (`lora_A.default.weight`), with what
PEFT puts around a module (`modules_to_save`, `base_layer`), or with the names that the decoder has
alone, without the head's model around it (`layers.0` for `model.layers.0`). Here all are one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints import families
from medmoe_jax.checkpoints.family import Spelling
from medmoe_jax.checkpoints.safetensors_files import open_safetensors
from medmoe_jax.checkpoints.torch_files import open_torch
from medmoe_jax.errors import UserError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_ADAPTER = re.compile(
    r"(?P<module>.+)\.(?P<leaf>lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_TOKENS = re.compile(
    r"(?P<module>.+)\.token_adapter\.(?P<leaf>trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?"
)
_OWN = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.(?P<leaf>weight|bias)")
_BEFORE = re.compile(r"\.original_module\.(?:weight|bias)$")  # what a module was, of the base
_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<adapter>[^.]+)(?=\.))?")


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


class Key(NamedTuple):
    """Which tensor it is.

    Attributes:
      module: its name in the Hugging Face model.
      leaf: `lora_A`, `lora_B`, `lora_E`, `lora_embedding_A`, `lora_embedding_B`,
        `lora_magnitude_vector`, `trainable_tokens_delta`, or `weight` and `bias` of the module.
    """

    module: str
    leaf: str


class Contents(NamedTuple):
    """An adapter's tensors.

    Attributes:
      file: the name of the file.
      tensors: by what they are, each with its name in the file; it is not read yet.
      parameters: `{name: tensor}` of the base as the file spells it; a head stands there even
        where the base ties it to the embedding.
      problems: with the file's names.
    """

    file: str
    tensors: Mapping[Key, tuple[str, Any]]
    parameters: Mapping[str, families.Tensor]
    problems: tuple[str, ...]


@contextlib.contextmanager
def open_contents(folder: Path, config: DecoderConfig, family: str) -> Generator[Contents]:
    """The tensors of an adapter's folder; of two files the safetensors one is taken, as PEFT does.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    file = WEIGHTS if (folder / WEIGHTS).is_file() or not (folder / PICKLED).is_file() else PICKLED
    if not (folder / file).is_file():
        raise UserError(f"{WEIGHTS}: missing, and there is no {PICKLED} either")
    with (open_safetensors if file == WEIGHTS else open_torch)(folder / file) as stored:
        parsed = {name: _parse(name) for name in stored if not _BEFORE.search(name)}
        parameters = _parameters(config, family, {key for key, _ in parsed.values() if key})
        modules = {name.rpartition(".")[0] for name in parameters}
        problems, tensors = [], {}
        for name, (key, _) in parsed.items():
            if key is None or not _known(key, modules, parameters):
                problems.append(_unknown(name, key))
            elif key not in tensors:
                tensors[key] = (name, stored[name])
            # PEFT writes embeddings that were saved under both names where it saves them anyway.
            elif not np.array_equal(stored[name].read(), tensors[key][1].read()):
                problems.append(f"{name}: stands there as {tensors[key][0]} too, with other values")
        if len(adapters := {adapter for _, adapter in parsed.values() if adapter}) > 1:
            problems.append(
                f"{file}: holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); "
                "save one of them with PEFT"
            )
        yield Contents(file, tensors, parameters, tuple(problems))


def _parse(name: str) -> tuple[Key | None, str]:
    """`(what the tensor is, the adapter's name)`, None and "" where the name does not tell."""
    plain, adapter = name.removeprefix(PREFIX), ""
    if match := _SAVED.search(plain):
        adapter, plain = match["adapter"] or "", plain.replace(match[0], "", 1)
    if match := _ADAPTER.fullmatch(plain) or _TOKENS.fullmatch(plain):
        return Key(match["module"], match["leaf"]), match["adapter"] or ""
    if match := _OWN.fullmatch(plain):
        return Key(match["module"], match["leaf"]), adapter
    return None, ""


def _parameters(config, family: str, keys: set[Key]) -> dict[str, families.Tensor]:
    """The base's tensors, in the spelling that knows most of the keys; the family's own first."""
    spellings = dict.fromkeys(
        spelling
        for one in (families.FAMILIES[family], *families.FAMILIES.values())
        for spelling in one.spellings
    )
    modules = {key.module for key in keys}

    def known(spelling: Spelling) -> int:
        inside = f"{spelling.body}layers."
        return sum(name.startswith(inside) for name in modules) + len(
            modules & {end.rpartition(".")[0] for end in spelling.ends}
        )

    best = max(spellings, key=known)
    plan = families.tensors(config.replace(tied=False), family, best)
    return {tensor.name: tensor for tensor in plan}


def _known(key: Key, modules: set[str], parameters: Mapping[str, families.Tensor]) -> bool:
    if key.leaf in ("weight", "bias"):
        return f"{key.module}.{key.leaf}" in parameters
    return key.module in modules


def _unknown(name: str, key: Key | None) -> str:
    if key is None:
        return f"{name}: is no tensor of an adapter that can be read"
    what = key.leaf if key.leaf in ("weight", "bias") else "layer"
    return f"{name}: '{key.module}' is no {what} of this base"
