"""A base and its banks that score and continue token ids.

Axes: B rows, P prompt slots, T slots of a row.
A few compiled shapes serve every input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import rope
from medmoe_jax.base.config import DecoderConfig, site_shapes
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError
from medmoe_jax.inference.branching import Filled, Packed, Tree, grow, lay, pack, portions
from medmoe_jax.inference.decoding import STRIDE, DecodingRows
from medmoe_jax.inference.forward import Weights
from medmoe_jax.inference.requests import Request, Token
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.inference.scoring import score_batch, tell_batch
from medmoe_jax.parallel.host import to_host
from medmoe_jax.parallel.mesh import put, round_up_rows, row_sharding
from medmoe_jax.ranges import COUNT, Range

_MIN_SLOTS = 16
# Tokens that rows go on at most before somebody looks at them, where nobody waits for single ones.
# Off TPU each call may begin with a copy of the layers' weights, when `run.unroll` cuts them apart.
_LONG_STRIDE = 32


def _slots(length: int) -> int:
    """The bucket of a length: a power of two, or three quarters of one."""
    size = max(_MIN_SLOTS, 1 << (length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 and size > _MIN_SLOTS else size


def _balance(config: DecoderConfig) -> float:
    """Slots of a row with which attention's products cost a token what the linear layers' do."""
    linear = sum(d_in * d_out for d_in, d_out in site_shapes(config).values())
    return linear / (2 * config.n_heads * config.head_dim)


class CompletionScore(NamedTuple):
    """What a model says of a completion.

    Attributes:
      log_prob: summed over its tokens.
      greedy: whether each of its tokens is the likeliest there.
    """

    log_prob: float
    greedy: bool


class Engine:
    """Scores and generates token ids with a base and its banks.

    Attributes:
      truncated: prompts shortened from the left so far, because they did not fit the context.
    """

    def __init__(
        self,
        config: AdaptedConfig,
        base: Params,
        banks: Mapping[str, Any],
        trained: Params,
        mesh: jax.sharding.Mesh,
        batch: int,
    ) -> None:
        """Keep the parameters where they are.

        Args:
          config: decoder and active banks.
          base, banks: their parameters; one base may serve several engines.
          trained: base leaves of this model's own, in the place of those in `base`.
          mesh: where they live.
          batch: rows run at once, rounded up to what the mesh divides.
        """
        self.config = config
        self.base, self.banks, self.trained = base, banks, trained
        self.mesh = mesh
        self.batch = round_up_rows(mesh, batch)
        self.truncated = 0

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        languages: Sequence[int] | None = None,
        done: Callable[[int], object] = lambda prompts: None,
    ) -> list[list[float]]:
        """Summed log-probability of each completion of each prompt; see `scored`."""
        rows = self.scored(prompts, completions, languages, done)
        return [[score.log_prob for score in row] for row in rows]

    def scored(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        languages: Sequence[int] | None = None,
        done: Callable[[int], object] = lambda prompts: None,
    ) -> list[list[CompletionScore]]:
        """The score of each completion of each prompt; the more are given at once, the faster.

        Prompts that are equal are read once.

        Args:
          prompts: ids.
          completions: ids of each prompt's completions, at least one.
          languages: the expert of each prompt's language, for gates that always force it; -1 (or
            None) = unknown.
          done: told after each batch how many prompts it was the last for.

        Raises:
          UserError: a prompt or completion is empty, or a completion does not fit the context.
        """
        if any(not p for p in prompts) or any(not c for cs in completions for c in cs):
            raise UserError("score: every prompt and every completion needs at least one token")
        prompts = self._fit(prompts, [max(map(len, cs)) for cs in completions], unread=1)
        trees, owners = self._trees(prompts, completions, languages)
        out = [[CompletionScore(0.0, False)] * len(cs) for cs in completions]
        left = [len(cs) for cs in completions]
        step = round_up_rows(self.mesh, -(-self.batch // 4))
        sizes = [tree.size for tree in trees]
        for filled in pack(sizes, self.batch, step, _balance(self.config.decoder)):
            finished = 0
            for (tree, n), score in self._run(trees, filled):
                for i, place in owners[tree][n]:
                    out[i][place] = score
                    left[i] -= 1
                    finished += not left[i]
            done(finished)
        return out

    def _trees(self, prompts, completions, languages) -> tuple[list[Tree], list[list[list]]]:
        """Trees, and of each one's completions the prompts, and places there, that ask for it.

        Texts in one tree have the same rotary frequencies.
        """
        limit = rope.switches_at(self.config.decoder)
        asked: dict[tuple, dict[tuple, list[tuple[int, int]]]] = {}
        for i, (prompt, options) in enumerate(zip(prompts, completions, strict=True)):
            language = -1 if languages is None else languages[i]
            for n, ids in enumerate(options):
                beyond = limit is not None and len(prompt) + len(ids) > limit
                same = asked.setdefault((tuple(prompt), language, beyond), {})
                same.setdefault(tuple(ids), []).append((i, n))
        trees, owners = [], []
        for (prompt, language, _), whose in asked.items():
            for some in portions(len(prompt), whose):
                trees.append(grow(prompt, some, language))
                owners.append([whose[tuple(ids)] for ids in some])
        return trees, owners

    def _run(
        self, trees: Sequence[Tree], filled: Filled
    ) -> Iterator[tuple[tuple, CompletionScore]]:
        """Each completion of a batch: `(number of its tree, its own there)` and its score."""
        packed = Packed(*(self._put(array, 0) for array in lay(trees, filled)))
        weights = Weights(self.base, self.banks, self.trained)
        found = score_batch(self.config, weights, packed)
        log_probs_BxT, likeliest_BxT = (to_host(x) for x in found)
        for b, row in enumerate(filled.rows):
            start = 0
            for tree in row:
                for n, count in enumerate(trees[tree].counts):
                    own = np.s_[b, start : start + count]
                    total = log_probs_BxT[own].sum(dtype=np.float64)
                    yield (tree, n), CompletionScore(float(total), bool(likeliest_BxT[own].all()))
                    start += count

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int | Sequence[int]],
        sampling: Sampling = Sampling(),
        languages: Sequence[int] | None = None,
        enough: Callable[[int, list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
        done: Callable[[int, list[int]], object] = lambda prompt, ids: None,
    ) -> list[list[int]]:
        """Continuations of prompts.

        Args:
          prompts: ids.
          max_tokens: at most so many new ones.
          stop_ids: what ends a continuation: an id, which is no part of it, or a list of ids that
            follow each other, which are, as they spell a text that may begin before them.
          sampling: how tokens are drawn.
          languages: as in `scored`.
          enough: asked every few tokens whether a prompt's continuation, which has these ids by
            now, need not go on.
          numbers: of the prompts, where they are some of a whole: each draws as it would there.
            None = 0, 1, 2...
          done: told each continuation as soon as it is whole, in whatever order they end.

        Raises:
          UserError: an empty prompt, or `max_tokens` is below 1 or leaves no room for a prompt.
        """
        COUNT.check_whole("max_tokens", max_tokens)
        if any(not p for p in prompts):
            raise UserError("generate: every prompt needs at least one token")
        prompts = self._fit(prompts, [max_tokens] * len(prompts))
        rows = self.decoding(STRIDE if enough else _LONG_STRIDE, sys.maxsize)
        marks = [stop for stop in stop_ids if isinstance(stop, int)]
        stops = tuple((stop,) if isinstance(stop, int) else tuple(stop) for stop in stop_ids)
        for i, prompt in enumerate(prompts):
            number = i if numbers is None else numbers[i]
            own = dataclasses.replace(sampling, first=sampling.first + number)
            language = -1 if languages is None else languages[i]
            rows.submit(Request(tuple(prompt), max_tokens, stops, own, language))
        out: list[list[int]] = [[] for _ in prompts]
        while said := rows.step():
            for one in said:
                out[one.request].extend(token.id for token in one.tokens)
                if one.ended == "stop" and out[one.request][-1] in marks:
                    out[one.request].pop()
                ended = bool(one.ended)
                if enough and not ended and enough(one.request, out[one.request]):
                    rows.cancel(one.request)
                    ended = True
                if ended:
                    done(one.request, out[one.request])
        return out

    def decoding(self, stride: int = STRIDE, pause: int | None = None) -> DecodingRows:
        """Rows of this model that answer requests side by side, with a cache of their own.

        stride, pause: see `DecodingRows`.
        """
        weights = Weights(self.base, self.banks, self.trained)
        return DecodingRows(self.config, weights, self.batch, stride, pause)

    def told(
        self,
        prompts: Sequence[Sequence[int]],
        alternatives: int = 0,
        languages: Sequence[int] | None = None,
    ) -> list[list[Token]]:
        """Every token of texts with its log-probability after those before it.

        Nothing comes before the first one, which has 0.0 and no alternatives.

        Args:
          prompts: ids.
          alternatives: so many of the most probable tokens in each one's place.
          languages: as in `scored`.

        Raises:
          UserError: an empty text, or one that is longer than the context.
        """
        vocabulary, limit = self.config.decoder.vocab_size, self.config.decoder.max_positions
        Range(0, vocabulary).check("alternatives", alternatives)
        for ids in prompts:
            if not 0 < len(ids) <= limit:
                raise UserError(
                    f"a text of {len(ids)} tokens; it needs at least 1, at most {limit}"
                )
        out: list[list[Token]] = [[] for _ in prompts]
        for rows in self._batches([len(p) for p in prompts]):
            arrays = self._pad([prompts[i] for i in rows])
            drawn = tell_batch(self.config, alternatives, self._weights(rows, languages), *arrays)
            ids, log_probs, others, other_log_probs = (to_host(x) for x in drawn)
            for b, i in enumerate(rows):
                out[i].append(Token(prompts[i][0], 0.0))
                for t in range(ids.shape[1] - len(prompts[i]), ids.shape[1] - 1):
                    pairs = zip(others[b, t].tolist(), other_log_probs[b, t].tolist(), strict=True)
                    out[i].append(Token(int(ids[b, t]), float(log_probs[b, t]), tuple(pairs)))
        return out

    def _weights(self, rows: Sequence[int], languages: Sequence[int] | None) -> Weights:
        """The parameters, and the expert of each row's language in a batch of these rows."""
        language_Bx1 = np.full((self.batch, 1), -1, np.int32)
        if languages is not None:
            language_Bx1[: len(rows), 0] = [languages[i] for i in rows]
        return Weights(self.base, self.banks, self.trained, self._put(language_Bx1, 0))

    def _fit(self, prompts, room, unread: int = 0) -> list[list[int]]:
        """The ends of prompts that fit beside new tokens, the last `unread` of which are only
        predicted: they take no place in the context.
        """
        context = self.config.decoder.max_positions
        limit, out = context + unread, []
        for prompt, needed in zip(prompts, room, strict=True):
            if needed >= limit:
                raise UserError(f"{needed} new tokens do not fit a context of {context}")
            self.truncated += len(prompt) + needed > limit
            out.append(list(prompt[-(limit - needed) :]))
        return out

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row indices in batches of similar length."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]

    def _pad(self, prompts):
        P = _slots(max(1, max(len(p) for p in prompts)))
        tokens, segments, positions = np.zeros((3, self.batch, P), np.int32)
        for b, prompt in enumerate(prompts):
            if prompt:
                tokens[b, -len(prompt) :] = prompt
                segments[b, -len(prompt) :] = 1
                positions[b, -len(prompt) :] = np.arange(len(prompt))
        return [self._put(a, 0) for a in (tokens, segments, positions)]

    def _put(self, array: np.ndarray, batch_axis: int) -> jax.Array:
        return put(array, row_sharding(self.mesh, array.ndim, batch_axis))
