"""The compiled programs of decoding: rows read tokens, rows go on by some tokens.

Axes: B rows of the state, R rows given, T tokens, S slots, L layers, F width of all key/value
heads, E ends, A alternatives.
A row's text lies in the slots from 0 on, a token at its position. What a row is at comes along with
every call and is data, so that rows of all lengths and wishes share a program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.cache import Cache, CacheSlots, append
from medmoe_jax.base.loss import logits
from medmoe_jax.inference.drawing import Drawn, Law, pick, told
from medmoe_jax.inference.forward import Weights, forward

_FEW = 4  # so many times the tokens must not exceed D


class State(NamedTuple):
    """What rows have read: it is given up to every program, and comes back.

    Attributes:
      k, v: `[L, B, S, F]` keys and values.
      ids: `[B, S]` int32, the tokens themselves.
    """

    k: jax.Array
    v: jax.Array
    ids: jax.Array


class Now(NamedTuple):
    """What each of R rows is at.

    Attributes:
      tokens_RxT: int32, the next tokens.
      counts_R: int32, how many of them are there, 0 for a row that stands idle.
      written_R: int32, slots that were written before; the tokens go to those after them.
      lengths_R: int32, the length of the whole text in the end (`rope.tables`).
      languages_R: int32, the expert of its language, or -1.
      steps_R: int32, tokens that it drew before.
      law: how it draws.
    """

    tokens_RxT: Any
    counts_R: Any
    written_R: Any
    lengths_R: Any
    languages_R: Any
    steps_R: Any
    law: Law


class Until(NamedTuple):
    """When rows that go on have to be looked at; a row is ripe when its answer may have ended.

    Attributes:
      left_R: int32, tokens until it is as long as it may be.
      ends_RxE: int32, the last ids of what stops it, filled up with -1.
      any_: [] bool, whether one ripe row is enough, as others wait for its place; else all are.
    """

    left_R: Any
    ends_RxE: Any
    any_: Any


def _pinned(config: AdaptedConfig, x: jax.Array) -> jax.Array:
    """A leaf of the state on the mesh: rows as of a batch, heads as the layers make them."""
    execution = config.execution
    if execution.mesh is None:
        return x
    spec = PartitionSpec(execution.row_axes, None)
    if x.ndim > 2:
        heads = execution.tensor_axis(config.decoder.n_kv_heads)
        spec = PartitionSpec(None, *spec, heads)
    return jax.lax.with_sharding_constraint(x, NamedSharding(execution.mesh, spec))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def new_state(config: AdaptedConfig, rows: int, slots: int) -> State:
    """A state of so many rows of so many slots, in which nothing was read."""
    d = config.decoder
    shape = (d.n_layers, rows, slots, d.kv_width)
    k, v = (_pinned(config, jnp.zeros(shape, config.execution.dtype)) for _ in "kv")
    return State(k, v, _pinned(config, jnp.zeros((rows, slots), jnp.int32)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def resized(config: AdaptedConfig, slots: int, x: jax.Array) -> jax.Array:
    """A leaf of the state with another number of slots; what lies beyond it is forgotten."""
    axis = 2 if x.ndim > 2 else 1
    if slots <= x.shape[axis]:
        return _pinned(config, jax.lax.slice_in_dim(x, 0, slots, axis=axis))
    widths = [(0, slots - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return _pinned(config, jnp.pad(x, widths))


def _placed(config: AdaptedConfig, tokens: int) -> AdaptedConfig:
    """The model for so many tokens: on a mesh, few of them travel to the weights.

    Gathered, a weight takes D·O numbers to every device. T tokens that travel take T·D there, and
    2·T·O to add up what the parts give.
    """
    few = _FEW * tokens <= config.decoder.d_model
    return dataclasses.replace(config, travelling=few and config.execution.gathers_weights)


def _run(config: AdaptedConfig, weights: Weights, state: State, now: Now, slots: CacheSlots):
    """`(head, x_RxTxD, state, ids_RxS)` after the tokens were read."""
    T, ids = now.tokens_RxT.shape[1], state.ids
    offsets_1xT = jnp.arange(T, dtype=jnp.int32)[None]
    real_RxT = (offsets_1xT < now.counts_R[:, None]).astype(jnp.int32)
    slots_BxS = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    cache = Cache(state.k, state.v, jnp.ones_like(ids), slots_BxS, slots, now.lengths_R)
    head, x_RxTxD, cache = forward(
        _placed(config, now.tokens_RxT.size),
        weights._replace(language_ids_Rx1=now.languages_R[:, None]),
        now.tokens_RxT,
        real_RxT,
        now.written_R[:, None] + offsets_1xT,
        cache,
    )
    ids, ids_RxS = append(ids[None], now.tokens_RxT, 0, slots)
    assert cache is not None
    k, v, ids_BxS = (_pinned(config, x) for x in (cache.k, cache.v, ids[0]))
    return head, x_RxTxD, State(k, v, ids_BxS), ids_RxS


def _drawn(config: AdaptedConfig, alternatives: int, head, x_Rx1xD, ids_RxS, now: Now) -> Drawn:
    execution = config.execution
    there = execution.weights_at_rest().constrain_rows
    z_Rx1xV = there(logits(config.decoder, head, there(x_Rx1xD)))
    z_RxV = execution.constrain_rows(z_Rx1xV)[:, 0]
    written_R = now.written_R + now.counts_R
    ids_R = pick(now.law, z_RxV, ids_RxS, written_R, now.steps_R)
    return told(z_RxV, ids_R, alternatives)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def read(
    config: AdaptedConfig,
    alternatives: int,
    weights: Weights,
    state: State,
    now: Now,
    rows_R: Any,
    sources_R: Any,
) -> tuple[State, Drawn]:
    """Rows read tokens, and draw what comes after the last one.

    Args:
      config, alternatives: static.
      weights: their languages are those of `now`.
      state: given up.
      now: right of their `counts_R`, tokens are padding. There are slots for those, too.
      rows_R: int32, the row of the state that each is; one that is not there is not kept.
      sources_R: int32, the row of the state that holds the `written_R` tokens before.
    """
    slots = CacheSlots(now.written_R, rows_R, sources_R)
    head, x_RxTxD, state, ids_RxS = _run(config, weights, state, now, slots)
    last_Rx1x1 = jnp.maximum(now.counts_R - 1, 0)[:, None, None]
    x_Rx1xD = jnp.take_along_axis(x_RxTxD, last_Rx1x1, axis=1)
    return state, _drawn(config, alternatives, head, x_Rx1xD, ids_RxS, now)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def go_on(
    config: AdaptedConfig,
    most: int,
    alternatives: int,
    weights: Weights,
    state: State,
    now: Now,
    until: Until,
) -> tuple[State, Drawn, jax.Array]:
    """All rows go on, each from its one token in `now`, until somebody has to look at them.

    Args:
      config, most, alternatives: static; `most` is the largest number of steps.
      weights: their languages are those of `now`.
      state: given up; it has slots for what each row has left, and one for those that stand idle.
      now: R = B.
      until: when.

    Returns:
      the state, the tokens with a leading axis of `most` steps, and how many steps it took.
    """

    def shape(dtype, *rest):
        return jnp.zeros((most, len(now.counts_R), *rest), dtype)

    out = Drawn(
        shape(jnp.int32),
        shape(jnp.float32),
        shape(jnp.int32, alternatives),
        shape(jnp.float32, alternatives),
    )

    def more(carry):
        n, _, _, _, ripe_R = carry
        live_R = now.counts_R > 0
        enough = jnp.where(until.any_, jnp.any(ripe_R & live_R), jnp.all(ripe_R | ~live_R))
        return (n < most) & ~enough

    def one(carry):
        n, state, now, out, ripe_R = carry
        head, x_Rx1xD, state, ids_RxS = _run(config, weights, state, now, CacheSlots(now.written_R))
        drawn = _drawn(config, alternatives, head, x_Rx1xD, ids_RxS, now)
        out = jax.tree.map(lambda all_, new: all_.at[n].set(new), out, drawn)
        now = now._replace(
            tokens_RxT=drawn.ids_R[:, None],
            written_R=now.written_R + now.counts_R,
            steps_R=now.steps_R + 1,
        )
        ripe_R |= jnp.any(drawn.ids_R[:, None] == until.ends_RxE, axis=1)
        return n + 1, state, now, out, ripe_R | (n + 1 >= until.left_R)

    now = jax.tree.map(jnp.asarray, now)
    start = (jnp.int32(0), state, now, out, jnp.zeros(len(now.counts_R), bool))
    n, state, _, out, _ = jax.lax.while_loop(more, one, start)
    return state, out, n
