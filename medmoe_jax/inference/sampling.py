"""How the next token is drawn.

Axes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt

from medmoe_jax.ranges import NOT_NEGATIVE, POSITIVE, SEED, SHARE, WORD, Range
from medmoe_jax.seeds import random_key

_NUMBER = Range(0, WORD.high)
_PENALTY = Range(0.01, 100)  # what keeps float32 logits finite


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    First the repeated tokens are penalised, then the temperature is applied, and then `top_k`,
    `top_p` and `min_p` take tokens away, each from what the one before has left.

    Attributes:
      temperature: 0, or less than a millionth, takes the most probable token.
      top_p: smallest set of tokens whose probability reaches this is drawn from; 0 = the most
        probable one alone.
      seed: where the draws start from.
      first: number of the first prompt. Each prompt draws from the stream of its number, so that
        parts that are asked one after the other draw as the whole would.
      top_k: so many of the most probable tokens are drawn from; 0 = all.
      min_p: tokens less probable than this share of the most probable one's are not drawn.
      repetition_penalty: what the logit of a token of the prompt or the answer is divided by if it
        is positive, and multiplied by if it is not (arXiv 1909.05858); 1 = none; from 0.01 to 100.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("temperature", self.temperature)
        SHARE.check("top_p", self.top_p)
        SEED.check_whole("seed", self.seed)
        _NUMBER.check_whole("first", self.first)
        _NUMBER.check_whole("top_k", self.top_k)
        SHARE.check("min_p", self.min_p)
        POSITIVE.check("repetition_penalty", self.repetition_penalty)
        _PENALTY.check("repetition_penalty", self.repetition_penalty)

    def keys(self, rows: npt.ArrayLike) -> np.ndarray:
        """Data of the random keys `[B, 2]` uint32 of prompts that stand at these places."""
        numbers_B = self.first + np.asarray(rows, np.int32)
        return np.asarray(_key_data(random_key(self.seed), numbers_B))


@jax.jit
def _key_data(key: jax.Array, numbers_B: jax.Array) -> jax.Array:
    """Data `[B, 2]` of one key a number; compiled, as every batch asks for it."""
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B))
