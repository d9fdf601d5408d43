"""Requests that are answered side by side in the rows of one batch.

Axes: B rows, R rows of one call, T tokens, S slots of a row.
A row that ends is free for the next request at once, whatever the others are at. Prompts are read
in chunks of a few lengths, and slots a row grow by doubling, so that few programs are compiled; the
programs are those of `inference.steps`. What a prompt has in common with a text that still stands
in some row is copied, not read again. Rows that speak do not wait for the whole of a long prompt:
it is read in parts, between which they go on.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import rope
from medmoe_jax.errors import UserError
from medmoe_jax.inference import steps
from medmoe_jax.inference.apart import layers_apart
from medmoe_jax.inference.drawing import Drawn, law
from medmoe_jax.inference.forward import Weights
from medmoe_jax.inference.memory import check_room
from medmoe_jax.inference.prefixes import common
from medmoe_jax.inference.requests import Request, Said, Token
from medmoe_jax.parallel.host import to_host
from medmoe_jax.ranges import COUNT, Range

STRIDE = 8  # tokens that rows go on at most before somebody looks at them
_CHUNK = 512  # tokens of a prompt that are read at once
_LEAST_CHUNK, _LEAST_SLOTS, _LEAST_ENDS = 16, 64, 4
_WORTH = 32  # tokens that must be alike before they are copied; for fewer it does not pay
_PAUSE = 64  # tokens of prompts a row that are read while rows that speak wait

_NOBODY = Request((0,), 1)
_NO_KEY = np.zeros(2, np.uint32)


@dataclass
class _Row:
    """A row, and the text that stands in it, which stays when the request has ended.

    Attributes:
      number: of the request that is answered here; -1 = none is.
      request: that, or the last one.
      key: data of its stream of random numbers.
      ids: its prompt and the answer so far.
      kept: how many of them stand in the row's slots.
    """

    number: int = -1
    request: Request = _NOBODY
    key: np.ndarray = field(default_factory=lambda: _NO_KEY)
    ids: list[int] = field(default_factory=list)
    kept: int = 0

    @property
    def drawn(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens of the whole text in the end."""
        return len(self.request.prompt) + self.request.max_tokens

    def ended(self) -> str:
        """`Said.ended` after the last token."""
        stops = (stop for stop in self.request.stops if len(stop) <= self.drawn)
        if any(tuple(self.ids[-len(stop) :]) == stop for stop in stops):
            return "stop"
        return "length" if self.drawn == self.request.max_tokens else ""


class _Start(NamedTuple):
    """The first `shared` tokens of a row's text stand in the row `source`."""

    source: int
    shared: int


class _Answers(NamedTuple):
    """New tokens, and what ended, by the request's number."""

    tokens: dict[int, list[Token]]
    ended: dict[int, str]


def _power(n: int, least: int) -> int:
    """The least power of two that is at least `n` and `least`, which is one."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def _floor(n: int, least: int) -> int:
    """The greatest power of two that is at most `n`, or `least`."""
    return max(least, 1 << max(n.bit_length() - 1, 0))


class DecodingRows:
    """Rows of a batch in which requests are answered; fulfils `requests.Decoding`.

    Attributes:
      rows: how many there are.
      slots: tokens that each of them has room for now.
    """

    def __init__(
        self,
        config: AdaptedConfig,
        weights: Weights,
        rows: int,
        stride: int = STRIDE,
        pause: int | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
          config: decoder and active banks.
          weights: their parameters, where they live; languages come with the requests.
          rows: as many as the mesh divides.
          stride: tokens that rows go on at most in a step.
          pause: tokens that are read, about, while rows that speak wait; None = as many as befit
            the rows.
        """
        self.config, self.weights, self.rows, self.stride = config, weights, rows, stride
        self.pause = max(_CHUNK, _PAUSE * rows) if pause is None else pause
        self.slots = 0
        self._one_by_one = layers_apart(config, weights)
        self._state: steps.State | None = None
        self._rows = [_Row() for _ in range(rows)]
        self._free = collections.deque(range(rows))  # the one that was free longest stands first
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._unread: dict[int, _Start] = {}  # rows whose prompt is not read to its end, by turn
        self._spent = 0  # tokens that were read while rows that speak waited
        self._numbers = 0

    def submit(self, request: Request) -> int:
        """See `Decoding`."""
        COUNT.check_whole("max_tokens", request.max_tokens)
        Range(0, self.config.decoder.vocab_size).check("alternatives", request.alternatives)
        prompt, limit = len(request.prompt), self.config.decoder.max_positions
        if not prompt:
            raise UserError("every prompt needs at least one token")
        if any(not stop for stop in request.stops):
            raise UserError("stops: every one needs at least one token")
        if prompt + request.max_tokens > limit:
            raise UserError(
                f"a prompt of {prompt} tokens and {request.max_tokens} new tokens do not fit a "
                f"context of {limit}"
            )
        slots = _power(prompt + request.max_tokens, _LEAST_SLOTS)
        check_room(self.config, self.rows, slots)
        self._waiting.append((self._numbers, request))
        self._numbers += 1
        return self._numbers - 1

    def cancel(self, request: int) -> None:
        """See `Decoding`."""
        self._waiting = collections.deque(one for one in self._waiting if one[0] != request)
        for place, row in enumerate(self._rows):
            if row.number == request:
                self._leave(place)

    def step(self) -> list[Said]:
        """See `Decoding`."""
        said = _Answers({}, {})
        self._read(said)
        # First tokens are told at once. Others may come meanwhile, to be read before all go on.
        if self._speaking() and not said.tokens:
            self._go_on(said)
            self._spent = 0
        return [Said(n, tuple(tokens), said.ended.get(n, "")) for n, tokens in said.tokens.items()]

    def _live(self) -> list[int]:
        return [place for place, row in enumerate(self._rows) if row.number >= 0]

    def _speaking(self) -> list[int]:
        """Rows whose next tokens somebody waits for."""
        return [place for place in self._live() if place not in self._unread]

    def _leave(self, place: int) -> None:
        """Free a row; its text stays until another one needs the place."""
        row = self._rows[place]
        row.number = -1
        row.kept = min(row.kept, self.slots - 1)
        self._unread.pop(place, None)
        self._free.append(place)

    def _admit(self) -> None:
        """Requests that wait take rows, and it is noted where each one's beginning comes from.

        Of those whose prompts begin alike, and as no text here does, one goes first.
        """
        later: list[tuple[int, Request]] = []
        while self._waiting and (free := self._vacant()):
            number, request = self._waiting.popleft()
            source, shared = self._source(request, range(self.rows), written=True)
            if self._source(request, self._unread, written=False)[1] >= shared + _WORTH:
                later.append((number, request))
                continue
            place = source if source in free else free[0]
            self._free.remove(place)
            self._unread[place] = _Start(source, shared) if shared else _Start(place, 0)
            key = request.sampling.keys([0])[0]
            # What is copied from another row stands here after the copy only.
            kept = shared if place == source else 0
            self._rows[place] = _Row(number, request, key, list(request.prompt), kept)
        self._waiting.extendleft(reversed(later))

    def _vacant(self) -> list[int]:
        """Free rows in whose text nothing stands that another row is still to copy."""
        sources = {start.source for start in self._unread.values()}
        return [place for place in self._free if place not in sources]

    def _source(self, request: Request, places: Collection[int], written: bool) -> tuple[int, int]:
        """The row whose text begins most like a prompt, and how many tokens are alike.

        Args:
          request: its last token is read in any case, as the answer comes from there.
          places: the rows to look at.
          written: only what stands in the rows' slots counts.

        Returns:
          `(-1, 0)` where it does not pay to copy.
        """
        best = (-1, 0)
        if len(request.prompt) <= _WORTH:
            return best
        prompt = list(request.prompt[:-1])
        for place in places:
            row = self._rows[place]
            if self._apart(request, row.request):
                continue
            alike = common(prompt, row.ids)
            alike = min(alike, row.kept) if written else alike
            if alike >= max(_WORTH, best[1] + 1):
                best = (place, alike)
        return best

    def _apart(self, one: Request, other: Request) -> bool:
        """Whether two texts have other keys and values even where their tokens are the same."""
        limit = rope.switches_at(self.config.decoder)
        beyond = [limit is not None and len(r.prompt) + r.max_tokens > limit for r in (one, other)]
        return one.language != other.language or beyond[0] != beyond[1]

    def _read(self, said: _Answers) -> None:
        """Read prompts chunk by chunk, in turns, and draw their first tokens.

        All are read to their end, but where rows speak no more than `pause`.
        """
        shards = self.config.execution.row_shards
        self._admit()
        while self._unread and self._spent < self.pause:
            many = len(self._unread) > max(shards, self.rows // 4)
            size = self.rows if many else shards
            listened = bool(self._speaking())
            most = _floor(self.pause // size, _LEAST_CHUNK) if listened else _CHUNK
            length = self._read_chunk(list(self._unread)[:size], size, min(most, _CHUNK), said)
            self._spent += size * length if listened else 0
            self._admit()

    def _read_chunk(self, places: Sequence[int], size: int, most: int, said: _Answers) -> int:
        """Read the next tokens of some rows, `most` at most, in a call of `size` rows.

        Returns:
          the length of the call.
        """
        rows = [self._rows[place] for place in places]
        starts = [self._unread[place] for place in places]
        chunks = [
            row.ids[start.shared : start.shared + most]
            for row, start in zip(rows, starts, strict=True)
        ]
        T = _power(max(map(len, chunks)), _LEAST_CHUNK)
        self._make_room(max(start.shared for start in starts) + T)
        written = [start.shared for start in starts]
        now = self._now(rows, chunks, written, size, T)
        rows_R, sources_R = np.full(size, self.rows, np.int32), np.zeros(size, np.int32)
        rows_R[: len(places)] = places
        sources_R[: len(places)] = [start.source for start in starts]
        state, self._state = self._state, None
        self._state, drawn = steps.read(
            self.config, self._alternatives(rows), self.weights, state, now, rows_R, sources_R
        )
        drawn = jax.tree.map(to_host, drawn)
        for r, place in enumerate(places):
            row, start = self._rows[place], self._unread.pop(place)
            row.kept = start.shared + len(chunks[r])
            if row.kept < len(row.ids):
                self._unread[place] = _Start(place, row.kept)  # behind the others
            else:
                self._take(place, drawn, (r,), said)
        return T

    def _go_on(self, said: _Answers) -> None:
        """Rows that speak go on by some tokens; those of rows that end before are thrown away."""
        live = self._speaking()
        rows = [self._rows[place] for place in live]
        left = [row.request.max_tokens - row.drawn for row in rows]
        # A row that goes on beyond its end writes into its last slot, of which nothing is kept.
        self._make_room(
            max(row.kept + min(self.stride, n) for row, n in zip(rows, left, strict=True))
        )
        speak = set(live)
        last = [row.ids[-1:] if p in speak else [] for p, row in enumerate(self._rows)]
        now = self._now(self._rows, last, [row.kept for row in self._rows], self.rows, 1)
        state, self._state = self._state, None
        self._state, drawn, count = steps.go_on(
            self.config,
            self.stride,
            self._alternatives(rows),
            self._one_by_one,
            state,
            now,
            self._until(live),
        )
        drawn = jax.tree.map(to_host, drawn)
        for n in range(int(to_host(count))):
            for place in live:
                if self._rows[place].number >= 0:
                    self._take(place, drawn, (n, place), said)

    def _until(self, live: Sequence[int]) -> steps.Until:
        """When the rows have to be looked at: see `steps.Until`.

        The more rows are still to be read, the sooner: a step costs the same for few and for many.
        """
        most = -(-self.stride * len(live) // (len(live) + len(self._unread)))
        left = [min(most, row.request.max_tokens - row.drawn) for row in self._rows]
        left_R = np.array(left, np.int32)
        ends = [{stop[-1] for stop in row.request.stops} for row in self._rows]
        ends_RxE = np.full((self.rows, _power(max(map(len, ends)), _LEAST_ENDS)), -1, np.int32)
        for row, own in zip(ends_RxE, ends, strict=True):
            row[: len(own)] = sorted(own)
        return steps.Until(left_R, ends_RxE, np.array(bool(self._waiting or self._unread)))

    def _now(
        self,
        rows: Sequence[_Row],
        tokens: Sequence[Sequence[int]],
        written: Sequence[int],
        size: int,
        length: int,
    ) -> steps.Now:
        """What rows are at, filled up to `size` rows and `length` tokens a row."""
        fillers = [_Row()] * (size - len(rows))
        all_rows = [*rows, *fillers]
        tokens_RxT = np.zeros((size, length), np.int32)
        for r, ids in enumerate(tokens):
            tokens_RxT[r, : len(ids)] = ids

        def integers(values: Iterable[int]) -> np.ndarray:
            values = list(values)
            return np.array(values + [0] * (size - len(values)), np.int32)

        live = [row.request if row.number >= 0 else _NOBODY for row in all_rows]
        return steps.Now(
            tokens_RxT,
            integers(map(len, tokens)),
            integers(written),
            integers(row.length for row in all_rows),
            integers(row.request.language for row in all_rows),
            integers(row.drawn for row in all_rows),
            law([request.sampling for request in live], [row.key for row in all_rows]),
        )

    def _take(self, place: int, drawn: Drawn, at: tuple[int, ...], said: _Answers) -> None:
        """Add a token that was drawn to a row's answer, and see whether it ends there."""
        row = self._rows[place]
        of = min(row.request.alternatives, drawn.others_RxA.shape[-1])
        others = zip(
            drawn.others_RxA[at][:of].tolist(),
            drawn.other_log_probs_RxA[at][:of].tolist(),
            strict=True,
        )
        token = Token(int(drawn.ids_R[at]), float(drawn.log_probs_R[at]), tuple(others))
        row.ids.append(token.id)
        row.kept = len(row.ids) - 1
        said.tokens.setdefault(row.number, []).append(token)
        how = row.ended()
        if how:
            said.ended[row.number] = how
            self._leave(place)

    def _make_room(self, needed: int) -> None:
        """Slots for texts of `needed` tokens; far too many are given back."""
        # What stands idle writes behind what is kept of it.
        kept = [self._rows[place].kept for place in self._live()]
        kept += [start.shared for start in self._unread.values()]
        needed = max([needed, *(tokens + 1 for tokens in kept)])
        slots = _power(needed, _LEAST_SLOTS)
        if self._state is None:
            self._state = steps.new_state(self.config, self.rows, slots)
        elif self.slots < slots or self.slots >= 4 * slots:
            leaves = self._state._asdict()
            self._state = None
            for name in leaves:  # one by one, so that never both states are there whole
                leaves[name] = steps.resized(self.config, slots, leaves[name])
            self._state = steps.State(**leaves)
            for row in self._rows:
                row.kept = min(row.kept, slots - 1)
        else:
            return
        self.slots = slots

    def _alternatives(self, rows: Sequence[_Row]) -> int:
        """The number of alternatives to ask for: few different ones, as each is compiled."""
        most = max(row.request.alternatives for row in rows)
        return min(_power(most, 1), self.config.decoder.vocab_size) if most else 0
