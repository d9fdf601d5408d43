"""Text and tokens of their own: what every tokenizer does."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medmoe_jax.data import special_tokens


class Added(NamedTuple):
    """A token of its own beside the merges; see `SpecialToken`."""

    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class TokenBoundary(NamedTuple):
    """A place over which no token reaches; `starts`: a text begins there."""

    starts: bool = False


# How a vocabulary with a fall-back to bytes writes one.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What a token takes in beside it: white space by Unicode's property; Python has four signs more.
_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")
_TOOL_USE = "tool_use"  # which template is for talks with tools, where there are several
CUT, START = TokenBoundary(), TokenBoundary(True)
Part = str | Added | TokenBoundary


class Tokenizer(ABC):
    """Text to ids and back, with the files beside the vocabulary that name and add special tokens.

    It is pickled without its processors. A subclass reads one kind of file.

    Attributes:
      path: the file.
      rows: of the model's embedding, beyond which added tokens are set aside; None = no end.
    """

    def __init__(self, path: str | Path, rows: int | None = None) -> None:
        """`path` is the file; it is read at first use."""
        self.path, self.rows = Path(path), rows

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id and 1."""

    @property
    @abstractmethod
    def restarts(self) -> bool:
        """Whether text after any special token is encoded as the beginning of a text."""

    @abstractmethod
    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of ordinary text; no bos, no eos. `start` begins a text, with the dummy
        space that some vocabularies put there."""

    @abstractmethod
    def decode(self, ids: Sequence[int], start: bool = False) -> str:
        """The inverse of `encode`; control tokens vanish. `start` drops the dummy space."""

    @abstractmethod
    def text_of(self, token_id: int | None) -> str:
        """How a token is written in the vocabulary, "" for None."""

    def bytes_of(self, token_id: int) -> bytes | None:
        """What a token stands for in UTF-8, also part of a character; None where none can tell."""
        text = self.decode([token_id])
        if "\ufffd" not in text:
            return text.encode()
        written = self.text_of(token_id)
        if BYTE_TOKEN.fullmatch(written):
            return bytes([int(written[3:5], 16)])
        alphabet = _byte_alphabet()
        known = alphabet.keys() >= set(written)
        return bytes(alphabet[one] for one in written) if known else None

    @property
    @abstractmethod
    def ordinary_size(self) -> int:
        """The largest id that a piece of ordinary text may have, and 1."""

    @property
    @abstractmethod
    def _own_added(self) -> Mapping[str, Added]:
        """The file's own tokens beside the merges."""

    @property
    @abstractmethod
    def _own_size(self) -> int:
        """The id that a further token gets."""

    @abstractmethod
    def _own_id(self, name: str) -> int | None:
        """The id of a named token (`eos_token`), by the file alone."""

    @abstractmethod
    def _vocabulary_id(self, text: str) -> int | None:
        """The id of any token by its text."""

    @property
    @abstractmethod
    def _respaced(self) -> bool:
        """Whether a dummy space stands elsewhere than file and field `legacy` alone would say."""

    @property
    @abstractmethod
    def _adds_bos(self) -> bool | None:
        """Whether bos stands before each text; None where no file says."""

    @abstractmethod
    def _encode_run(self, text: str, start: bool) -> list[int]:
        """The ids of text that stands between tokens of their own."""

    def parts(self, text: str) -> list[str | Added]:
        """Markup taken apart: ordinary text, and the tokens of their own that are written in it."""
        pieces = enumerate(self._special_pattern.split(text))
        return [self.added[piece] if n % 2 else piece for n, piece in pieces if piece]

    def encode_parts(
        self, parts: Iterable[Part], start: bool = False, strip: bool = False
    ) -> list[int]:
        """The ids of text and tokens; text that stands side by side is encoded as one.

        White space beside a token that takes it in (`lstrip`, `rstrip`) vanishes; with `strip` that
        at the beginning too.
        """
        ids: list[int] = []
        text, encode = "", self._encode_run
        for part in (*parts, CUT):
            if isinstance(part, str):
                text += part.lstrip(_WHITE) if strip and not text else part
                continue
            if isinstance(part, Added) and part.lstrip:
                text = text.rstrip(_WHITE)
            if text:
                ids += encode(text, start)
                text, start, strip, encode = "", False, False, self._encode_run
            if isinstance(part, Added):
                ids.append(part.id)
                start, strip = self.restarts, part.rstrip
            elif part.starts:
                start, encode = True, self.encode
        return ids

    def encode_markup(self, text: str, start: bool = False) -> list[int]:
        """The ids of text in which the tokens of their own become their ids."""
        return self.encode_parts(self.parts(text), start)

    def begins_after(self, ids: Sequence[int], start: bool = False) -> bool:
        """Whether what follows `ids` is encoded as the beginning of a text; `start` if none are."""
        return self.restarts and ids[-1] in self._by_id if ids else start

    def strips_after(self, ids: Sequence[int], strip: bool = False) -> bool:
        """Whether white space that follows `ids` vanishes; `strip` if there are none."""
        return self.token(ids[-1]).rstrip if ids else strip

    def special(self, text: str) -> int | None:
        """The id of a special token, or None where the vocabulary has no such token."""
        return self.specials.get(text)

    def token(self, token_id: int) -> Added:
        """A token of its own by its id."""
        return self._by_id.get(token_id, Added(token_id))

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """Ids of the tokens that markup may write."""
        return {text: token.id for text, token in self.added.items()}

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The id of the token with that name."""
        return self._named("bos_token")

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The id of the token with that name."""
        return self._named("eos_token")

    @functools.cached_property
    def pad_id(self) -> int:
        """The id of padding: the token with that name, or else that of eos."""
        return _first_id(self._named("pad_token"), self.eos_id)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What the model's files end an answer at; an ordinary piece of text cannot."""
        return tuple(i for i in self._beside.stop_ids if i in self._by_id)

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Texts of the tokens with names, as chat templates ask for them (`eos_token`)."""
        ids = {name: self._named(name) for name in special_tokens.NAMED}
        return {name: self.text_of(i) for name, i in ids.items() if i is not None}

    @property
    def encodes_bos(self) -> bool:
        """Whether other tools that read the files put bos before each text that they encode."""
        return self.bos_id is not None and bool(self._adds_bos)

    @property
    def leaves_bos(self) -> bool:
        """Whether there is a bos that other tools, by the files, do not put before texts."""
        return self.bos_id is not None and self._adds_bos is False

    @property
    def chat_template(self) -> str | None:
        """Its own template in Jinja, or None. It has that of `tool_use` for talks with tools."""
        templates = self._beside.chat_templates
        if not templates.keys() >= {"default", _TOOL_USE}:
            return templates.get("default")
        # Each stands on lines of its own, and loses its last line end, as a template by itself.
        default, with_tools = (
            templates[name].removesuffix("\n").removesuffix("\r") for name in ("default", _TOOL_USE)
        )
        return f"{{% if not tools %}}\n{default}{{%+ else %}}\n{with_tools}{{%+ endif %}}"

    @property
    def other_templates(self) -> tuple[str, ...]:
        """The names of further templates that its files hold, such as `rag`."""
        names = self._beside.chat_templates.keys()
        return tuple(sorted(names - {"default", *([_TOOL_USE] if "default" in names else [])}))

    def _named(self, name: str) -> int | None:
        """The id of a named token, by the files beside the vocabulary or by its own."""
        names, defaults = self._beside.names, self._beside.defaults
        if name in names:
            token = self.added.get(names[name])
            return None if token is None else token.id
        known = self._vocabulary_id(defaults[name]) if name in defaults else None
        return self._own_id(name) if known is None else known

    @functools.cached_property
    def added(self) -> dict[str, Added]:
        """The tokens of their own that have a row in the embedding."""
        aside = self.set_aside
        return {text: token for text, token in self._all_added.items() if text not in aside}

    @functools.cached_property
    def set_aside(self) -> frozenset[str]:
        """The tokens of their own without a row: written anywhere, they are ordinary text."""
        rows = self.rows
        if rows is None:
            return frozenset()
        return frozenset(text for text, token in self._all_added.items() if token.id >= rows)

    @functools.cached_property
    def _all_added(self) -> dict[str, Added]:
        """The tokens of their own: the vocabulary's, and what the files beside it add."""
        found, named = dict(self._own_added), set(self._beside.names.values())
        free = self._own_size
        for token in self._new_tokens:
            index = self._vocabulary_id(token.text) if token.id is None else token.id
            index = free if index is None else index
            free = max(free, index + 1)
            special = token.special or token.text in named
            found[token.text] = Added(index, token.lstrip, token.rstrip, special)
        return found

    @functools.cached_property
    def _new_tokens(self) -> list[special_tokens.SpecialToken]:
        """What the files beside add or describe anew; one that they only name stays as it is."""
        own = self._own_added
        return [t for t in self._beside.added if t.id is not None or t.text not in own]

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        return {token.id: text for text, token in self.added.items()}

    @functools.cached_property
    def _by_id(self) -> dict[int, Added]:
        return {token.id: token for token in self.added.values()}

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern:
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @functools.cached_property
    def _beside(self) -> special_tokens.Beside:
        return special_tokens.read_beside(self.path.parent)

    @functools.cached_property
    def _content(self) -> bytes:
        return self.path.read_bytes()

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all that decides the ids and the text of ids, wherever the files lie."""
        ends = [self.text_of(self.bos_id) or None, self.text_of(self.eos_id) or None]
        spacing = [self._beside.spacing] if self._respaced else []
        beside = [*ends, self._beside.config.get("legacy"), *spacing]
        tokens = sorted(self.added.items())
        return _digest(self._content, json.dumps([beside, tokens, self._new_tokens]))

    def __getstate__(self) -> dict:
        return {"path": self.path, "rows": self.rows}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letters by which vocabularies of the GPT-2 kind write bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


def _digest(content: bytes, beside: str) -> str:
    digest = hashlib.sha256(content)
    digest.update(b"\0" + beside.encode())
    return digest.hexdigest()


def _first_id(*candidates: int | None) -> int:
    return next((c for c in candidates if c is not None), 0)
