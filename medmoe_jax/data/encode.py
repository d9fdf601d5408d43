"""From a conversation row to ids with their loss mask.

Axis legend: N tokens of one row.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medmoe_jax.data.templates import Piece, Template, get_mask, markers
from medmoe_jax.data.tokenizers import Tokenizer


class Encoded(NamedTuple):
    """One encoded row. `codes` int32 [N] holds `id * 2 + is_target`."""

    codes: np.ndarray
    truncated: bool
    language_id: int

    @property
    def tokens(self) -> np.ndarray:
        """int32 [N]."""
        return self.codes >> 1

    @property
    def loss_mask(self) -> np.ndarray:
        """int32 [N]: 1 where this token is a target. The first token never is."""
        return self.codes & 1


class Encoder:
    """Encodes rows for one tokenizer, template and mask, cut on the right at `length` tokens.

    `languages` maps a row's language to an id for `language_ids`; other languages get -1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        mask: str = "completion",
        length: int | None = None,
        languages: Mapping[str, int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.length = length
        self.languages = languages
        self._is_target = get_mask(mask)
        guarded = sorted(markers(template, tokenizer), key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, guarded)) or "(?!)")
        self._markup: dict[tuple[str, bool], list[int]] = {}

    def __call__(self, row: dict) -> Encoded:
        """Encodes a conversation row."""
        codes: list[int] = []
        for piece, ids in self._pieces(self.template.render(row["conversations"])):
            target = int(self._is_target(piece))
            codes += [token * 2 + target for token in ids]
        truncated = self.length is not None and len(codes) > self.length
        codes = np.asarray(codes[: self.length], np.int32)
        codes[:1] &= ~1
        language_id = (self.languages or {}).get(row["language"], -1)
        return Encoded(codes, truncated, language_id)

    def prompt(self, turns: Sequence[dict]) -> list[int]:
        """The ids up to where the answer starts: a prefix of the same conversation's ids."""
        pieces = self.template.render(turns, add_generation_prompt=True)
        return [token for _, ids in self._pieces(pieces) for token in ids]

    def pieces(self, turns: Sequence[dict]) -> list[tuple[Piece, list[int], bool]]:
        """Each piece of a conversation with its ids and whether they are targets."""
        rendered = self.template.render(turns)
        return [(p, ids, self._is_target(p)) for p, ids in self._pieces(rendered)]

    def _pieces(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        start, strip = True, False
        for piece in pieces:
            ids = self._ids(piece._replace(text=piece.text.lstrip()) if strip else piece, start)
            start = piece.kind == "bos" or self.tokenizer.begins_after(ids, start)
            strip = self.tokenizer.strips_after(ids, strip)
            yield piece, ids

    def _ids(self, piece: Piece, start: bool) -> list[int]:
        if piece.kind == "text":
            return self._content(piece.text, start)
        if piece.kind == "markup":
            key = (piece.text, start)
            if key not in self._markup:
                self._markup[key] = self.tokenizer.encode_markup(*key)
            return self._markup[key]
        own = self.tokenizer.bos_id if piece.kind == "bos" else self.tokenizer.eos_id
        return [] if own is None else [own]

    def _content(self, text: str, start: bool) -> list[int]:
        """Encodes people's text. A marker in it is cut in two, so it cannot end or open a turn."""
        ids: list[int] = []
        at = 0
        for found in self._marker.finditer(text):
            cut = found.start() + 1
            ids += self.tokenizer.encode(text[at:cut], start and not ids)
            at = cut
        return ids + self.tokenizer.encode(text[at:], start and not ids)
