"""Tokenizers: sentencepiece models and `tokenizer.json` files.

Training texts are encoded run by run and the ids are concatenated. So `encode` by default
*continues* a text: it never adds the dummy space that many vocabularies put before a text.
`start=True` encodes the beginning of a text as the vocabulary's own tools do, with the dummy space
if the model has one. Some vocabularies put it after every special token as well: they are said to
restart there.
"""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from medmoe_jax import json_text
from medmoe_jax.data.gguf_tokenizer import SPACE, WRITES_BOS
from medmoe_jax.data.tokens import Added, Tokenizer
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.partials import partial_of, sweep
from medmoe_jax.storage.places import check_file, local

# Tried in this order when no file beside a tokenizer.json says anything.
# What tells of a tokenizer beside its main file.
BESIDE = ("*.json", "*.model", "*.jinja", "*.txt")
GUESSES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
}
_MARKING = ("Prepend", "Metaspace")  # steps that put a mark before a text, as sentencepiece does
_STEPS = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
_LONGEST = 1 << 20  # bytes of a text for training; a character has at most 4


class SentencePiece(Tokenizer):
    """A sentencepiece `.model` file, with the files beside it that name its special tokens and add
    tokens behind the model's.
    """

    def encode(self, text: str, start: bool = False) -> list[int]:
        return (self._starting if start else self._continuing).encode(text)

    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        shown = (int(i) for i in ids if not self._hidden(int(i)))
        text = "".join(
            self._continuing.decode(list(run)) if own else "".join(map(self.text_of, run))
            for own, run in itertools.groupby(shown, self._is_own)
        )
        return text[1:] if start and self._dummy_prefix and text.startswith(" ") else text

    def text_of(self, token_id: int | None) -> str:
        if token_id is None:
            return ""
        if token_id in self._texts:
            return self._texts[token_id]
        return self._starting.id_to_piece(token_id) if self._is_own(token_id) else ""

    @functools.cached_property
    def vocab_size(self) -> int:
        return max([self._pieces, *(token.id + 1 for token in self.added.values())])

    @property
    def ordinary_size(self) -> int:
        unused, own = ModelProto.SentencePiece.UNUSED, self._all_added
        pieces = enumerate(self._model.pieces)
        return max((i + 1 for i, p in pieces if p.type != unused and p.piece not in own), default=0)

    @functools.cached_property
    def restarts(self) -> bool:
        """As transformers' class does by the field `legacy`."""
        return self._dummy_prefix and self._beside.spacing == "always"

    def _encode_run(self, text: str, start: bool) -> list[int]:
        """A text that begins with a space of its own takes no dummy space, as in transformers."""
        return self.encode(text, start and not text.startswith((" ", SPACE)))

    def _own_id(self, name: str) -> int | None:
        own = getattr(self._starting, name.replace("_token", "_id"), lambda: -1)()
        return own if own >= 0 else None

    def _vocabulary_id(self, text: str) -> int | None:
        index = self._starting.piece_to_id(text)
        return index if self._starting.id_to_piece(index) == text else None

    @functools.cached_property
    def _own_added(self) -> dict[str, Added]:
        """Control and user-defined pieces."""
        piece = ModelProto.SentencePiece
        kinds = {piece.CONTROL: True, piece.USER_DEFINED: False}
        return {
            p.piece: Added(i, special=kinds[p.type])
            for i, p in enumerate(self._model.pieces)
            if p.type in kinds
        }

    @property
    def _adds_bos(self) -> bool | None:
        told = self._beside.config.get("add_bos_token")
        named = self._beside.names.get("bos_token") or self._beside.defaults.get("bos_token")
        return (True if named else None) if told is None else told

    @property
    def _respaced(self) -> bool:
        return self._model.normalizer_spec.add_dummy_prefix != self._dummy_prefix

    def _is_own(self, token_id: int) -> bool:
        return token_id < self._pieces

    def _hidden(self, token_id: int) -> bool:
        return token_id in self._by_id and self._by_id[token_id].special

    @property
    def _own_size(self) -> int:
        return len(self._model.pieces)

    @functools.cached_property
    def _pieces(self) -> int:
        return self._starting.get_piece_size()

    @functools.cached_property
    def _model(self) -> ModelProto:
        return ModelProto.FromString(self._content)

    @functools.cached_property
    def _dummy_prefix(self) -> bool:
        return self._model.normalizer_spec.add_dummy_prefix and self._beside.spacing != "never"

    @functools.cached_property
    def _starting(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor(dummy_prefix=self._dummy_prefix)

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor(dummy_prefix=False)

    def _processor(self, dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """White space is kept as it is, so that decoding gives back the text."""
        model = ModelProto()
        model.CopyFrom(self._model)
        if self.rows is not None:
            del model.pieces[self.rows :]
        model.normalizer_spec.add_dummy_prefix = dummy_prefix
        model.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class HuggingFace(Tokenizer):
    """A `tokenizer.json` file, with the files beside it that name its special tokens and add more.

    Special tokens written in ordinary text are text to it, never their ids.
    """

    def encode(self, text: str, start: bool = False) -> list[int]:
        tokenizer = self._starting if start else self._continuing
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        tokenizer = self._starting if start else self._continuing
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._starting.id_to_token(token_id) or ""

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._starting.get_vocab().values()) + 1

    @property
    def ordinary_size(self) -> int:
        pieces, own = self._bare.get_vocab(with_added_tokens=False), self._all_added
        return max((i + 1 for piece, i in pieces.items() if piece not in own), default=0)

    @functools.cached_property
    def restarts(self) -> bool:
        """As the file says, with the dummy space where the tokenizer's class puts it."""
        return "always" in _schemes(self._spaced)

    @property
    def _respaced(self) -> bool:
        own = _schemes(self._parsed)
        told = self._beside.config.get("legacy", "always" in own)
        never = self._beside.spacing == "never" and {*own} - {"never"}
        return self.restarts != bool(told) or bool(never)

    def _encode_run(self, text: str, start: bool) -> list[int]:
        return self.encode(text, start)

    def _own_id(self, name: str) -> int | None:
        """A guess, where no file says anything."""
        bare = not self._beside.config and not self._beside.defaults
        ids = (self._vocabulary_id(guess) for guess in GUESSES.get(name, ()) if bare)
        return next((i for i in ids if i is not None), None)

    def _vocabulary_id(self, text: str) -> int | None:
        return self._bare.token_to_id(text)

    @functools.cached_property
    def _own_added(self) -> dict[str, Added]:
        added = self._bare.get_added_tokens_decoder()
        return {
            token.content: Added(index, token.lstrip, token.rstrip, token.special)
            for index, token in added.items()
        }

    @property
    def _own_size(self) -> int:
        """Where the library puts a further token: behind the last, whatever ids are left free."""
        added = (token.id + 1 for token in self._own_added.values())
        return max([self._bare.get_vocab_size(with_added_tokens=False), *added])

    @functools.cached_property
    def _adds_bos(self) -> bool | None:
        """As its last step does; transformers asks no `add_bos_token` beside such a file."""
        told = self._beside.config.get(WRITES_BOS)
        return self._bare.encode("x").ids[:1] == [self.bos_id] if told is None else told

    @functools.cached_property
    def _bare(self) -> hf.Tokenizer:
        """The file alone."""
        return _library_tokenizer(self._parsed)

    @functools.cached_property
    def _starting(self) -> hf.Tokenizer:
        return self._processor(self._kept)

    @functools.cached_property
    def _continuing(self) -> hf.Tokenizer:
        return self._processor(_without_dummy_prefix(self._kept))

    @functools.cached_property
    def _kept(self) -> dict:
        """The file without the tokens that are set aside."""
        return _without_tokens(self._spaced, self.set_aside) if self.set_aside else self._spaced

    @functools.cached_property
    def _spaced(self) -> dict:
        """The file with the dummy space of the tokenizer's class, where it has one at all."""
        spacing, content = self._beside.spacing, self._parsed
        if spacing is None or not {*_schemes(content, _MARKING)} - {"never"}:
            return content
        marks = {"type": "Metaspace", "replacement": SPACE, "split": False}
        return {**content, "normalizer": None, "pre_tokenizer": marks | {"prepend_scheme": spacing}}

    @functools.cached_property
    def _parsed(self) -> dict:
        content = json_text.settings(self._content, self.path)
        if not {"model", "added_tokens"} <= content.keys():
            raise ValueError("it lacks the fields 'model' and 'added_tokens'")
        return content

    def _processor(self, content: dict) -> hf.Tokenizer:
        """The file with the tokens that others add, which come behind it in the order given."""
        tokenizer = _library_tokenizer(content)
        for token in self._new_tokens:
            if token.text in self.set_aside:
                continue
            known = self.added[token.text]
            flags = {"lstrip": known.lstrip, "rstrip": known.rstrip, "special": known.special}
            added = hf.AddedToken(token.text, normalized=token.normalized, **flags)
            tokenizer.add_tokens([added])
            index = tokenizer.token_to_id(token.text)
            if index != known.id:
                raise UserError(
                    f"{self.path.parent}: a file gives the token {token.text!r} the id {known.id}, "
                    f"but in {self.path.name} it becomes {index}; correct that file"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer


class _LibraryErrors(contextlib.AbstractContextManager):
    """Raises ValueError in place of what the library raises: `Exception` itself, no class of it."""

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: object) -> None:
        if kind is Exception:
            raise ValueError(str(error)) from error


def _library_tokenizer(content: dict) -> hf.Tokenizer:
    """The library's tokenizer of a tokenizer.json. Raises ValueError."""
    with _LibraryErrors():
        return hf.Tokenizer.from_str(json.dumps(content))


def load(path: str | Path) -> Tokenizer:
    """Loads a sentencepiece model, a `tokenizer.json`, or a folder that holds one of them.

    A folder's `tokenizer.json` comes before its `tokenizer.model`; the chat template is taken from
    `chat_template.jinja` or `tokenizer_config.json` beside it. Raises UserError when nothing
    readable is found.
    """
    path = fetched(path, beside=BESIDE)
    if path.is_dir():
        names = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model*"))]
        found = [name for name in names if name.is_file()]
        if not found:
            raise UserError(f"{path}: holds no tokenizer.json and no sentencepiece .model file")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    kind = HuggingFace if path.suffix == ".json" else SentencePiece
    tokenizer = kind(path)
    try:
        with _LibraryErrors():
            _ = tokenizer.vocab_size, tokenizer.names, tokenizer.encode("a b", start=True)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, DecodeError) as error:
        raise UserError(f"{path}: not a tokenizer that can be read ({error})") from error
    return tokenizer


def train(
    texts: Iterable[str], vocab_size: int, out: str | Path, symbols: Sequence[str] = ()
) -> Tokenizer:
    """Trains a byte-fallback BPE sentencepiece model and writes it to the file `out`.

    Ids: 0 unknown, 1 bos, 2 eos, 3 pad, then `symbols` in order. White space is kept and no dummy
    space is added. Equal texts give an equal model. Raises UserError when there is too little text
    for `vocab_size`.
    """
    out = local(out)
    check_file(out)
    smallest = 4 + len(symbols) + 256
    if vocab_size <= smallest:
        raise UserError(f"vocab_size {vocab_size} is too small; give more than {smallest}")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out)
    partial = partial_of(out)
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
                max_sentence_length=_LONGEST,
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
        for text in texts:
            yield from _short(text)
    except UserError as error:
        refused.append(error)
        raise


def _short(text: str) -> Iterator[str]:
    """A text in parts that the trainer takes: it passes over longer ones and says nothing."""
    if len(text) <= _LONGEST // 4 or len(text.encode()) <= _LONGEST:
        yield text
        return
    # Cut before white space, which begins the words of the model; anywhere where there is none.
    part = f".{{1,{_LONGEST // 4}}}"
    yield from re.findall(rf"{part}(?!\S)|{part}", text, re.DOTALL)


def within_rows(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer for a model whose embedding has so many rows.

    Tokens of their own beyond them are set aside: models of text are published with the tokenizer
    of a sister that also has a token for pictures, or for code to be filled in.

    Raises:
      UserError: pieces of ordinary text, or tokens that begin, end or fill texts, have no row.
    """
    if tokenizer.vocab_size <= rows:
        return tokenizer
    needed = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.stop_ids)
    lost = [tokenizer.text_of(i) for i in dict.fromkeys(needed) if i is not None and i >= rows]
    if tokenizer.ordinary_size > rows or lost:
        what = f"its tokens {', '.join(lost)}" if lost else "pieces of ordinary text"
        raise UserError(
            f"{tokenizer!r} has {tokenizer.vocab_size} ids but the model's vocabulary has {rows}: "
            f"ids from {rows} on have no embedding, {what} among them; "
            "use the tokenizer that belongs to this model"
        )
    return type(tokenizer)(tokenizer.path, rows)


def _without_tokens(content: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """The same tokenizer.json without some tokens, the last of it, and the merges into them."""
    model = content["model"]
    vocabulary, merges = model["vocab"], model.get("merges")
    kept: dict[str, Any] = {}
    if isinstance(vocabulary, dict):
        kept["vocab"] = {text: i for text, i in vocabulary.items() if text not in texts}
    else:  # pieces with their scores
        kept["vocab"] = [piece for piece in vocabulary if piece[0] not in texts]
    if merges:
        pairs = ((m, m.split(" ", 1) if isinstance(m, str) else m) for m in merges)
        kept["merges"] = [merge for merge, pair in pairs if "".join(pair) not in texts]
    added = [token for token in content["added_tokens"] if token["content"] not in texts]
    return {**content, "added_tokens": added, "model": {**model, **kept}}


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


def _schemes(node: Any, kinds: Collection[str] = (*_MARKING, "ByteLevel")) -> list[str]:
    """Before which runs of text the steps of a tokenizer.json put a dummy space."""
    if isinstance(node, list):
        return [scheme for one in node for scheme in _schemes(one, kinds)]
    if not isinstance(node, dict):
        return []
    if node.get("type") in kinds:
        spaced = node.get("add_prefix_space", True)
        return [node.get("prepend_scheme", "always" if spaced else "never")]
    return _schemes([node.get(part) for part in _STEPS], kinds)
