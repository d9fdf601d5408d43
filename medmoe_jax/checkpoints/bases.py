"""Opening a frozen base: weights on disk in any known format, or random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from medmoe_jax.base import decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.presets import preset
from medmoe_jax.checkpoints import huggingface, llama2c
from medmoe_jax.errors import UserError


@dataclass(frozen=True)
class Base:
    """A base that can be loaded.

    Attributes:
      config: its shapes.
      load: `load(dtype, shardings) -> parameters`; `shardings` is a tree like `decoder.abstract`.
      tokenizer: where its tokenizer lies, or None.
    """

    config: DecoderConfig
    load: Callable[[Any, Any], Any]
    tokenizer: Path | None


def open_base(path: str, preset_name: str, overrides: Mapping[str, Any], seed: int) -> Base:
    """The base at `path`, or a random one of a preset with some fields overridden.

    Args:
      path: a Hugging Face directory, `hf://org/name`, or a llama2.c `.bin` file; "" = random.
      preset_name, overrides: architecture of a random base; a base on disk brings its own.
      seed: of random weights.

    Raises:
      UserError: both or neither are given, or nothing known lies at `path`.
    """
    if bool(path) == bool(preset_name or overrides):
        raise UserError(
            "base: give either base.path (weights on disk) or base.preset / base.decoder "
            "(random weights)"
        )
    if not path:
        return _random(preset_name, overrides, seed)
    if path.startswith("hf://") or (Path(path) / "config.json").is_file():
        folder = huggingface.locate(path)
        return Base(
            huggingface.read_config(folder),
            lambda dtype, shardings: huggingface.load(folder, dtype, shardings)[1],
            folder,
        )
    if Path(path).is_file() and path.endswith(".bin"):
        tokenizers = sorted(Path(path).parent.glob("*.model"))
        return Base(
            llama2c.read_config(path),
            lambda dtype, shardings: _placed(llama2c.load(path, dtype)[1], shardings),
            tokenizers[0] if len(tokenizers) == 1 else None,
        )
    raise UserError(
        f"base.path: '{path}' is neither a directory with a config.json, nor 'hf://org/name', nor "
        "a llama2.c .bin file"
    )


def _placed(params, shardings):
    return jax.tree.map(jax.device_put, params, shardings)


def _random(preset_name: str, overrides: Mapping[str, Any], seed: int) -> Base:
    known = [field.name for field in dataclasses.fields(DecoderConfig)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise UserError(f"base.decoder: no field {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        config = (
            preset(preset_name).replace(**overrides) if preset_name else DecoderConfig(**overrides)
        )
    except TypeError as error:
        raise UserError(f"base.decoder: {error}") from None

    def load(dtype, shardings):
        build = jax.jit(decoder.init, static_argnums=(0, 2), out_shardings=shardings)
        return build(config, jax.random.key(seed), dtype)

    return Base(config, load, None)
