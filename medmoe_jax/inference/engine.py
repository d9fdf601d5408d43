"""Cached scoring and generation on token ids.

Axes: B rows, P prompt slots, C completion slots, N completions a prompt, S cache slots.
Prompts are padded on the left, completions on the right; padding is segment 0, which no other
token sees. Rows are bucketed by length, so a few compiled shapes serve every input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, rope
from medmoe_jax.base.cache import new_cache
from medmoe_jax.base.loss import logits, token_log_probs
from medmoe_jax.base.seam import Context, Params
from medmoe_jax.errors import UserError
from medmoe_jax.inference.sampling import Sampling
from medmoe_jax.parallel.host import to_host
from medmoe_jax.parallel.mesh import put, round_up_rows, row_sharding
from medmoe_jax.ranges import COUNT

_MIN_SLOTS = 16


class Weights(NamedTuple):
    """What a batch of rows is run with.

    Attributes:
      base, banks: parameters of the decoder and of its banks.
      trained: base leaves that take the place of those in `base`.
      language_ids_Bx1: int32, the expert of each row's language, or -1 where it is unknown.
    """

    base: Any
    banks: Any
    trained: Any
    language_ids_Bx1: jax.Array


def _slots(length: int) -> int:
    """The bucket of a length: a power of two, or three quarters of one."""
    size = max(_MIN_SLOTS, 1 << (length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 and size > _MIN_SLOTS else size


def _run(config: AdaptedConfig, weights: Weights, tokens, segments, positions, cache):
    language_ids_BxT = jnp.where(segments > 0, weights.language_ids_Bx1, -1)
    x, cache, _ = adapted.hidden(
        config,
        weights.base,
        weights.banks,
        tokens,
        segments,
        positions,
        trained=weights.trained,
        context=Context(language_ids_BxT=language_ids_BxT),
        cache=cache,
    )
    return decoder.head(weights.base, weights.trained), x, cache


@functools.partial(jax.jit, static_argnums=0)
def score_batch(
    config: AdaptedConfig,
    weights: Weights,
    prompts: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    given: jax.Array,
    targets: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Log-probabilities of N completions a prompt, the prompt being read once.

    Args:
      config: static.
      weights: parameters and languages.
      prompts, segments, positions: `[B, P]` int32, prompts without their last token, padded on
        the left; segment 0 is padding.
      given, targets: `[N, B, C]`, inputs (from the last prompt token on) and what they predict.
      lengths: `[N, B]` tokens of each completion.

    Returns:
      `[N, B]` float32 sums.
    """
    B, P = prompts.shape
    C = given.shape[-1]
    start_Bx1 = jnp.sum(segments, axis=1, keepdims=True)
    whole_B = start_Bx1[:, 0] + 1 + jnp.max(lengths, axis=0)
    cache = new_cache(config.decoder, B, P + C, config.execution.dtype, whole_B)
    _, _, cache = _run(config, weights, prompts, segments, positions, cache)
    offsets_1xC = jnp.arange(C, dtype=jnp.int32)[None]

    def one(_, completion):
        given_BxC, targets_BxC, lengths_B = completion
        live_BxC = (offsets_1xC < lengths_B[:, None]).astype(jnp.int32)
        positions_BxC = (start_Bx1 + offsets_1xC) * live_BxC
        head, x, _ = _run(config, weights, given_BxC, live_BxC, positions_BxC, cache)
        log_probs_BxC = token_log_probs(config.decoder, head, x, targets_BxC, config.execution)
        return None, jnp.sum(log_probs_BxC * live_BxC, axis=1)

    return jax.lax.scan(one, None, (given, targets, lengths))[1]


def _pick(temperature: float, top_p: float, z_BxV, keys_B, step):
    if not temperature:
        return jnp.argmax(z_BxV, axis=-1).astype(jnp.int32)
    z_BxV = z_BxV / temperature
    if top_p < 1.0:
        sorted_BxV = jnp.sort(z_BxV, axis=-1)[:, ::-1]
        before_BxV = jnp.cumsum(jax.nn.softmax(sorted_BxV, -1), -1) - jax.nn.softmax(sorted_BxV, -1)
        kept_B = jnp.sum(before_BxV < top_p, axis=-1)
        floor_Bx1 = jnp.take_along_axis(sorted_BxV, kept_B[:, None] - 1, axis=-1)
        z_BxV = jnp.where(z_BxV < floor_Bx1, -jnp.inf, z_BxV)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(keys_B, z_BxV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def generate_batch(
    config: AdaptedConfig,
    temperature: float,
    top_p: float,
    stops: tuple[tuple[int, ...], ...],
    max_tokens: int,
    weights: Weights,
    prompts: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    keys_Bx2: jax.Array,
) -> jax.Array:
    """Continue every prompt until one of the `stops` or `max_tokens`.

    Args:
      config, temperature, top_p, stops, max_tokens: static; a stop is a tuple of ids that follow
        each other.
      weights: parameters and languages.
      prompts, segments, positions: `[B, P]` int32, prompts padded on the left; segment 0 is
        padding.
      keys_Bx2: uint32, the data of each prompt's own key, whatever batch it is in.

    Returns:
      ids `[B, max_tokens]`, filled up with the last id of the first stop.
    """
    B, P = prompts.shape
    before = max(len(stop) for stop in stops) - 1
    filler = stops[0][-1]
    next_position_B = jnp.sum(segments, axis=1)
    slots, whole_B = P + max_tokens, next_position_B + max_tokens
    cache = new_cache(config.decoder, B, slots, config.execution.dtype, whole_B)
    head, x, cache = _run(config, weights, prompts, segments, positions, cache)
    keys_B = jax.random.wrap_key_data(keys_Bx2)
    pick = functools.partial(_pick, temperature, top_p)
    first_B = pick(logits(config.decoder, head, x[:, -1:])[:, 0], keys_B, 0)
    # Slots before the first one let a stop be looked for at every step; no id is -1.
    ids = jnp.full((before + max_tokens, B), filler, jnp.int32).at[:before].set(-1)
    done_B = jnp.sum(segments, axis=1) == 0

    def more(carry):
        step, _, _, done_B, _, _ = carry
        return (step < max_tokens) & ~jnp.all(done_B)

    def advance(carry):
        step, token_B, ids, done_B, position_B, cache = carry
        token_B = jnp.where(done_B, filler, token_B)
        ids = ids.at[before + step].set(token_B)
        latest_KxB = jax.lax.dynamic_slice_in_dim(ids, step, before + 1)
        for stop in stops:
            stop_Kx1 = jnp.asarray(stop, jnp.int32)[:, None]
            done_B |= jnp.all(latest_KxB[-len(stop) :] == stop_Kx1, axis=0)
        one_Bx1 = jnp.ones((B, 1), jnp.int32)
        head, x, cache = _run(
            config, weights, token_B[:, None], one_Bx1, position_B[:, None], cache
        )
        z_BxV = logits(config.decoder, head, x)[:, 0]
        token_B = pick(z_BxV, keys_B, step + 1)
        return step + 1, token_B, ids, done_B, position_B + 1, cache

    start = (jnp.int32(0), first_B, ids, done_B, next_position_B, cache)
    return jnp.swapaxes(jax.lax.while_loop(more, advance, start)[2][before:], 0, 1)


def _before_stop(ids: list[int], stops: Sequence[tuple[int, ...]]) -> list[int]:
    """The ids up to the first stop that is complete."""
    for end in range(1, len(ids) + 1):
        for stop in stops:
            if tuple(ids[max(0, end - len(stop)) : end]) == stop:
                return ids[: end - len(stop)]
    return ids


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
    ) -> list[list[float]]:
        """Summed log-probability of each completion of each prompt.

        Args:
          prompts: ids.
          completions: ids of each prompt's completions.
          languages: the expert of each prompt's language, for gates that always force it; -1 (or
            None) = unknown.

        Raises:
          UserError: a prompt or completion is empty, or a completion does not fit the context.
        """
        if any(not p for p in prompts) or any(not c for cs in completions for c in cs):
            raise UserError("score: every prompt and every completion needs at least one token")
        prompts = self._fit(prompts, [max(map(len, cs)) for cs in completions])
        out = [[0.0] * len(cs) for cs in completions]
        texts = [
            (i, same)
            for i, cs in enumerate(completions)
            for same in self._alike(len(prompts[i]), [len(c) for c in cs])
        ]
        longest = [len(prompts[i]) + max(len(completions[i][n]) for n in same) for i, same in texts]
        for rows in self._batches(longest):
            items = [texts[row] for row in rows]
            weights = self._weights([i for i, _ in items], languages)
            options = [[completions[i][n] for n in same] for i, same in items]
            sums = self._score_rows(weights, [prompts[i] for i, _ in items], options)
            for column, (i, same) in enumerate(items):
                for n, s in zip(same, sums[:, column], strict=False):
                    out[i][n] = float(s)
        return out

    def _alike(self, prompt: int, completions: Sequence[int]) -> list[list[int]]:
        """Completions whose texts have the same rotary frequencies, so that they share a prompt.

        Args:
          prompt, completions: their lengths.
        """
        limit = rope.switches_at(self.config.decoder)
        beyond = [limit is not None and prompt + length > limit for length in completions]
        groups = ([n for n, one in enumerate(beyond) if one == side] for side in (False, True))
        return [group for group in groups if group]

    def _score_rows(self, weights: Weights, prompts, completions) -> np.ndarray:
        B = self.batch
        N = max(len(cs) for cs in completions)
        C = max(4, 1 << (max(len(c) for cs in completions for c in cs) - 1).bit_length())
        given, targets = np.zeros((2, N, B, C), np.int32)
        lengths = np.zeros((N, B), np.int32)
        for b, (prompt, options) in enumerate(zip(prompts, completions, strict=True)):
            for n, ids in enumerate(options):
                lengths[n, b] = len(ids)
                targets[n, b, : len(ids)] = ids
                given[n, b, : len(ids)] = [prompt[-1], *ids[:-1]]
        prompt_arrays = self._pad([p[:-1] for p in prompts])
        arrays = [self._put(a, 1) for a in (given, targets, lengths)]
        return to_host(score_batch(self.config, weights, *prompt_arrays, *arrays))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int | Sequence[int]],
        sampling: Sampling = Sampling(),
        languages: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continuations, without what stopped them.

        Args:
          prompts: ids.
          max_tokens: at most so many new ones.
          stop_ids: what ends a continuation: an id, or ids that follow each other.
          sampling: how tokens are drawn.
          languages: as in `score`.

        Raises:
          UserError: an empty prompt, or `max_tokens` is below 1 or leaves no room for a prompt.
        """
        COUNT.check("max_tokens", max_tokens)
        if any(not p for p in prompts):
            raise UserError("generate: every prompt needs at least one token")
        prompts = self._fit(prompts, [max_tokens] * len(prompts))
        out: list[list[int]] = [[] for _ in prompts]
        stops = tuple((stop,) if isinstance(stop, int) else tuple(stop) for stop in stop_ids)
        for rows in self._batches([len(p) for p in prompts]):
            arrays = self._pad([prompts[i] for i in rows])
            keys_Bx2 = self._put(sampling.keys(np.resize(rows, self.batch)), 0)
            weights = self._weights(rows, languages)
            law = (sampling.temperature, sampling.top_p)
            ids = generate_batch(self.config, *law, stops, max_tokens, weights, *arrays, keys_Bx2)
            for i, row in zip(rows, to_host(ids), strict=False):
                out[i] = _before_stop(row.tolist(), stops)
        return out

    def _weights(self, rows: Sequence[int], languages: Sequence[int] | None) -> Weights:
        """The parameters, and the expert of each row's language in a batch of these rows."""
        language_Bx1 = np.full((self.batch, 1), -1, np.int32)
        if languages is not None:
            language_Bx1[: len(rows), 0] = [languages[i] for i in rows]
        return Weights(self.base, self.banks, self.trained, self._put(language_Bx1, 0))

    def _fit(self, prompts, room) -> list[list[int]]:
        limit = self.config.decoder.max_positions
        out = []
        for prompt, needed in zip(prompts, room, strict=True):
            if needed >= limit:
                raise UserError(f"{needed} new tokens do not fit a context of {limit}")
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
