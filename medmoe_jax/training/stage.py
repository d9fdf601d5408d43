"""A stage of a recipe as the rest of the code knows it: typed, its names resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from medmoe_jax.adapters.adalora import Allocator
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.errors import ParameterError
from medmoe_jax.training.step import Regulariser


@dataclass(frozen=True)
class Stage:
    """One training phase, checked against the recipe and the decoder.

    Attributes:
      name, after: its name and the stage it starts from ("" = the base).
      merge, drop: banks merged or dropped before it.
      stack: `{new bank: (banks that become it, fields of its gate)}`.
      added: banks it adds.
      states: `{bank: state}` it sets.
      train_base: globs of base leaves it trains.
      regularisers: losses on parameters.
      allocators: what shrinks the ranks of banks while it trains them, by name.
      mixture: `{source: weight}`.
      config: the section itself, for optimiser and schedule.
    """

    name: str
    after: str
    merge: tuple[str, ...]
    drop: tuple[str, ...]
    stack: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]]
    added: tuple[BankSpec, ...]
    states: Mapping[str, str]
    train_base: tuple[str, ...]
    regularisers: tuple[Regulariser, ...]
    allocators: Mapping[str, Allocator]
    mixture: Mapping[str, float]
    config: ConfigDict

    @property
    def sources(self) -> dict[str, float]:
        """The sources that it reads, those of weight 0 left out."""
        return {name: weight for name, weight in self.mixture.items() if weight}

    @property
    def held_out(self) -> tuple[str, ...]:
        """The sources that it is scored on and does not read."""
        return tuple(self.config.evaluation.sources)

    @property
    def deciding(self) -> tuple[str, ...]:
        """The sources that decide what it ends with: those it reads, or takes the best step by."""
        return (*self.sources, *(self.held_out if self.config.evaluation.best else ()))


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    """The stage of that name. Raises ParameterError, which names those there are."""
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        raise ParameterError(f"stage: '{name}' is none of {', '.join(by_name) or '(no stage)'}")
    return by_name[name]


def chain(stages: Sequence[Stage], name: str) -> tuple[Stage, ...]:
    """The stage of that name with the ones it builds on, first to last; "" gives none."""
    by_name = {stage.name: stage for stage in stages}
    out: list[Stage] = []
    while name:
        out.append(by_name[name])
        name = by_name[name].after
    return tuple(reversed(out))
