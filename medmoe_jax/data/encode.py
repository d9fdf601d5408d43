"""From a conversation row to ids with their loss mask.

Axis legend: N tokens of one row.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medmoe_jax.data.conversation import Conversation, Turn
from medmoe_jax.data.pieces import FRAME_MASKS, Piece, Template, get_mask
from medmoe_jax.data.templates import markers, stops
from medmoe_jax.data.tokens import CUT, START, Part, Tokenizer
from medmoe_jax.errors import ParameterError


class Encoded(NamedTuple):
    """One training row.

    Attributes:
      tokens: int32 [N].
      loss_mask: int32 [N]: 1 where this token is a target. The first token never is.
      language_id: of its language, -1 = unknown.
      truncated: whether it was cut.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    language_id: int
    truncated: bool = False

    def cut(self, length: int) -> Encoded:
        """The row, cut on the right at `length` tokens."""
        if len(self.tokens) <= length:
            return self
        return Encoded(self.tokens[:length], self.loss_mask[:length], self.language_id, True)


class Frame(NamedTuple):
    """What a template writes around what a model says, as it reads when it is decoded.

    Attributes:
      lead: between the prompt and the text of a plain answer.
      before, after: around the reasoning before an answer, without white space; `after` is empty
        where there is no place for it, and `before` where the prompt ends with it.
    """

    lead: str = ""
    before: str = ""
    after: str = ""


class PieceRun(NamedTuple):
    """Pieces that are encoded together.

    Attributes:
      pieces: what it stands for.
      ids: of its text.
      target: whether the model learns to say it.
    """

    pieces: list[Piece]
    ids: list[int]
    target: bool


class Encoder:
    """Encodes rows for one tokenizer, template and mask.

    `languages` maps a row's language to an id for `language_ids`; other languages get -1.

    Attributes:
      stops: what ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        mask: str = "completion",
        languages: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.languages = languages
        self._is_target = get_mask(mask)
        if mask in FRAME_MASKS and not template.frames:
            raise ParameterError(
                f"mask: {mask!r} asks for the frames of all turns, which are known of built-in "
                "templates only; use another mask or template"
            )
        self.stops = stops(template, tokenizer)
        self._markers = {
            said: _any_of(markers(template, tokenizer, said)) for said in (False, True)
        }

    def __call__(self, row: Conversation) -> Encoded:
        """The training row that holds the whole conversation: the last of `rows`."""
        return self.rows(row)[-1]

    def rows(self, row: Conversation) -> list[Encoded]:
        """The training rows of a conversation: one, or more where its answers need rows apart."""
        language_id = (self.languages or {}).get(row["language"], -1)
        return [_encoded(runs, language_id) for runs in self.runs(row)]

    def prompt(self, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> list[int]:
        """The ids that the model reads before it answers: a prefix of the answer's training row."""
        runs = self._runs(self.template.prompt(turns, tools))
        return [token for run in runs for token in run.ids]

    def answered(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """The ids of a conversation up to the text of its last answer, and up to that text's end.

        The second begin with the first, unless a token reaches over where the text begins.
        """
        pieces = self.template.rows(turns)[-1]
        at = max(i for i, piece in enumerate(pieces) if piece.said and piece.part == "content")
        before, with_text = (
            [token for run in self._runs(some) for token in run.ids]
            for some in (pieces[:at], pieces[: at + 1])
        )
        return before, with_text

    @functools.cached_property
    def frame(self) -> Frame:
        """What the template writes around what a model says."""
        before, after = (self._shown([piece]).strip() for piece in self.template.thought())
        return Frame(self._shown(self.template.lead()), before, after)

    def _shown(self, pieces: Sequence[Piece]) -> str:
        """How pieces read when their ids are decoded."""
        return self.tokenizer.decode([token for run in self._runs(pieces) for token in run.ids])

    def runs(self, row: Conversation) -> list[list[PieceRun]]:
        """The training rows of a conversation as the runs that they are encoded in."""
        rows = self.template.rows(row["conversations"], row.get("tools", ()))
        return [list(self._runs(pieces)) for pieces in rows]

    def _runs(self, pieces: Sequence[Piece]) -> Iterator[PieceRun]:
        start, strip = True, False
        for run in self._parted(pieces):
            ids = self.tokenizer.encode_parts(self._parts(run), start, strip)
            start = run[-1].kind == "bos" or self.tokenizer.begins_after(ids, start)
            strip = self.tokenizer.strips_after(ids, strip)
            yield PieceRun(run, ids, self._is_target(run[0]))

    def _parted(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """The pieces in runs. No token reaches over a run's end.

        So a prompt's ids are those of the row, whatever the answer; and what ends an answer in
        plain text has the same ids after every answer.
        """
        run: list[Piece] = []
        for piece in pieces:
            if run and self._parts_ways(run[-1], piece):
                yield run
                run = []
            run.append(piece)
        if run:
            yield run

    def _parts_ways(self, left: Piece, right: Piece) -> bool:
        if left.said != right.said or self._is_target(left) != self._is_target(right):
            return True
        if not right.said or left.part == right.part:
            return False
        return left.part == "reasoning" or (right.part == "close" and bool(self.stops.texts))

    def _parts(self, run: Sequence[Piece]) -> Iterator[Part]:
        """A run as text and tokens. Markup that stands side by side is read as one text."""
        for kind, same in itertools.groupby(run, lambda piece: piece.kind):
            text = "".join(piece.text for piece in same)
            if kind == "text":
                yield from _guarded(text, self._markers[run[0].said])
            elif kind == "markup":
                yield from self.tokenizer.parts(text)
            else:
                own = self.tokenizer.bos_id if kind == "bos" else self.tokenizer.eos_id
                yield from () if own is None else (self.tokenizer.token(own),)
                yield from (START,) if kind == "bos" else ()


def _any_of(texts: Collection[str]) -> re.Pattern:
    """What finds any of some texts, the longest first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _guarded(text: str, marker: re.Pattern) -> Iterator[Part]:
    """People's text. A marker in it is cut in two, so it cannot end or open a turn."""
    at = 0
    for found in marker.finditer(text):
        cut = found.start() + 1
        yield from (text[at:cut], CUT)
        at = cut
    yield text[at:]


def _encoded(runs: Sequence[PieceRun], language_id: int) -> Encoded:
    tokens = np.asarray([token for run in runs for token in run.ids], np.int32)
    sizes = [len(run.ids) for run in runs]
    loss_mask = np.repeat(np.asarray([run.target for run in runs], np.int32), sizes)
    loss_mask[:1] = 0
    return Encoded(tokens, loss_mask, language_id)
