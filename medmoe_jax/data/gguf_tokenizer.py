"""The tokenizer in a GGUF file's fields, as the files that other tools read and write.

Two kinds are there: byte-level BPE (`gpt2`), with merges and the name of how text is cut to words,
and sentencepiece (`llama`), with scores. The first becomes a tokenizer.json, the second a
tokenizer.model; special tokens, ends and chat template become the files beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from medmoe_jax.errors import UserError, bad_or_lost
from medmoe_jax.kinds import shown
from medmoe_jax.storage.partials import partial_of, sweep
from medmoe_jax.storage.places import cache_folder

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Types of tokens, numbered as sentencepiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPECIALS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
SPACE = "\u2581"
_MAIN = ("tokenizer.json", "tokenizer.model")
_SIZES = "sizes.json"  # of the files in a folder of the cache, by name
# No field says that a token takes the spaces after it. llama.cpp's rule: those of their own do in
# files whose `general.name` holds one of these, but for some.
NAME = "general.name"
TAKING = ("phi-3", "phi3")
NOT_TAKING = ("<unk>", "<s>", "<|endoftext|>")
_FORM = 3  # of the files that `tokenizer_files` makes; counts up when they change
# Whether bos stands before each text: llama.cpp asks the field, and where it is absent the way in
# which words are cut. A field of ours, as none beside a tokenizer.json says it.
WRITES_BOS = "gguf_add_bos_token"
BEGUN = ("llama-bpe", "tekken")
# All that may end an answer.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_MARKS = r" ?[^\s\p{L}\p{N}]+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _cut(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


_LLAMA3 = _cut(rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_TAIL}")
_QWEN2 = _cut(rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}")
_TEKKEN = _cut(
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_MARKS}[\r\n/]*|{_TAIL}"
)
_GPT4O = _cut(
    rf"{_WORD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_WORD}{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    rf"\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_TAIL}"
)
_SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
}
_NFC = {"type": "NFC"}
# By `tokenizer.ggml.pre`: how text is cut into words, how it is normalised before, and whether a
# word that is a token is not merged.
CUTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (_byte_level(use_regex=True), None, False),
    "smollm": (_SMOLLM, None, False),
    "llama-bpe": (_LLAMA3, None, True),
    "dbrx": (_LLAMA3, None, False),
    "qwen2": (_QWEN2, _NFC, False),
    "deepseek-r1-qwen": (_QWEN2, _NFC, False),
    "tekken": (_TEKKEN, None, True),
    "gpt-4o": (_GPT4O, None, False),
}


def unpack(fields: Mapping[str, Any], where: str, cache: Path | None = None) -> Path:
    """The main file of the tokenizer in a GGUF file's fields, written to a folder of its own.

    Args:
      fields: all of the file's.
      where: what the file is called in errors.
      cache: folder of such folders, each named by its content; None = the user's cache.

    Raises:
      UserError: there is no tokenizer, or one of a kind that is not known; or the cache cannot be
        written.
    """
    if cache is None:
        cache = cache_folder() / "tokenizers"
    own = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}
    own["takes_spaces"] = _takes_spaces(fields)
    digest = hashlib.sha256(json.dumps([_FORM, own], sort_keys=True).encode()).hexdigest()
    folder = cache / digest[:24]
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)  # somebody cleared a part of the cache
        _write(folder, tokenizer_files(fields, where))
    return next(path for path in map(folder.joinpath, _MAIN) if path.is_file())


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _SIZES).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """A folder with these files, which appears whole or not at all."""
    partial = partial_of(folder)
    files = {**files, _SIZES: _json({name: len(content) for name, content in files.items()})}
    try:
        sweep(folder)
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # else another process was faster
            message = f"{folder.parent}: cannot be written ({error}); set XDG_CACHE_HOME"
            raise bad_or_lost(message, error) from None


def tokenizer_files(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """`{name: content}` of the files that stand for the tokenizer; see `unpack`."""
    reader = _Fields(fields, where)
    kind = reader.get("model", str)
    if kind not in _KINDS:
        raise UserError(f"{where}: {PREFIX}model: '{kind}' is none of {', '.join(_KINDS)}")
    tokens, types = reader.tokens()
    name, content, config = _KINDS[kind](reader, tokens, types)
    files = {name: content}
    texts = {key: reader.id(field) for key, field in _SPECIALS.items()}
    config |= {key: tokens[i] for key, i in texts.items() if i is not None}
    for key in ("add_bos_token", "add_eos_token"):
        if (value := reader.get(key, bool, None)) is not None:
            config[key] = value
    files["tokenizer_config.json"] = _json(config | {"clean_up_tokenization_spaces": False})
    ends = [i for i in dict.fromkeys(map(reader.id, _ENDS)) if i is not None]
    if ends:
        files["generation_config.json"] = _json({"eos_token_id": ends})
    return files | _templates(fields, where)


def _templates(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The files of the chat templates, by the names that others have behind the default's."""
    files = {}
    for key, template in fields.items():
        name = key.removeprefix(TEMPLATE).removeprefix(".")
        if key not in (TEMPLATE, f"{TEMPLATE}.{name}"):
            continue
        if not isinstance(template, str):
            raise UserError(f"{where}: {key}: {shown(template)} is no text")
        if not re.fullmatch(r"\w*", name):
            raise UserError(f"{where}: {key}: {name!r} is no name of a template")
        if template:
            file = f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"
            files[file] = template.encode()
    return files


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


class _Fields:
    """A file's fields about its tokenizer, each of the type it must have."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self.fields.get(PREFIX + name, default)
        if value is ... or (value is not default and not isinstance(value, kind)):
            raise UserError(f"{self.where}: {PREFIX}{name}: missing or of another type")
        return value

    def each(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> list:
        """A list of values of one type."""
        values = self.get(name, list, default)
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{self.where}: {PREFIX}{name}: {shown(value)} is of another type")
        return values

    def tokens(self) -> tuple[list[str], list[int]]:
        tokens = self.each("tokens", str)
        types = self.each("token_type", int, [NORMAL] * len(tokens))
        types = [kind or NORMAL for kind in types]  # 0 says nothing
        if strange := set(types) - set(range(NORMAL, BYTE + 1)):
            raise UserError(f"{self.where}: {PREFIX}token_type: there is no type {min(strange)}")
        if len(types) != len(tokens):
            raise UserError(
                f"{self.where}: {PREFIX}token_type: {len(types)} types of {len(tokens)} tokens"
            )
        if twice := [token for token, times in Counter(tokens).items() if times > 1]:
            raise UserError(f"{self.where}: {PREFIX}tokens: {twice[0]!r} is there twice")
        return tokens, types

    def id(self, name: str) -> int | None:
        token_id, tokens = self.get(name, int, None), len(self.get("tokens", list))
        if token_id is not None and not 0 <= token_id < tokens:
            raise UserError(f"{self.where}: {PREFIX}{name}: {token_id} of {tokens} tokens")
        return token_id


_Files = tuple[str, bytes, dict[str, Any]]  # main file, its content, its class's own settings


def _added(reader: _Fields, token: str, kind: int) -> dict[str, Any]:
    """A token of its own, as tokenizer files describe it."""
    sides = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    takes = _takes_spaces(reader.fields) and token not in NOT_TAKING
    return {"content": token, **sides, "rstrip": takes, "special": kind == CONTROL}


def _takes_spaces(fields: Mapping[str, Any]) -> bool:
    name = str(fields.get(NAME, "")).lower()
    return any(word in name for word in TAKING)


def _byte_pairs(reader: _Fields, tokens: list[str], types: list[int]) -> _Files:
    """A tokenizer.json of byte-level BPE."""
    cut = reader.get("pre", str, "default")
    if cut not in CUTS:
        raise UserError(
            f"{reader.where}: {PREFIX}pre: '{cut}' is none of {', '.join(CUTS)}; name the model's "
            "own tokenizer in base.tokenizer"
        )
    pre_tokenizer, normalizer, ignore_merges = CUTS[cut]
    merges = [merge.split(" ", 1) for merge in reader.each("merges", str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    strange = [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()]
    if strange:
        raise UserError(f"{reader.where}: {PREFIX}merges: {' '.join(strange[0])!r} is no merge")
    added = [
        {"id": i, **_added(reader, token, kind)}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": merges,
        "ignore_merges": ignore_merges,
        "byte_fallback": False,
        "fuse_unk": False,
    }
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        WRITES_BOS: reader.get("add_bos_token", bool, cut in BEGUN),
    }
    return "tokenizer.json", _json(content), config


def _pieces(reader: _Fields, tokens: list[str], types: list[int]) -> _Files:
    """A sentencepiece model."""
    scores = reader.each("scores", (int, float))
    if len(scores) != len(tokens):
        raise UserError(
            f"{reader.where}: {PREFIX}scores: {len(scores)} scores of {len(tokens)} tokens"
        )
    unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN]
    named = reader.id(_SPECIALS["unk_token"])
    if not unknown and named is not None:  # some files call it a control token
        unknown, types = [named], [*types[:named], UNKNOWN, *types[named + 1 :]]
    if len(unknown) != 1:
        raise UserError(
            f"{reader.where}: {PREFIX}token_type: {len(unknown)} unknown tokens, not one"
        )
    model = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # The file has user-defined pieces as they stand in a text, the model with its marked space.
        piece = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    trainer.unk_id = unknown[0]
    trainer.unk_piece = tokens[trainer.unk_id]
    for name in ("bos", "eos", "pad"):
        token_id = reader.id(_SPECIALS[f"{name}_token"])
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = reader.get("add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {
            str(i): _added(reader, token.replace(SPACE, " "), kind)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        },
        "add_prefix_space": normalizer.add_dummy_prefix,
        "legacy": True,  # text after a special token begins as a text does, as in llama.cpp
    }
    return "tokenizer.model", model.SerializeToString(), config


_KINDS = {"gpt2": _byte_pairs, "llama": _pieces}
