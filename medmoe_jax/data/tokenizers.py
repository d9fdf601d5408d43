"""Tokenizers: sentencepiece models and `tokenizer.json` files behind one small protocol.

Training texts are encoded piece by piece (a marker, a question, a marker, an answer) and the ids
are concatenated. So `encode` by default *continues* a text: it never adds the dummy space that many
vocabularies put before a text. `start=True` encodes the beginning of a text as the vocabulary's
own tools do, with the dummy space if the model has one. Some vocabularies put it after every
special token as well: they are said to restart there.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers as hf
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from medmoe_jax.errors import UserError

# Tried in this order when a bare tokenizer.json has no tokenizer_config.json beside it.
BOS_GUESSES = ("<s>", "<bos>", "<|begin_of_text|>")
EOS_GUESSES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to ids and back. `digest` is equal for equal content, wherever the files lie."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    specials: dict[str, int]
    restarts: bool
    digest: str
    chat_template: str | None

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of ordinary text; no bos, no eos. `start` begins a text (module docstring)."""

    def encode_markup(self, text: str, start: bool = False) -> list[int]:
        """Like `encode`, but the special tokens written in `text` become their own ids.

        White space beside a token that takes it in (`lstrip`, `rstrip`) vanishes.
        """

    def begins_after(self, ids: Sequence[int], start: bool = False) -> bool:
        """Whether what follows `ids` is encoded as the beginning of a text; `start` if none are."""

    def strips_after(self, ids: Sequence[int], strip: bool = False) -> bool:
        """Whether white space that follows `ids` vanishes; `strip` if there are none."""

    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        """The inverse of `encode`; control tokens vanish. `start` drops the dummy space."""

    def special(self, text: str) -> int | None:
        """The id of a special token, or None where the vocabulary has no such token."""

    def text_of(self, token_id: int | None) -> str:
        """How a token is written in the vocabulary, "" for None."""


class _Added(NamedTuple):
    """A token beside the merges; `special` ones vanish when decoding."""

    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class _Markup:
    """What both kinds share: special tokens, the files beside the vocabulary, pickling without
    the processors.

    A subclass has `encode`, `restarts` and `_added: dict[str, _Added]`.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None):
        self.path = Path(path)
        self.chat_template = chat_template

    def encode_markup(self, text: str, start: bool = False) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._special_pattern.split(text)):
            if number % 2:
                ids.append(self.specials.get(part, self.specials.get(part.strip())))
            elif part:
                ids += self.encode(part, self.begins_after(ids, start))
        return ids

    def begins_after(self, ids: Sequence[int], start: bool = False) -> bool:
        return self.restarts and ids[-1] in self._special_ids if ids else start

    def strips_after(self, ids: Sequence[int], strip: bool = False) -> bool:
        return ids[-1] in self._stripping_ids if ids else strip

    def special(self, text: str) -> int | None:
        return self.specials.get(text)

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Ids of the tokens that markup may write."""
        return {text: token.id for text, token in self._added.items()}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())

    @functools.cached_property
    def _stripping_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self._added.values() if token.rstrip)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern:
        longest_first = sorted(self._added.items(), key=lambda item: len(item[0]), reverse=True)
        tokens = [
            r"\s*" * token.lstrip + re.escape(text) + r"\s*" * token.rstrip
            for text, token in longest_first
        ]
        return re.compile(f"({'|'.join(tokens) or '(?!)'})")

    def _named(self, name: str) -> str | None:
        """A token's text in tokenizer_config.json."""
        value = self._config.get(name)
        return value["content"] if isinstance(value, dict) else value

    @functools.cached_property
    def _config(self) -> dict:
        return _read_config(self.path.parent)

    @functools.cached_property
    def _content(self) -> bytes:
        return self.path.read_bytes()

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all that decides the ids and the text of a conversation."""
        beside = [self._named("bos_token"), self._named("eos_token"), self._config.get("legacy")]
        tokens = sorted(self._added.items())
        return _digest(self._content, self.chat_template, json.dumps([beside, tokens]))

    def __getstate__(self) -> dict:
        return {"path": self.path, "chat_template": self.chat_template}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class SentencePiece(_Markup):
    """A sentencepiece `.model` file, with the `tokenizer_config.json` beside it: that may name bos
    and eos and add tokens behind the model's. Loaded at first use. Implements `Tokenizer`.
    """

    def encode(self, text: str, start: bool = False) -> list[int]:
        return (self._starting if start else self._continuing).encode(text)

    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        hidden = {token.id for token in self._added.values() if token.special}
        shown = (int(i) for i in ids if int(i) not in hidden)
        text = "".join(
            self._continuing.decode(list(run)) if own else "".join(map(self.text_of, run))
            for own, run in itertools.groupby(shown, lambda i: i < self._pieces)
        )
        return text[1:] if start and self._dummy_prefix and text.startswith(" ") else text

    def text_of(self, token_id: int | None) -> str:
        if token_id is None:
            return ""
        if token_id < self._pieces:
            return self._starting.id_to_piece(token_id)
        return next(text for text, token in self._added.items() if token.id == token_id)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max([self._pieces, *(token.id + 1 for token in self._added.values())])

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._find("bos_token", self._starting.bos_id())

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._find("eos_token", self._starting.eos_id())

    @functools.cached_property
    def pad_id(self) -> int:
        return _first_id(self._find("pad_token", self._starting.pad_id()), self.eos_id)

    @functools.cached_property
    def restarts(self) -> bool:
        """As the tools of this format do by the field `legacy`."""
        return self._dummy_prefix and bool(self._config.get("legacy"))

    def _find(self, name: str, own: int) -> int | None:
        text = self._named(name)
        return self.specials.get(text, _id_or_none(own)) if text else _id_or_none(own)

    @functools.cached_property
    def _added(self) -> dict[str, _Added]:
        """Control and user-defined pieces, and what the config adds."""
        piece = model_pb2.ModelProto.SentencePiece
        kinds = {piece.CONTROL: True, piece.USER_DEFINED: False}
        found = {
            p.piece: _Added(i, special=kinds[p.type])
            for i, p in enumerate(self._model.pieces)
            if p.type in kinds
        }
        for index, token in self._config.get("added_tokens_decoder", {}).items():
            if int(index) >= self._pieces or token["content"] in found:
                flags = (token.get(name, False) for name in _Added._fields[1:])
                found[token["content"]] = _Added(int(index), *flags)
        return found

    @functools.cached_property
    def _pieces(self) -> int:
        return self._starting.get_piece_size()

    @functools.cached_property
    def _model(self) -> model_pb2.ModelProto:
        return model_pb2.ModelProto.FromString(self._content)

    @functools.cached_property
    def _dummy_prefix(self) -> bool:
        return self._model.normalizer_spec.add_dummy_prefix

    @functools.cached_property
    def _starting(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor(dummy_prefix=self._dummy_prefix)

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor(dummy_prefix=False)

    def _processor(self, dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """White space is kept as it is, so that decoding gives back the text."""
        model = model_pb2.ModelProto()
        model.CopyFrom(self._model)
        model.normalizer_spec.add_dummy_prefix = dummy_prefix
        model.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class HuggingFace(_Markup):
    """A `tokenizer.json` file, with the `tokenizer_config.json` beside it. Loaded at first use.

    Special tokens written in ordinary text are text to it, never their ids.
    """

    def encode(self, text: str, start: bool = False) -> list[int]:
        tokenizer = self._starting if start else self._continuing
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        tokenizer = self._starting if start else self._continuing
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._starting.id_to_token(token_id)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._starting.get_vocab().values()) + 1

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._find("bos_token", BOS_GUESSES)

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._find("eos_token", EOS_GUESSES)

    @functools.cached_property
    def pad_id(self) -> int:
        return _first_id(self._find("pad_token", ()), self.eos_id)

    @functools.cached_property
    def restarts(self) -> bool:
        """As the file says, unless the config's field `legacy` does."""
        own = _restarts([self._parsed.get(part) for part in ("normalizer", "pre_tokenizer")])
        return bool(self._config.get("legacy", own))

    @functools.cached_property
    def _added(self) -> dict[str, _Added]:
        added = self._starting.get_added_tokens_decoder()
        return {
            token.content: _Added(index, token.lstrip, token.rstrip, token.special)
            for index, token in added.items()
        }

    def _find(self, name: str, guesses: Sequence[str]) -> int | None:
        text = self._named(name)
        candidates = [text] if text or self._config else guesses
        ids = (self._starting.token_to_id(c) for c in candidates if c)
        return next((i for i in ids if i is not None), None)

    @functools.cached_property
    def _starting(self) -> hf.Tokenizer:
        return self._processor(self._parsed)

    @functools.cached_property
    def _continuing(self) -> hf.Tokenizer:
        return self._processor(_without_dummy_prefix(self._parsed))

    @functools.cached_property
    def _parsed(self) -> dict:
        content = json.loads(self._content)
        if not isinstance(content, dict) or not {"model", "added_tokens"} <= content.keys():
            raise ValueError("it lacks the fields 'model' and 'added_tokens'")
        return content

    def _processor(self, content: dict) -> hf.Tokenizer:
        tokenizer = hf.Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer


def load(path: str | Path) -> SentencePiece | HuggingFace:
    """Loads a sentencepiece model, a `tokenizer.json`, or a folder that holds one of them.

    A folder's `tokenizer.json` comes before its `tokenizer.model`; the chat template is taken from
    `chat_template.jinja` or `tokenizer_config.json` beside it. Raises UserError when nothing
    readable is found.
    """
    path = Path(path)
    if path.is_dir():
        names = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model*"))]
        found = [name for name in names if name.is_file()]
        if not found:
            raise UserError(f"{path}: holds no tokenizer.json and no sentencepiece .model file")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    kind = HuggingFace if path.suffix == ".json" else SentencePiece
    tokenizer = kind(path, _chat_template(path.parent))
    try:
        _ = tokenizer.vocab_size
    except (RuntimeError, ValueError, DecodeError) as error:
        raise UserError(f"{path}: not a tokenizer that can be read ({error})") from error
    return tokenizer


def train(
    texts: Iterable[str], vocab_size: int, out: str | Path, symbols: Sequence[str] = ()
) -> SentencePiece:
    """Trains a byte-fallback BPE sentencepiece model and writes it to the file `out`.

    Ids: 0 unknown, 1 bos, 2 eos, 3 pad, then `symbols` in order. White space is kept and no dummy
    space is added. Equal texts give an equal model. Raises UserError when there is too little text
    for `vocab_size`.
    """
    out = Path(out)
    smallest = 4 + len(symbols) + 256
    if vocab_size <= smallest:
        raise UserError(f"vocab_size {vocab_size} is too small; give more than {smallest}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    refused: list[UserError] = []
    try:
        with open(partial, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_noting(texts, refused),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                pad_id=3,
                user_defined_symbols=list(symbols),
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=True,
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
            )
        partial.rename(out)
    except RuntimeError as error:
        if refused:
            raise refused[0] from None
        raise UserError(
            f"cannot train {vocab_size} pieces from these texts ({error}); "
            "give more text or a smaller vocab_size"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return load(out)


def _noting(texts: Iterable[str], refused: list[UserError]) -> Iterator[str]:
    """The texts; the trainer wraps what reading them raises in an error of its own."""
    try:
        yield from texts
    except UserError as error:
        refused.append(error)
        raise


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError when the tokenizer can give an id that the model's embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer!r} has {tokenizer.vocab_size} ids but the model's vocabulary has "
            f"{vocab_size}: ids from {vocab_size} on have no embedding; "
            "use the tokenizer that belongs to this model"
        )


def _without_dummy_prefix(node):
    """The same tokenizer.json without anything that adds a space before a text or strips one."""
    if isinstance(node, list):
        return [_without_dummy_prefix(item) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    node = {key: _without_dummy_prefix(value) for key, value in node.items()}
    if kind == "Metaspace":
        node.pop("add_prefix_space", None)
        node["prepend_scheme"] = "never"
    elif kind == "ByteLevel":
        node["add_prefix_space"] = False
    elif kind == "Strip" and "start" in node:
        node["start"] = 0
    return node


def _restarts(node) -> bool:
    """Whether parts of a tokenizer.json put a dummy space before every run of ordinary text."""
    if isinstance(node, list):
        return any(map(_restarts, node))
    if not isinstance(node, dict):
        return False
    kind = node.get("type")
    if kind in ("Metaspace", "ByteLevel"):
        spaced = node.get("add_prefix_space", True)
        return node.get("prepend_scheme", "always" if spaced else "never") == "always"
    return kind == "Prepend" or any(map(_restarts, node.values()))


def _read_config(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def _chat_template(folder: Path) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = _read_config(folder).get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        return named.get("default")
    return template


def _digest(content: bytes, *parts: str | None) -> str:
    digest = hashlib.sha256(content)
    for part in parts:
        digest.update(b"\0" + (part or "").encode())
    return digest.hexdigest()


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _first_id(*candidates: int | None) -> int:
    return next((c for c in candidates if c is not None), 0)
