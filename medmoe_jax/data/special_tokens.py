"""What the files beside a vocabulary say of its special tokens, in the order in which they count.

    tokenizer_config.json    names of the tokens (bos_token, ...), `added_tokens_decoder`, the class
    special_tokens_map.json  names, over those of the config } where the config has no
    added_tokens.json        tokens behind the vocabulary    } `added_tokens_decoder`
    (the class)              names that the config does not mention
    generation_config.json   further ids that end an answer; config.json's where it is absent

As transformers (5.12) reads them: `PreTrainedTokenizerBase._from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_jax import json_text
from medmoe_jax.errors import UserError, within
from medmoe_jax.kinds import check_fields, fits, shown
from medmoe_jax.storage.plain import read_settings, read_text

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "special")
_CONFIG_KINDS = {
    "added_tokens_decoder": dict[str, Any] | None,
    "tokenizer_class": str | None,
    "chat_template": str | list[dict[str, str]] | None,
    "additional_special_tokens": list[Any] | dict[str, Any] | None,
    "extra_special_tokens": list[Any] | dict[str, Any] | None,
    "add_bos_token": bool | None,
    "add_prefix_space": bool | None,
    "legacy": bool | None,
}
_END = "<|endoftext|>"
# What a tokenizer's class names where its config does not: (bos, eos, unk, pad).
_CLASSES: dict[str, tuple[str | None, ...]] = {
    "LlamaTokenizer": ("<s>", "</s>", "<unk>", None),
    "CodeLlamaTokenizer": ("<s>", "</s>", "<unk>", None),
    "GemmaTokenizer": ("<bos>", "<eos>", "<unk>", "<pad>"),
    "Qwen2Tokenizer": (None, _END, _END, _END),
    "GPT2Tokenizer": (_END, _END, _END, None),
    "GPTNeoXTokenizer": (_END, _END, _END, "<|padding|>"),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>", "<PAD>"),
}
# The class of a model's tokenizers, where tokenizer_config.json names none.
_CLASS_OF = {
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
}
# Classes that say where a dummy space stands, whatever the vocabulary's file does, and where the
# field `legacy` puts it; and models that are published with such a class, but whose tokenizer.json
# is read as it stands.
_SPACING = {"LlamaTokenizer": "always", "CodeLlamaTokenizer": "first"}
_AS_FILE = ("mistral", "ministral", "granite", "phi3", "qwen2")


class SpecialToken(NamedTuple):
    """A token of its own, as the files describe it.

    Attributes:
      text: how it is written.
      id: its id, or None where no file says.
      lstrip, rstrip: whether it takes in the white space before or after it.
      special: whether it vanishes when ids are decoded.
      normalized: whether it is looked for in the normalised text.
    """

    text: str
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True
    normalized: bool = False


@dataclass(frozen=True)
class Beside:
    """The files beside a vocabulary.

    Attributes:
      config: tokenizer_config.json, with what stands over it.
      names: `{"eos_token": text, ...}`; None where a file says that there is none.
      defaults: the same by the tokenizer's class, for those that `names` lacks.
      added: tokens that the files add, in the order of their ids, those without one last.
      stop_ids: ids that generation_config.json (or config.json) ends an answer at.
      chat_templates: in Jinja, by name; a model's only one is `default`.
      spacing: where the tokenizer's class puts a dummy space: before the `first` text, `always`
        (after a special token too) or `never`; None = as the file says.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    added: tuple[SpecialToken, ...] = ()
    stop_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    spacing: str | None = None


def read_beside(folder: Path) -> Beside:
    """What the files in a vocabulary's folder say.

    Raises:
      UserError: one is not JSON, or a field that is used is not of its type.
    """
    with within(f"{folder}: "):
        return _read_beside(folder)


def _read_beside(folder: Path) -> Beside:
    config = _json(folder / "tokenizer_config.json", _CONFIG_KINDS)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config = config | _json(folder / "special_tokens_map.json", _CONFIG_KINDS)
    names = {key: _text(config[key]) for key in NAMED if key in config}
    known = {*names.values(), *map(_text, _further(config))}
    if decoder is not None:
        found = [_token(value, _index(index)) for index, value in decoder.items()]
    else:
        added = _json(folder / "added_tokens.json")
        if not fits(added, dict[str, int]):
            raise UserError("added_tokens.json: not the ids of texts")
        found = [
            SpecialToken(text, index, special=text in known, normalized=text not in known)
            for text, index in added.items()
        ]
    found.sort(key=lambda token: token.id)
    there = {None, *(token.text for token in found)}
    described = [config[key] for key in NAMED if key in config] + list(_further(config))
    for value in described:
        if _text(value) not in there:
            there.add(_text(value))
            found.append(_token(value))
    model = _json(folder / "config.json", {"model_type": str | None})
    return Beside(
        config,
        names,
        _defaults(config, model),
        tuple(found),
        _stop_ids(folder, model),
        _chat_templates(folder, config),
        None if _stands(folder, model) else _spacing(config),
    )


def _defaults(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, str]:
    name = config.get("tokenizer_class") or _CLASS_OF.get(model.get("model_type"), "")
    values = _CLASSES.get(name.removesuffix("Fast"), ())
    named = zip(("bos_token", "eos_token", "unk_token", "pad_token"), values, strict=False)
    return {key: text for key, text in named if text and key not in config}


def _stands(folder: Path, model: Mapping[str, Any]) -> bool:
    return model.get("model_type") in _AS_FILE and (folder / "tokenizer.json").is_file()


def _spacing(config: Mapping[str, Any]) -> str | None:
    name = (config.get("tokenizer_class") or "").removesuffix("Fast")
    if name not in _SPACING:
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return _SPACING[name] if config.get("legacy") else "first"


def _further(config: Mapping[str, Any]) -> Iterator[Any]:
    """Special tokens without one of the common names, as text or described."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or ()
        yield from listed.values() if isinstance(listed, dict) else listed
    for key, value in config.items():
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | dict):
            yield value


def _token(value: str | Mapping[str, Any], index: int | None = None) -> SpecialToken:
    text = _text(value)
    if text is None:
        raise UserError(f"{shown(value)} describes no token")
    if isinstance(value, str):
        return SpecialToken(text, index)
    check_fields(value, dict.fromkeys(_FLAGS, bool), f"token {shown(text)}")
    flags = {key: value[key] for key in _FLAGS[:3] if key in value}
    special = value.get("special", index is None)
    return SpecialToken(text, index, special=special, **flags)


def _text(value: Any) -> str | None:
    """How a token is written that stands as text, as a description, or as null."""
    text = value.get("content", 0) if isinstance(value, Mapping) else value
    if not fits(text, str | None):
        raise UserError(f"{shown(value)} describes no token")
    return text


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"added_tokens_decoder: {shown(text)} is no id")
    return int(text)


def _stop_ids(folder: Path, model: Mapping[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    ids = (_json(generation) if generation.is_file() else model).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Those in files of their own; those in the config where there is no file of the default."""
    paths = folder.glob("additional_chat_templates/*.jinja")
    files = {path.stem: read_text(path) for path in sorted(paths)}
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return {**files, "default": read_text(own_file)}
    templates = config.get("chat_template") or []
    if isinstance(templates, str):
        return {"default": templates, **files}
    for item in templates:
        if not {"name", "template"} <= item.keys():
            raise UserError(
                f"tokenizer_config.json: chat_template: {shown(item)} lacks 'name' or 'template'"
            )
    return {item["name"]: item["template"] for item in templates} | files


def _json(path: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a JSON file, some of whose fields are of a kind; {} where there is none."""
    if not path.is_file():
        return {}
    fields = json_text.settings(read_settings(path), path.name)
    check_fields(fields, kinds or {}, path.name)
    return fields
