"""A recipe: typed stages, parsed from a configuration and checked against each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Set
from typing import Any

import jax
from ml_collections import ConfigDict

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.adalora import Allocator, BudgetSchedule
from medmoe_jax.adapters.bank import (
    BankSpec,
    abstract,
    check_acts,
    check_gate_learns,
    match_layers,
    match_sites,
)
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.orthogonality import Orthogonality
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.adapters.sparsity import Sparsity
from medmoe_jax.base import decoder as base_decoder
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.quantised import KERNELS
from medmoe_jax.errors import UserError, within
from medmoe_jax.training.leaves import match_leaves
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.step import Regulariser
from medmoe_jax.training.transitions import next_roster

_STAGE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_BANK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}"
_STATES = ("train", "gate", "frozen", "off")  # `merged` comes from `merge` only
# What an entry of `losses` is made into, by its `kind`.
REGULARISERS: Mapping[str, type[Any]] = {
    "orthogonality": Orthogonality,
    "orthonormality": Orthonormality,
    "sparsity": Sparsity,
}


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
        if not re.fullmatch(_STAGE_NAME, name):
            raise UserError(
                f"stages.order: {name!r} is no name of a stage, nor of its folder: use "
                "letters, digits, '_', '-' and '.', with a letter, digit or '_' first, 100 at most"
            )
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
        rosters[name] = _check(stage, rosters[stage.after], decoder, bool(config.base.quantise))
        stages.append(stage)
    return tuple(stages)


def _parse_stage(name: str, config: ConfigDict, decoder: DecoderConfig) -> Stage:
    section = config.stages[name]
    mixture = {source: float(w) for source, w in section.mixture.items()}
    for source in mixture:
        if source not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            raise UserError(
                f"stages.{name}.mixture: there is no source '{source}'; data.sources: {known}"
            )
    if not any(mixture.values()):
        raise UserError(f"stages.{name}.mixture is empty; give at least one source a weight")
    if section.steps <= 0 and section.epochs <= 0:
        raise UserError(f"stages.{name}: give steps or epochs above 0")
    for bank, state in section.states.items():
        if state not in _STATES:
            raise UserError(
                f"stages.{name}.states.{bank}: '{state}' is none of {', '.join(_STATES)}"
            )
    for kind in ("banks", "stack"):
        for bank in section[kind]:
            if not re.fullmatch(_BANK_NAME, bank):
                raise UserError(
                    f"stages.{name}.{kind}: {bank!r} is no name of a bank: use letters, digits, "
                    "'_' and '-', with a letter, digit or '_' first, 100 at most"
                )
    with within(f"stages.{name}."):
        _check_evaluation(section.evaluation, mixture, config.data.sources)
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
        regularisers=tuple(
            _regulariser(f"stages.{name}.losses.{key}", t) for key, t in section.losses.items()
        ),
        allocators={
            key: _allocator(f"stages.{name}.allocators.{key}", fields)
            for key, fields in section.allocators.items()
        },
        mixture=mixture,
        config=section,
    )


def _check_evaluation(
    section: ConfigDict, mixture: Mapping[str, float], sources: ConfigDict
) -> None:
    """Raise UserError unless the fields of an evaluation fit together; tasks are not looked up."""
    where, tasks, held_out = "evaluation", tuple(section.tasks), tuple(section.sources)
    if section.final not in ("last", "best"):
        raise UserError(f"{where}.final: '{section.final}' is none of last, best")
    asked = tasks or held_out or section.best or section.patience or section.final == "best"
    if asked and not section.every:
        raise UserError(f"{where}.every is 0, so nothing of it would be done; say how many steps")
    if section.every and not (tasks or held_out):
        raise UserError(f"{where}: there is nothing to score; name tasks, or sources")
    if not section.best and (section.patience or section.final == "best"):
        field = "patience" if section.patience else "final"
        raise UserError(f"{where}.{field} needs {where}.best, the score to judge the steps by")
    scores = [*(["mean"] if tasks else []), *(["loss"] if held_out else [])]
    if section.best and section.best not in scores and not tasks:
        raise UserError(f"{where}.best: '{section.best}' is none of {', '.join(scores)}")
    for name in held_out:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(
                f"{where}.sources: there is no source '{name}'; {hint}data.sources: "
                f"{', '.join(sources)}"
            )
        if mixture.get(name):
            raise UserError(f"{where}.sources: '{name}' is trained on; name rows that are not")
        if sources[name].window:
            raise UserError(f"{where}.sources: '{name}' is streamed; leave out its window")


def _check_train_base(patterns: tuple[str, ...], quantise: str, decoder: DecoderConfig) -> None:
    codes = match_leaves(base_decoder.shapes(decoder), patterns) & (KERNELS if quantise else set())
    if codes:
        raise UserError(
            f"train_base: {', '.join(sorted(codes))} cannot be trained, because base.quantise is "
            f"'{quantise}'; name other leaves, or leave base.quantise empty"
        )


def _regulariser(where: str, fields: Mapping[str, Any]) -> Regulariser:
    fields = dict(fields)
    kind = fields.pop("kind")
    if kind not in REGULARISERS:
        raise UserError(f"{where}.kind: '{kind}' is none of {', '.join(REGULARISERS)}")
    with within(f"{where}."):
        return REGULARISERS[kind](**fields)


def _allocator(where: str, fields: Mapping[str, Any]) -> Allocator:
    with within(f"{where}."):
        return Allocator(**fields)


def _check(stage: Stage, before: Roster, decoder: DecoderConfig, quantised: bool) -> Roster:
    with within(f"stages.{stage.name}: "):
        roster = next_roster(stage, before, quantised)
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
    with within(f"stages.{stage.name}: "):
        AdaptedConfig(decoder, tuple(active.values()))
    learning = {(name, part) for name in trained for part in ("factors", "gate")}
    learning |= {(spec.name, "gate") for spec in gated}
    for regulariser in stage.regularisers:
        _check_regulariser(stage.name, regulariser, active, learning, decoder)
    _check_allocators(stage, trained, active)
    if stage.config.steps:
        budget_schedules(stage, roster, stage.config.steps)
    return roster


def check_learns(stage: Stage, roster: Roster) -> None:
    """Raise UserError for a bank that a stage is to train, with a gate or field that does nothing.

    Only training asks for this: an adapter of another tool may have such a gate, and answers.
    """
    added = {spec.name for spec in stage.added}
    with within(f"stages.{stage.name}: "):
        for name, (spec, state) in roster.items():
            if state in ("train", "gate"):
                check_acts(spec)
                check_gate_learns(spec, fresh=name in added)


def _check_regulariser(
    stage: str,
    regulariser: Regulariser,
    active: Mapping[str, BankSpec],
    learning: Set[tuple[str, str]],
    decoder: DecoderConfig,
) -> None:
    for name in regulariser.uses:
        if name not in active:
            raise UserError(f"stages.{stage}.losses: bank '{name}' takes no part in this stage")
    if regulariser.weight and learning.isdisjoint(regulariser.moves):
        moved = " or ".join(f"{bank}'s {part}" for bank, part in regulariser.moves)
        raise UserError(
            f"stages.{stage}.losses: {regulariser.name} would change nothing: this stage does not "
            f"train {moved}"
        )
    banks = {name: abstract(active[name], decoder) for name in regulariser.uses}
    with within(f"stages.{stage}.losses: "):
        jax.eval_shape(lambda b: regulariser.value(active, b), banks)


def _check_allocators(stage: Stage, trained, specs: Mapping[str, BankSpec]) -> None:
    taken: set[str] = set()
    for name, allocator in stage.allocators.items():
        where = f"stages.{stage.name}.allocators.{name}"
        if allocator.bank not in trained:
            raise UserError(f"{where}.bank: this stage trains no bank '{allocator.bank}'")
        if allocator.bank in taken:
            raise UserError(f"{where}.bank: '{allocator.bank}' has an allocator already")
        taken.add(allocator.bank)
        with within(f"{where}."):
            allocator.check(specs[allocator.bank])


def budget_schedules(stage: Stage, roster: Roster, steps: int) -> dict[str, BudgetSchedule]:
    """What each allocator does in a run of that many steps, by bank.

    Raises:
      UserError: an allocator's phases do not fit in the run.
    """
    out = {}
    for name, allocator in stage.allocators.items():
        with within(f"stages.{stage.name}.allocators.{name}."):
            out[allocator.bank] = BudgetSchedule(allocator, roster[allocator.bank][0], steps)
    return out
