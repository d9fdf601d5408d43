"""What the numbers of a configuration may be: one table for all that no other room judges.

NaN and the infinities are refused in every field, and what no float32 and no 32 bits can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medmoe_jax.errors import UserError
from medmoe_jax.ranges import (
    COUNT,
    DECAY,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SINGLE,
    WORD,
    Range,
)

_RATE = Range(0, 10)  # Adam moves every weight by about the rate
# By field; `*` stands for any one name.
LIMITS: Mapping[str, Range] = {
    "base.seed": SEED,
    "data.detect_language": SHARE,
    "data.sources.*.window": NOT_NEGATIVE,
    "data.length": NOT_NEGATIVE,
    "data.global_batch": COUNT,
    "data.shards": COUNT,
    "data.seed": SEED,
    "stages.*.mixture.*": NOT_NEGATIVE,
    "stages.*.evaluation.every": NOT_NEGATIVE,
    "stages.*.evaluation.limit": NOT_NEGATIVE,
    "stages.*.evaluation.patience": NOT_NEGATIVE,
    "stages.*.steps": NOT_NEGATIVE,
    "stages.*.epochs": NOT_NEGATIVE,
    "stages.*.learning_rate": _RATE,
    "stages.*.warmup": SHARE,
    "stages.*.final_learning_rate": _RATE,
    "stages.*.weight_decay": Range(0, 100),
    "stages.*.clip": NOT_NEGATIVE,
    "stages.*.b1": DECAY,
    "stages.*.b2": DECAY,
    "stages.*.eps": POSITIVE,
    "stages.*.seed": SEED,
    "stages.*.banks.*.alpha": POSITIVE,
    "run.accumulation": COUNT,
    "run.unroll": COUNT,
    "run.log_every": COUNT,
    "run.save_every": COUNT,
    "run.keep": COUNT,
    "run.task_limit": NOT_NEGATIVE,
    "run.score_batch": COUNT,
}
_PATTERNS = [(tuple(pattern.split(".")), limits) for pattern, limits in LIMITS.items()]


def check_numbers(config: ConfigDict) -> None:
    """Raise UserError, naming the field, for a number that it cannot hold."""
    for path, value in _leaves(config, ()):
        if isinstance(value, int | float) and not isinstance(value, bool):
            limits, name = _range(path), ".".join(path)
            limits.check(name, value)
            if isinstance(value, float):
                SINGLE.check(name, value)
                _check_rounded(name, value, limits)
            elif limits is not SEED:
                WORD.check(name, value)
    _check_profile(config.run.profile)


def _check_rounded(name: str, value: float, limits: Range) -> None:
    """Raise UserError for a float that is in the range, but not once it is rounded to float32."""
    single = float(np.float32(value))
    if abs(single) < np.finfo(np.float32).tiny:  # devices take it for 0
        single = 0.0
    limits.check(f"{name}: {value} is {single} in float32", single)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, Mapping | ConfigDict):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, (*path, key))


def _range(path: tuple[str, ...]) -> Range:
    for pattern, limits in _PATTERNS:
        if len(pattern) == len(path) and all(
            name in ("*", key) for name, key in zip(pattern, path, strict=True)
        ):
            return limits
    return FINITE


def _check_profile(profile: tuple) -> None:
    whole = all(isinstance(n, int) and n >= 1 for n in profile)
    if len(profile) not in (0, 2) or not whole:
        raise UserError(
            f"run.profile: {profile} is neither empty nor two numbers from 1 on, the first step to "
            "trace and how many"
        )
