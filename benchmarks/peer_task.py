"""What every contender of peers.py does, and what it gives back. Imports neither JAX nor PyTorch.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROWS, TOKENS, PROMPT = 8, 256, 128
TARGETS = ROWS * (TOKENS - PROMPT)
LORA, MING, MEDCARE = "lora", "ming_moe", "medcare"
OURS = "medmoe_jax"  # the contender that is this project
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}  # by device


class Contender(NamedTuple):
    """A model that is loaded and about to train.

    Attributes:
      step: makes a training step, waits for its end and gives the loss before it.
      parameters: how many are trained.
      device: its name; "" = the processor.
      peak_bytes: the most of the device's own memory so far; None = the process's memory counts.
    """

    step: Callable[[], float]
    parameters: int
    device: str = ""
    peak_bytes: Callable[[], int] | None = None


def batch(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and whether each is a target, int32 `[B, T]` both.

    The first PROMPT tokens of a row are its prompt, the rest its completion.
    """
    ids_BxT = np.random.default_rng(1).integers(0, vocabulary, (ROWS, TOKENS), np.int32)
    target_BxT = np.broadcast_to(np.arange(TOKENS, dtype=np.int32) >= PROMPT, ids_BxT.shape)
    return ids_BxT, target_BxT.astype(np.int32)
