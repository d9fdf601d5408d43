"""Opening a frozen base: weights on disk in any known format, or random ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from medmoe_jax.base import decoder, quantised
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.presets import preset
from medmoe_jax.checkpoints import families, huggingface, llama2c
from medmoe_jax.checkpoints.files import read_json
from medmoe_jax.errors import UserError


@dataclass(frozen=True)
class Base:
    """A base that can be loaded.

    Attributes:
      config: its shapes.
      load: `load(dtype, shardings) -> parameters`; `shardings` is a tree like `abstract(dtype)`.
      tokenizer: where its tokenizer lies, or None.
      quantise: a key of `base.quantised.KINDS` that its kernels are stored in, or "".
      folder: the Hugging Face folder it comes from, or None.
    """

    config: DecoderConfig
    load: Callable[[Any, Any], Any]
    tokenizer: Path | None
    quantise: str = ""
    folder: Path | None = None

    @property
    def family(self) -> str:
        """Its Hugging Face family: its folder's, or the first that can express the decoder.

        Raises:
          UserError: none can.
        """
        if self.folder is None:
            return families.expressing(self.config)
        return families.family_of(read_json(self.folder / "config.json"))

    def abstract(self, dtype: DTypeLike) -> dict[str, Any]:
        """The parameters that `load` gives, as `ShapeDtypeStruct`s."""
        encode = functools.partial(quantised.quantise, kind=self.quantise)
        return jax.eval_shape(encode, decoder.abstract(self.config, dtype))


def open_base(
    path: str, preset_name: str, overrides: Mapping[str, Any], seed: int, quantise: str = ""
) -> Base:
    """The base at `path`, or a random one of a preset with some fields overridden.

    Args:
      path: a Hugging Face directory, `hf://org/name`, or a llama2.c `.bin` file; "" = random.
      preset_name, overrides: architecture of a random base; a base on disk brings its own.
      seed: of random weights.
      quantise: how its kernels are stored: a key of `base.quantised.KINDS`, or "" = in floats.

    Raises:
      UserError: both or neither are given, nothing known lies at `path`, or no such `quantise`.
    """
    quantised.check_kind(quantise)
    if bool(path) == bool(preset_name or overrides):
        raise UserError(
            "base: give either base.path (weights on disk) or base.preset / base.decoder "
            "(random weights)"
        )
    if not path:
        return _random(preset_name, overrides, seed, quantise)
    if path.startswith("hf://") or (Path(path) / "config.json").is_file():
        folder = huggingface.locate(path)
        return Base(
            huggingface.read_config(folder),
            lambda dtype, shardings: huggingface.load(folder, dtype, shardings, quantise)[1],
            folder,
            quantise,
            folder,
        )
    if Path(path).is_file() and path.endswith(".bin"):
        tokenizers = sorted(Path(path).parent.glob("*.model"))
        return Base(
            llama2c.read_config(path),
            lambda dtype, shardings: _stored(quantise, shardings)(llama2c.load(path, dtype)[1]),
            tokenizers[0] if len(tokenizers) == 1 else None,
            quantise,
        )
    raise UserError(
        f"base.path: '{path}' is neither a directory with a config.json, nor 'hf://org/name', nor "
        "a llama2.c .bin file"
    )


def _stored(quantise: str, shardings, build: Callable = lambda params: params):
    """A compiled function that quantises what `build` makes, straight into its shards."""
    return jax.jit(lambda x: quantised.quantise(build(x), quantise), out_shardings=shardings)


def _random(preset_name: str, overrides: Mapping[str, Any], seed: int, quantise: str) -> Base:
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
        build = functools.partial(decoder.init, config, dtype=dtype)
        return _stored(quantise, shardings, build)(jax.random.key(seed))

    return Base(config, load, None, quantise)
