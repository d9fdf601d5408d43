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
from medmoe_jax.checkpoints import gguf_models, hf_config, huggingface, llama2c
from medmoe_jax.checkpoints.finite import check_finite
from medmoe_jax.checkpoints.gguf_file import open_gguf
from medmoe_jax.data import gguf_tokenizer, tokenizers
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.seeds import random_key
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import is_remote


@dataclass(frozen=True)
class Base:
    """A base that can be loaded.

    Attributes:
      config: its shapes.
      load: `load(dtype, shardings) -> parameters`; `shardings` is a tree like `abstract(dtype)`.
        Raises UserError for files that are damaged, or hold what is not finite.
      find_tokenizer: tells where its tokenizer lies, or None; may raise UserError.
      quantise: a key of `base.quantised.KINDS` that its kernels are stored in, or "".
      folder: the Hugging Face folder it comes from, or None.
      known_family: the Hugging Face family that its files name, or "".
      notes: what was left out of its files, for people.
    """

    config: DecoderConfig
    load: Callable[[Any, Any], Any]
    find_tokenizer: Callable[[], Path | None] = lambda: None
    quantise: str = ""
    folder: Path | None = None
    known_family: str = ""
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer lies, or None. Raises UserError for one that cannot be read."""
        return self.find_tokenizer()

    @property
    def family(self) -> str:
        """Its Hugging Face family: its files', or the first that can express the decoder.

        Raises:
          UserError: none can.
        """
        return self.known_family or hf_config.expressing(self.config)

    def abstract(self, dtype: DTypeLike) -> dict[str, Any]:
        """The parameters that `load` gives, as `ShapeDtypeStruct`s."""
        encode = functools.partial(quantised.quantise, kind=self.quantise)
        return jax.eval_shape(encode, decoder.abstract(self.config, dtype))


def open_base(
    path: str, preset_name: str, overrides: Mapping[str, Any], seed: int, quantise: str = ""
) -> Base:
    """The base at `path`, or a random one of a preset with some fields overridden.

    Args:
      path: a Hugging Face directory, `hf://org/name`, a `.gguf` file or a llama2.c `.bin` file;
        "" = random.
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
    files = str(fetched(path, beside=("*.model",))) if is_remote(path) else path
    base = _on_disk(files, quantise)
    return dataclasses.replace(base, load=_finite(path, base.load))


def _on_disk(path: str, quantise: str) -> Base:
    if path.startswith("hf://") or (Path(path) / "config.json").is_file():
        return _hugging_face(path, quantise)
    if Path(path).is_file() and path.endswith(".bin"):
        return _llama2c(path, quantise)
    if path.endswith(".gguf"):
        return _gguf(path, quantise)
    raise UserError(
        f"base.path: '{path}' is neither a directory with a config.json, nor 'hf://org/name', nor "
        "a .gguf file, nor a llama2.c .bin file"
    )


def _hugging_face(path: str, quantise: str) -> Base:
    folder = huggingface.locate(path)
    family, config = huggingface.describe(folder)
    return Base(
        config,
        lambda dtype, shardings: huggingface.load(folder, dtype, shardings, quantise)[1],
        lambda: folder,
        quantise,
        folder,
        family,
        huggingface.notes(folder),
    )


def _llama2c(path: str, quantise: str) -> Base:
    beside = sorted(Path(path).parent.glob("*.model"))
    return Base(
        llama2c.read_config(path),
        lambda dtype, shardings: _stored(quantise, shardings)(llama2c.load(path, dtype)[1]),
        lambda: beside[0] if len(beside) == 1 else None,
        quantise,
    )


def _gguf(path: str, quantise: str) -> Base:
    file = open_gguf(path)
    family, config = gguf_models.describe(file)
    return Base(
        config,
        lambda dtype, shardings: gguf_models.load(path, dtype, shardings, quantise)[1],
        lambda: gguf_tokenizer.unpack(file.fields, path),
        quantise,
        known_family=family,
    )


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or folder, or the one that a GGUF file holds.

    Raises UserError when there is none that can be read.
    """
    if str(path).endswith(".gguf"):
        path = gguf_tokenizer.unpack(open_gguf(fetched(path)).fields, str(path))
    return tokenizers.load(path)


def _finite(path: str, load: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`load`, but NaN and infinity are refused: whatever is made of them is worth nothing."""

    def checked(dtype, shardings) -> Any:
        params = load(dtype, shardings)
        advice = "the file is damaged, or was written by a run that had failed: fetch it again"
        check_finite(params, path, advice)
        return params

    return checked


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
        return _stored(quantise, shardings, build)(random_key(seed))

    return Base(config, load, quantise=quantise)
