"""A recipe: typed stages parsed from a configuration, and what each stage starts from."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.adalora import Allocator, BudgetSchedule
from medmoe_jax.adapters.bank import BankSpec, abstract, init, match_layers, match_sites
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.orthogonality import Orthogonality
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.adapters.sparsity import Sparsity
from medmoe_jax.base import decoder as base_decoder
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.quantised import KERNELS
from medmoe_jax.errors import UserError
from medmoe_jax.training.step import Term, match_leaves

_STATES = ("train", "gate", "frozen", "off")  # `merged` comes from `merge` only
# What `kind` of an entry of `losses` makes.
TERMS: Mapping[str, Callable[..., Term]] = {
    "orthogonality": Orthogonality,
    "orthonormality": Orthonormality,
    "sparsity": Sparsity,
}


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
      terms: losses on parameters.
      allocators: what shrinks the ranks of banks while it trains them, by name.
      mixture: `{source: weight}`.
      config: the section itself, for the schedule.
    """

    name: str
    after: str
    merge: tuple[str, ...]
    drop: tuple[str, ...]
    stack: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]]
    added: tuple[BankSpec, ...]
    states: Mapping[str, str]
    train_base: tuple[str, ...]
    terms: tuple[Term, ...]
    allocators: Mapping[str, Allocator]
    mixture: Mapping[str, float]
    config: ConfigDict


def bank_spec(name: str, fields: Mapping[str, Any], decoder: DecoderConfig) -> BankSpec:
    """A bank's specification from its section; UserError where a pattern matches nothing."""
    fields = dict(fields)
    sites = match_sites(name, tuple(fields.pop("sites")), decoder)
    start, stop = match_layers(name, tuple(fields.pop("layers")), decoder.n_layers)
    return BankSpec(name=name, sites=sites, start=start, stop=stop, **fields)


def parse(config: ConfigDict, decoder: DecoderConfig) -> tuple[Stage, ...]:
    """The stages in order.

    Raises:
      UserError: naming the field, for whatever does not fit together.
    """
    stages: list[Stage] = []
    rosters: dict[str, Roster] = {"": {}}
    for name in config.stages.order:
        if name in rosters:
            raise UserError(f"stages.order: '{name}' stands there twice")
        if name not in config.stages or name == "order":
            known = ", ".join(key for key in config.stages if key != "order") or "none"
            raise UserError(f"stages.order: there is no stage '{name}'; defined: {known}")
        if name == "base":
            raise UserError("stages.order: 'base' means the bare base; give the stage another name")
        stage = _parse_stage(name, config, decoder)
        if stage.after not in rosters:
            raise UserError(
                f"stages.{name}.after: '{stage.after}' does not stand before it in stages.order"
            )
        rosters[name] = _check(stage, rosters[stage.after], decoder)
        stages.append(stage)
    return tuple(stages)


def _parse_stage(name: str, config: ConfigDict, decoder: DecoderConfig) -> Stage:
    section = config.stages[name]
    mixture = {source: float(w) for source, w in section.mixture.items()}
    for source, weight in mixture.items():
        if source not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            raise UserError(
                f"stages.{name}.mixture: there is no source '{source}'; data.sources: {known}"
            )
        if weight < 0:
            raise UserError(f"stages.{name}.mixture.{source}: weight {weight} is negative")
    if not any(mixture.values()):
        raise UserError(f"stages.{name}.mixture is empty; give at least one source a weight")
    if section.steps <= 0 and section.epochs <= 0:
        raise UserError(f"stages.{name}: give steps or epochs above 0")
    if not 0 <= section.warmup <= 1:
        raise UserError(f"stages.{name}.warmup: {section.warmup} is no share between 0 and 1")
    for bank, state in section.states.items():
        if state not in _STATES:
            raise UserError(
                f"stages.{name}.states.{bank}: '{state}' is none of {', '.join(_STATES)}"
            )
    with _within(f"stages.{name}."):
        _check_train_base(tuple(section.train_base), config.base.quantise, decoder)
    return Stage(
        name=name,
        after=section.after,
        merge=tuple(section.merge),
        drop=tuple(section.drop),
        stack={
            key: (tuple(fields.of), {k: v for k, v in fields.items() if k != "of"})
            for key, fields in section.stack.items()
        },
        added=tuple(bank_spec(key, b, decoder) for key, b in section.banks.items()),
        states=dict(section.states),
        train_base=tuple(section.train_base),
        terms=tuple(_term(f"stages.{name}.losses.{key}", t) for key, t in section.losses.items()),
        allocators={
            key: _allocator(f"stages.{name}.allocators.{key}", fields)
            for key, fields in section.allocators.items()
        },
        mixture=mixture,
        config=section,
    )


def _check_train_base(patterns: tuple[str, ...], quantise: str, decoder: DecoderConfig) -> None:
    codes = match_leaves(base_decoder.shapes(decoder), patterns) & (KERNELS if quantise else set())
    if codes:
        raise UserError(
            f"train_base: {', '.join(sorted(codes))} cannot be trained, because base.quantise is "
            f"'{quantise}'; name other leaves, or leave base.quantise empty"
        )


def _term(where: str, fields: Mapping[str, Any]) -> Term:
    fields = dict(fields)
    kind = fields.pop("kind")
    if kind not in TERMS:
        raise UserError(f"{where}.kind: '{kind}' is none of {', '.join(TERMS)}")
    with _within(f"{where}."):
        return TERMS[kind](**fields)


def _allocator(where: str, fields: Mapping[str, Any]) -> Allocator:
    with _within(f"{where}."):
        return Allocator(**fields)


@contextlib.contextmanager
def _within(where: str) -> Iterator[None]:
    """Puts the place in the recipe before a UserError's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def next_roster(stage: Stage, roster: Roster) -> Roster:
    """A stage's roster, from the one it starts from: merge, drop, stack, states, add."""
    for name in stage.merge:
        spec, state = lifecycle.find(roster, name)
        lifecycle.check_mergeable(spec)
        if state == "merged":
            raise UserError(f"bank '{name}' is merged already")
        roster = {**roster, name: (spec, "merged")}
    for name in stage.drop:
        roster, _ = lifecycle.drop(roster, {}, name)
    for name, (of, gate) in stage.stack.items():
        roster = _stacked(roster, name, of, gate)
    for name, state in stage.states.items():
        roster = lifecycle.set_state(roster, name, state)
    for spec in stage.added:
        if spec.name in roster:
            raise UserError(f"bank '{spec.name}' is there already; names are unique in a recipe")
        roster = {**roster, spec.name: (spec, "train")}
    return roster


def _stacked(roster: Roster, name: str, of, gate: Mapping[str, Any]) -> Roster:
    """The roster with the banks `of` become one."""
    specs = [lifecycle.find(roster, member)[0] for member in of]
    if not specs:
        raise UserError(f"stack '{name}': `of` names no bank")
    left = {key: entry for key, entry in roster.items() if key not in of}
    if name in left:
        raise UserError(f"bank '{name}' is there already; names are unique in a recipe")
    return {**left, name: (lifecycle.stacked_spec(name, specs, **gate), "gate")}


def _check(stage: Stage, before: Roster, decoder: DecoderConfig) -> Roster:
    with _within(f"stages.{stage.name}: "):
        roster = next_roster(stage, before)
    trained = [name for name, (_, state) in roster.items() if state == "train"]
    gated = [spec for spec, state in roster.values() if state == "gate"]
    for spec in gated:
        if spec.gate == "always":
            raise UserError(f"stages.{stage.name}: bank '{spec.name}' has no gate to train")
    if not (trained or gated or stage.train_base):
        raise UserError(
            f"stages.{stage.name} trains nothing: add a bank, set one to 'train', or name base "
            "leaves in train_base"
        )
    active = {spec.name: spec for spec in lifecycle.active_banks(roster)}
    with _within(f"stages.{stage.name}: "):
        AdaptedConfig(decoder, tuple(active.values()))
    for term in stage.terms:
        _check_term(stage.name, term, active, decoder)
    _check_allocators(stage, trained, active)
    if stage.config.steps:
        plans(stage, roster, stage.config.steps)
    return roster


def _check_term(stage: str, term: Term, active: Mapping[str, BankSpec], decoder) -> None:
    for name in term.uses:
        if name not in active:
            raise UserError(f"stages.{stage}.losses: bank '{name}' takes no part in this stage")
    banks = {name: abstract(active[name], decoder) for name in term.uses}
    with _within(f"stages.{stage}.losses: "):
        jax.eval_shape(lambda b: term.value(active, b), banks)


def _check_allocators(stage: Stage, trained, specs: Mapping[str, BankSpec]) -> None:
    taken: set[str] = set()
    for name, allocator in stage.allocators.items():
        where = f"stages.{stage.name}.allocators.{name}"
        if allocator.bank not in trained:
            raise UserError(f"{where}.bank: this stage trains no bank '{allocator.bank}'")
        if allocator.bank in taken:
            raise UserError(f"{where}.bank: '{allocator.bank}' has an allocator already")
        taken.add(allocator.bank)
        with _within(f"{where}."):
            allocator.check(specs[allocator.bank])


def plans(stage: Stage, roster: Roster, steps: int) -> dict[str, BudgetSchedule]:
    """What each allocator does in a run of that many steps, by bank.

    Raises:
      UserError: an allocator's phases do not fit in the run.
    """
    out = {}
    for name, allocator in stage.allocators.items():
        with _within(f"stages.{stage.name}.allocators.{name}."):
            out[allocator.bank] = BudgetSchedule(allocator, roster[allocator.bank][0], steps)
    return out


def chain(stages: tuple[Stage, ...], name: str) -> tuple[Stage, ...]:
    """The stage of that name with the ones it builds on, first to last; "" gives none."""
    by_name = {stage.name: stage for stage in stages}
    out: list[Stage] = []
    while name:
        out.append(by_name[name])
        name = by_name[name].after
    return tuple(reversed(out))


def start(stage: Stage, roster: Roster, banks, base, decoder: DecoderConfig, place=None):
    """What a stage starts from, with the merge really made and new banks initialised.

    The old base's merged kernels are given up.

    Args:
      stage: the stage about to run (or to be replayed).
      roster, banks, base: what the stage before ended with.
      place: shardings for a tree of shapes, for the new banks (`bank.init`).

    Returns:
      `(roster, banks, base)`.
    """
    for name in stage.merge:
        roster, base = lifecycle.merge(roster, banks, base, name, donate=True)
    for name in stage.drop:
        roster, banks = lifecycle.drop(roster, banks, name)
    key = jax.random.key(stage.config.seed)

    def key_of(name: str):
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    for name, (of, gate) in stage.stack.items():
        _, experts = lifecycle.stack(name, [(roster[m][0], banks[m]) for m in of])
        roster = _stacked(roster, name, of, gate)
        fresh = init(roster[name][0], decoder, key_of(name), shardings_of=place)
        banks = {key: params for key, params in banks.items() if key not in of}
        banks[name] = trees.overlay(fresh, experts)
    for name, state in stage.states.items():
        roster = lifecycle.set_state(roster, name, state)
    for spec in stage.added:
        own = key_of(spec.name)
        roster, banks = lifecycle.add(roster, banks, spec, decoder, own, base, place)
    return roster, banks, base


def finish(final: Mapping[str, Any], base):
    """`(banks, base)` after a stage, from its final tree `{"banks", "base"}`."""
    trained = [
        (path, leaf.astype(trees.get(base, path).dtype))
        for path, leaf in trees.flatten(final.get("base", {}))
    ]
    return final.get("banks", {}), trees.overlay(base, trees.unflatten(trained))


def replay(
    stages, name: str, base, decoder: DecoderConfig, final_of: Callable[[str], Any], place=None
):
    """Roster, banks and base at the end of a finished stage.

    Args:
      stages: the recipe.
      name: the stage, or "" for the bare base.
      base: the base as loaded; its merged kernels are given up.
      final_of: `{"banks", "base"}` of a finished stage, by name.
      place: as in `start`.
    """
    roster: Roster = {}
    banks: dict[str, Any] = {}
    for stage in chain(stages, name):
        roster, banks, base = start(stage, roster, banks, base, decoder, place)
        banks, base = finish(final_of(stage.name), base)
    return roster, banks, base


def schedule(section: ConfigDict, steps: int):
    """Linear warm-up to the learning rate, then a cosine to its final share (an optax schedule)."""
    warmup = round(section.warmup * steps)
    peak, floor = section.learning_rate, section.final_learning_rate

    def rate(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(step < warmup, rising, cosine)

    return rate
