"""Drawing the next token of rows, each by its own `Sampling`.

Axes: R rows, S slots of a text, V vocabulary, A alternatives.
How a row draws is data: a batch may hold rows that take the most probable token beside rows that
draw, and nothing is compiled anew when that changes. What no row asks for is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.inference.sampling import Sampling

_COLDEST = 1e-6  # logits over a lower temperature would be infinite
_NARROWEST = np.finfo(np.float32).tiny  # a smaller `top_p` may be computed with as 0


class Law(NamedTuple):
    """How rows draw: the fields of `Sampling`, a value a row.

    Attributes:
      temperature_R, top_p_R, min_p_R, penalty_R: float32.
      top_k_R: int32, the vocabulary's size or more where all tokens stay.
      keys_Rx2: uint32, data of each row's key.
    """

    temperature_R: Any
    top_p_R: Any
    min_p_R: Any
    penalty_R: Any
    top_k_R: Any
    keys_Rx2: Any


class Drawn(NamedTuple):
    """The tokens drawn.

    Attributes:
      ids_R: int32.
      log_probs_R: float32, by the model itself.
      others_RxA, other_log_probs_RxA: the most probable tokens, best first.
    """

    ids_R: jax.Array
    log_probs_R: jax.Array
    others_RxA: jax.Array
    other_log_probs_RxA: jax.Array


def law(samplings: Sequence[Sampling], keys: Sequence[np.ndarray]) -> Law:
    """The law of rows with these samplings; `keys` are data `[2]` of their streams."""
    largest = np.iinfo(np.int32).max

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(one, name) for one in samplings], np.float32)

    temperature_R = floats("temperature")
    return Law(
        np.where(temperature_R < _COLDEST, 0.0, temperature_R).astype(np.float32),
        np.maximum(floats("top_p"), _NARROWEST),
        floats("min_p"),
        floats("repetition_penalty"),
        np.array([one.top_k or largest for one in samplings], np.int32),
        np.stack(keys),
    )


def penalised(
    z_RxV: jax.Array, penalty_R: jax.Array, ids_RxS: jax.Array, written_R: jax.Array
) -> jax.Array:
    """Logits after the repetition penalty for the first `written_R` of the ids."""
    V, S = z_RxV.shape[1], ids_RxS.shape[1]
    ids_RxS = jnp.where(jnp.arange(S)[None] < written_R[:, None], ids_RxS, V)

    def one(z_V, penalty, ids_S):
        z_S = z_V[jnp.minimum(ids_S, V - 1)]
        z_S = jnp.where(z_S > 0, z_S / penalty, z_S * penalty)
        return z_V.at[ids_S].set(z_S, mode="drop")  # a token that stands twice is set alike

    return jax.vmap(one)(z_RxV, penalty_R, ids_RxS)


def kept(law: Law, z_RxV: jax.Array) -> jax.Array:
    """Logits with -inf in place of those that `top_k`, `top_p` and `min_p` take away."""
    V = z_RxV.shape[1]
    sorted_RxV = jnp.sort(z_RxV, axis=-1)[:, ::-1]
    kth_Rx1 = (jnp.minimum(law.top_k_R, V) - 1)[:, None]
    floor_Rx1 = jnp.take_along_axis(sorted_RxV, kth_Rx1, axis=-1)
    p_RxV = jax.nn.softmax(jnp.where(sorted_RxV < floor_Rx1, -jnp.inf, sorted_RxV), axis=-1)
    before_RxV = jnp.cumsum(p_RxV, axis=-1) - p_RxV
    # A row of top-p 1 keeps all, though rounding may bring the sum there before its end.
    inside_RxV = (before_RxV < law.top_p_R[:, None]) | (law.top_p_R == 1)[:, None]
    last_Rx1 = jnp.sum(inside_RxV, axis=-1, keepdims=True) - 1
    floor_Rx1 = jnp.maximum(floor_Rx1, jnp.take_along_axis(sorted_RxV, last_Rx1, axis=-1))
    floor_Rx1 = jnp.maximum(floor_Rx1, sorted_RxV[:, :1] + jnp.log(law.min_p_R)[:, None])
    return jnp.where(z_RxV < floor_Rx1, -jnp.inf, z_RxV)


def pick(
    law: Law, z_RxV: jax.Array, ids_RxS: jax.Array, written_R: jax.Array, steps_R: jax.Array
) -> jax.Array:
    """The next token of each row, int32 `[R]`.

    Args:
      law: how they are drawn.
      z_RxV: float32 logits.
      ids_RxS, written_R: the texts so far, and their lengths.
      steps_R: int32, tokens that each row drew before.
    """

    def penalise(z_RxV):
        return penalised(z_RxV, law.penalty_R, ids_RxS, written_R)

    z_RxV = jax.lax.cond(jnp.any(law.penalty_R != 1), penalise, lambda z: z, z_RxV)
    best_R = jnp.argmax(z_RxV, axis=-1).astype(jnp.int32)
    hot_R = law.temperature_R > 0

    def draw():
        warm_RxV = z_RxV / jnp.where(hot_R, law.temperature_R, 1.0)[:, None]
        narrowed = (law.top_k_R < z_RxV.shape[1]) | (law.top_p_R < 1) | (law.min_p_R > 0)
        asked = jnp.any(narrowed & hot_R)
        warm_RxV = jax.lax.cond(asked, lambda z: kept(law, z), lambda z: z, warm_RxV)
        keys_R = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(law.keys_Rx2), steps_R)
        drawn_R = jax.vmap(jax.random.categorical)(keys_R, warm_RxV).astype(jnp.int32)
        return jnp.where(hot_R, drawn_R, best_R)

    return jax.lax.cond(jnp.any(hot_R), draw, lambda: best_R)


def told(z_RxV: jax.Array, ids_R: jax.Array, alternatives: int) -> Drawn:
    """What the model itself, whose logits are given, says of these tokens."""
    total_R = jax.nn.logsumexp(z_RxV, axis=-1)
    own_R = jnp.take_along_axis(z_RxV, ids_R[:, None], axis=-1)[:, 0]
    others, z_others = jnp.zeros((len(z_RxV), 0), jnp.int32), z_RxV[:, :0]
    if alternatives:
        z_others, others = jax.lax.top_k(z_RxV, alternatives)
    return Drawn(ids_R, own_R - total_R, others, z_others - total_R[:, None])
