"""A stage whose banks come from a directory made by another tool instead of training."""

from __future__ import annotations

import functools
from pathlib import Path

import jax

from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import decoder
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.released import Imported, read_adapter
from medmoe_jax.checkpoints.upcycled import holds_experts, read_upcycled
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.rules import shardings
from medmoe_jax.training import summary
from medmoe_jax.training.identity import check_stage, claim, stage_dir
from medmoe_jax.training.recipe import Stage, chain, next_roster
from medmoe_jax.training.run import load_final, open_trained, save_end
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.step import match_leaves


def import_stage(setup: Setup, workdir: str | Path, folder: str | Path, name: str = "") -> str:
    """Finish a stage with the banks of an adapter directory, or with a whole upcycled model.

    Afterwards the work directory is as if the stage had been trained; its manifest names the files
    the banks come from, by content.

    Args:
      setup: the configuration's parts.
      workdir: of the run.
      folder: see `checkpoints.released` and `checkpoints.upcycled`; its tensors' names tell which.
      name: of the stage; "" is the first that is not finished.

    Returns:
      The stage's name.

    Raises:
      UserError: the stage cannot be imported, or the directory does not fit it; nothing is written.
    """
    stage = _choose(setup, workdir, name)
    roster: Roster = {}
    for one in chain(setup.stages, stage.name):
        roster = next_roster(one, roster)
    read = _read_upcycled if holds_experts(folder) else _read_adapter
    given = read(setup, workdir, folder, stage, roster)
    for one in chain(setup.stages, stage.after):
        check_stage(setup, workdir, one)
    before = load_final(setup, workdir, stage.after)["banks"] if stage.after else {}
    banks = {bank: given.banks[bank] if bank in given.banks else before[bank] for bank in roster}
    banks = jax.tree.map(jax.device_put, banks, shardings(banks, setup.mesh, setup.rules))
    fingerprint = claim(setup, workdir, stage, {}, given.files)
    for line in given.notes:
        summary.note(line)
    save_end(
        setup,
        workdir,
        stage,
        roster,
        {"banks": banks, "base": given.base},
        fingerprint,
        steps=0,
        metrics={},
        more=[{"op": "import", "files": given.files, "groups": given.groups}],
    )
    return stage.name


def _choose(setup: Setup, workdir: str | Path, name: str) -> Stage:
    by_name = {stage.name: stage for stage in setup.stages}
    if name and name not in by_name:
        raise UserError(f"--stage: '{name}' is none of {', '.join(by_name) or '(no stage)'}")
    open_ones = [s for s in by_name if not store.is_finished(stage_dir(workdir, s))]
    if not open_ones or (name and name not in open_ones):
        what = f"stage '{name}'" if name else "every stage"
        raise UserError(f"{what} is finished in {workdir}; import into another work directory")
    stage = by_name[name or open_ones[0]]
    if stage.stack:
        raise UserError(
            f"stage '{stage.name}' stacks ({', '.join(stage.stack)}): no directory holds what "
            "comes of that; train it here"
        )
    return stage


def _read_adapter(setup: Setup, workdir, folder, stage: Stage, roster: Roster) -> Imported:
    if stage.train_base:
        raise UserError(
            f"stage '{stage.name}' trains leaves of the base ({', '.join(stage.train_base)}): no "
            "adapter directory holds what comes of that; train it here"
        )
    return read_adapter(folder, setup.base.config, setup.base.family, roster)


def _read_upcycled(setup: Setup, workdir, folder, stage: Stage, roster: Roster) -> Imported:
    return read_upcycled(
        folder,
        setup.base.config,
        setup.base.family,
        roster,
        match_leaves(decoder.shapes(setup.base.config), stage.train_base),
        base_before=lambda: open_trained(setup, workdir, stage.after).base,
        shardings=functools.partial(shardings, mesh=setup.mesh, rules=setup.rules),
    )
