"""What happens to base and banks from one stage to the next.

The order is always the same: merge, drop, stack, set states, add. `next_roster` does it to the
names and states alone, `start` to the arrays too, and `operations` writes it down.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import ShardingsOf, init
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.base.seam import Params
from medmoe_jax.errors import UserError
from medmoe_jax.seeds import random_key
from medmoe_jax.training.stage import Stage, chain


def next_roster(stage: Stage, roster: Roster, quantised: bool = False) -> Roster:
    """A stage's roster, from that of the stage before.

    Args:
      stage: the stage.
      roster: of the stage before.
      quantised: whether the base's kernels are, into which nothing is merged.

    Raises:
      UserError: a bank is not there, is there already, or cannot become what the stage says.
    """
    for name in stage.merge:
        spec, state = lifecycle.find(roster, name)
        lifecycle.check_mergeable(spec)
        if state == "merged":
            raise UserError(f"bank '{name}' is merged already")
        roster = {**roster, name: lifecycle.merged(spec, quantised)}
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


def roster_of(stages: Sequence[Stage], name: str, quantised: bool = False) -> Roster:
    """The roster of the stage of that name, from the first it builds on; "" has no bank.

    quantised: as of `next_roster`.
    """
    roster: Roster = {}
    for stage in chain(stages, name):
        roster = next_roster(stage, roster, quantised)
    return roster


def _stacked(roster: Roster, name: str, of, gate: Mapping[str, Any]) -> Roster:
    """The roster with the banks `of` become one."""
    for member in of:
        if lifecycle.find(roster, member)[1] == "merged":
            raise UserError(f"stack '{name}': bank '{member}' is merged into the base already")
        if list(of).count(member) > 1:
            raise UserError(f"stack '{name}': bank '{member}' stands there twice")
    specs = [lifecycle.find(roster, member)[0] for member in of]
    if not specs:
        raise UserError(f"stack '{name}': `of` names no bank")
    left = {key: entry for key, entry in roster.items() if key not in of}
    if name in left:
        raise UserError(f"bank '{name}' is there already; names are unique in a recipe")
    return {**left, name: (lifecycle.stacked_spec(name, specs, **gate), "gate")}


def start(
    stage: Stage,
    roster: Roster,
    banks: Mapping[str, Any],
    base: Params,
    decoder: DecoderConfig,
    shardings: ShardingsOf | None = None,
    donate: bool = True,
) -> tuple[Roster, Mapping[str, Any], Params]:
    """What a stage starts from: banks merged into the base, and new ones initialised.

    Args:
      stage: the stage about to run (or to be replayed).
      roster, banks, base: what the stage before ended with.
      decoder: the base's shapes.
      shardings: a function from a tree of shapes to its shardings, for the new banks; None: one
        device.
      donate: give up the old base's merged kernels.

    Returns:
      `(roster, banks, base)`.
    """
    for name in stage.merge:
        roster, base = lifecycle.merge(roster, banks, base, name, donate=donate)
    for name in stage.drop:
        roster, banks = lifecycle.drop(roster, banks, name)
    key = random_key(stage.config.seed)

    def key_of(name: str):
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    for name, (of, gate) in stage.stack.items():
        _, experts = lifecycle.stack(name, [(roster[m][0], banks[m]) for m in of])
        roster = _stacked(roster, name, of, gate)
        fresh = init(roster[name][0], decoder, key_of(name), shardings_of=shardings)
        banks = {key: params for key, params in banks.items() if key not in of}
        banks[name] = trees.overlay(fresh, experts)
    for name, state in stage.states.items():
        roster = lifecycle.set_state(roster, name, state)
    for spec in stage.added:
        own = key_of(spec.name)
        roster, banks = lifecycle.add(roster, banks, spec, decoder, own, base, shardings)
    return roster, banks, base


def ended(
    final: Mapping[str, Any], base: Params
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`(banks, base, leaves)` after a stage, from what it left: `{"banks", "base"}`.

    `leaves` are those of the base that it trained, in the base's dtype; `base` has all others.
    """
    leaves = trees.unflatten(
        (path, leaf.astype(trees.get(base, path).dtype))
        for path, leaf in trees.flatten(final.get("base", {}))
    )
    return final.get("banks", {}), trees.without(base, leaves), leaves


def replay(
    stages: Sequence[Stage],
    name: str,
    base: Params,
    decoder: DecoderConfig,
    final_of: Callable[[str], Any],
    shardings: ShardingsOf | None = None,
    donate: bool = True,
) -> tuple[Roster, Mapping[str, Any], Params, Params]:
    """Roster, banks, base and trained leaves at the end of a finished stage.

    What the stages before it have trained is in the base.

    Args:
      stages: the recipe.
      name: the stage, or "" for the bare base.
      base: the base as loaded.
      decoder: its shapes.
      final_of: what a finished stage left, `{"banks", "base"}`, by name.
      shardings, donate: as in `start`.
    """
    roster: Roster = {}
    banks: Mapping[str, Any] = {}
    leaves: Params = {}
    for stage in chain(stages, name):
        whole = trees.overlay(base, leaves)
        roster, banks, base = start(stage, roster, banks, whole, decoder, shardings, donate)
        banks, base, leaves = ended(final_of(stage.name), base)
    return roster, banks, base, leaves


def operations(stage: Stage) -> list[dict[str, Any]]:
    """What happened to the banks before a stage, for its manifest."""
    return [
        *({"op": "merge", "bank": name} for name in stage.merge),
        *({"op": "drop", "bank": name} for name in stage.drop),
        *({"op": "stack", "bank": name, "of": list(of)} for name, (of, _) in stage.stack.items()),
        *({"op": "state", "bank": name, "state": s} for name, s in stage.states.items()),
        *({"op": "add", "bank": spec.name} for spec in stage.added),
    ]
