"""A tokenizer as the fields of a GGUF file: the way back of `gguf_tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.gguf_tokenizer import (
    BYTE,
    CONTROL,
    CUTS,
    NAME,
    NORMAL,
    NOT_TAKING,
    PREFIX,
    SPACE,
    TAKING,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from medmoe_jax.data.portable import agrees
from medmoe_jax.data.tokens import Tokenizer
from medmoe_jax.errors import UserError

# Steps of a tokenizer.json that mark spaces, as sentencepiece does, and that cut at the marks.
_MARKING = ("Prepend", "Replace", "Metaspace", "Split")
_LOWEST = -1000.0  # score of pieces that no merge makes, as llama.cpp's converter has it


class TokenizerFields(NamedTuple):
    """A tokenizer for a GGUF file.

    Attributes:
      values: the file's fields.
      same: whether llama.cpp gives prompts the ids that were trained.
      unnamed: ids that end an answer and that no field is left to name.
    """

    values: dict[str, Any]
    same: bool
    unnamed: tuple[int, ...]


def tokenizer_fields(encoder: Encoder, rows: int, template: str) -> TokenizerFields:
    """A tokenizer and its chat template as fields.

    Args:
      encoder: with the tokenizer, and what ends an answer.
      rows: of the embedding; ids that the tokenizer lacks become unused tokens.
      template: in Jinja; it writes bos itself where there is one.

    Raises:
      UserError: a tokenizer of a kind that llama.cpp does not know.
    """
    tokenizer = encoder.tokenizer
    read = _of_json if tokenizer.path.suffix == ".json" else _of_pieces
    texts, types, fields = read(tokenizer.path)
    for text, token in tokenizer.added.items():
        texts[token.id] = text
        if types.get(token.id) != UNKNOWN:
            types[token.id] = CONTROL if token.special else USER_DEFINED
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [types.get(i, UNUSED) for i in range(rows)]
    prefixes = (False,)
    if "scores" in fields:
        prefixes = (False, True)
        fields["scores"] = [fields["scores"].get(i, _LOWEST) for i in range(rows)]
        tokens = [
            token.replace(SPACE, " ") if kind == USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    fitting = [p for p in prefixes if agrees(encoder, template, _LlamaCpp(tokenizer, p))]
    if "scores" in fields:
        fields["add_space_prefix"] = bool(fitting and fitting[0])
    ids, unnamed = _ids(encoder)
    taking = {text for text, token in tokenizer.added.items() if token.rstrip}
    others = set(tokenizer.added) - taking - set(NOT_TAKING)
    unknown = next((i for i, kind in types.items() if kind == UNKNOWN), None)
    fields |= {"tokens": tokens, "token_type": kinds, "add_bos_token": False}
    fields |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    fields |= {} if unknown is None else {"unknown_token_id": unknown}
    values = {PREFIX + name: value for name, value in fields.items()}
    values |= {NAME: TAKING[0]} if taking and not others else {}  # the only way to say so
    same = bool(fitting) and not (taking and others)
    return TokenizerFields(values | {TEMPLATE: template}, same, unnamed)


def _ids(encoder: Encoder) -> tuple[dict[str, int | None], tuple[int, ...]]:
    """Ids with names of their own, and those that end an answer beyond the names there are."""
    tokenizer = encoder.tokenizer
    ends = [i for i in dict.fromkeys((tokenizer.eos_id, *encoder.stops.ids)) if i is not None]
    named = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {"bos": tokenizer.bos_id, "padding": tokenizer.pad_id, **named}, tuple(ends[3:])


class _LlamaCpp(NamedTuple):
    """How llama.cpp reads a text with markup: after a token of its own a text begins anew.

    Attributes:
      tokenizer: of the ids.
      prefix: whether a space is put where a text begins.
    """

    tokenizer: Tokenizer
    prefix: bool

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        begins = True
        for part in self.tokenizer.parts(text):
            if isinstance(part, str):
                ids += self.tokenizer.encode(part, self.prefix and begins)
            else:
                ids.append(part.id)
            begins = not isinstance(part, str)
        return ids


_Read = tuple[dict[int, str], dict[int, int], dict[str, Any]]  # texts, types, other fields


def _of_pieces(path: Path) -> _Read:
    model = ModelProto.FromString(path.read_bytes())
    if model.trainer_spec.model_type != TrainerSpec.BPE:
        raise UserError(f"{path}: only a sentencepiece model of type BPE fits a GGUF file")
    if model.normalizer_spec.precompiled_charsmap:
        raise UserError(
            f"{path}: its normalisation '{model.normalizer_spec.name}' fits no GGUF file"
        )
    pieces = list(enumerate(model.pieces))
    fields = {
        "model": "llama",
        "pre": "default",
        "scores": {i: piece.score for i, piece in pieces},
    }
    texts, types = {i: p.piece for i, p in pieces}, {i: p.type for i, p in pieces}
    return texts, types, fields


def _of_json(path: Path) -> _Read:
    parsed = json.loads(path.read_bytes())
    model = parsed["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{path}: a tokenizer of type {model.get('type')!r} fits no GGUF file")
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    texts = {i: text for text, i in model["vocab"].items()}
    if model.get("byte_fallback"):
        _check_spaces(path, parsed)
        return _as_pieces(parsed, texts, merges)
    cut = _cut_of(path, parsed)
    fields = {"model": "gpt2", "pre": cut, "merges": [" ".join(merge) for merge in merges]}
    return texts, dict.fromkeys(texts, NORMAL), fields


def _cut_of(path: Path, parsed: Mapping[str, Any]) -> str:
    """The name of how a tokenizer cuts words."""

    def shape(node: Any) -> Any:
        """What matters of a part: offsets are of texts, and one part alone is no sequence."""
        if not isinstance(node, dict):
            return node
        parts = node.get("pretokenizers") or node.get("normalizers")
        if parts and len(parts) == 1:
            return shape(parts[0])
        return {
            key: [shape(one) for one in value] if isinstance(value, list) else shape(value)
            for key, value in node.items()
            if key != "trim_offsets"
        }

    ignores = bool(parsed["model"].get("ignore_merges"))
    own = (shape(parsed.get("pre_tokenizer")), shape(parsed.get("normalizer")), ignores)
    for name, (pre_tokenizer, normalizer, ignore_merges) in CUTS.items():
        if own == (shape(pre_tokenizer), normalizer, ignore_merges):
            return name
    raise UserError(
        f"{path}: it cuts words in a way that has no name in GGUF files (known: {', '.join(CUTS)})"
    )


def _check_spaces(path: Path, parsed: Mapping[str, Any]) -> None:
    """Raise UserError unless all that happens to a text is that its spaces are marked."""
    for node in _nodes([parsed.get("normalizer"), parsed.get("pre_tokenizer")]):
        marks = node.get("pattern", {"String": " "}) == {"String": " "}
        if node.get("type") not in _MARKING or not marks:
            raise UserError(f"{path}: it has the step {json.dumps(node)}, which fits no GGUF file")


def _nodes(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json."""
    if isinstance(part, list):
        for one in part:
            yield from _nodes(one)
    elif isinstance(part, dict) and part.get("type") == "Sequence":
        yield from _nodes(part.get("normalizers") or part.get("pretokenizers"))
    elif part is not None:
        yield part


def _as_pieces(parsed: Mapping[str, Any], texts: dict[int, str], merges) -> _Read:
    """A sentencepiece vocabulary in a tokenizer.json: the earlier a merge, the higher its score."""
    rank = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), float(-number))
    unknown = parsed["model"].get("unk_token")
    bytes_ = {f"<0x{n:02X}>" for n in range(256)}
    types = {
        i: UNKNOWN if text == unknown else BYTE if text in bytes_ else NORMAL
        for i, text in texts.items()
    }
    scores = {i: rank.get(text, _LOWEST * len(texts)) for i, text in texts.items()}
    return texts, types, {"model": "llama", "pre": "default", "scores": scores}
