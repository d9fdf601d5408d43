"""A stage that comes from a directory made by another tool instead of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import decoder
from medmoe_jax.base.seam import Params
from medmoe_jax.checkpoints.finite import check_finite
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.released import Imported, read_adapter
from medmoe_jax.checkpoints.upcycled import holds_experts, read_upcycled
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.training.finish import save_end
from medmoe_jax.training.leaves import match_leaves
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.terminal import note
from medmoe_jax.training.trained import load_final, open_trained


def import_stage(run: Run, folder: str | Path, name: str = "") -> str:
    """Finish a stage with the banks and leaves of an adapter, or with a whole upcycled model.

    Afterwards the work directory is as if the stage had been trained; its manifest names the files
    the banks come from, by content.

    Args:
      run: the recipe and its work directory.
      folder: see `checkpoints.released` and `checkpoints.upcycled`; its tensors' names tell which.
      name: of the stage; "" is the first that is not finished.

    Returns:
      The stage's name.

    Raises:
      UserError: the stage cannot be imported, or the directory does not fit it; nothing is written.
      LeaseError: another program writes into the work directory.
    """
    folder = fetched(folder)
    stage = _choose(run, name)
    roster = run.setup.roster(stage.name)
    read = _read_upcycled if holds_experts(folder) else _read_adapter
    given = read(stage, folder, roster)
    advice = "the files hold it, or their numbers times alpha / r are beyond float32"
    check_finite({"banks": given.banks, "base": given.base}, str(folder), advice)
    after = stage.recipe.after
    for one in run.chain(after):
        one.check()
    before = load_final(run.stage(after))["banks"] if after else {}
    banks = {bank: given.banks[bank] if bank in given.banks else before[bank] for bank in roster}
    banks = jax.tree.map(jax.device_put, banks, run.setup.shardings(banks))
    with only_writer(run.workdir):
        _choose(run, stage.name)  # nobody has finished it meanwhile
        fingerprint = stage.claim({}, given.files)
        for line in given.notes:
            note(line)
        save_end(
            stage,
            roster,
            {"banks": banks, "base": given.base},
            fingerprint,
            steps=0,
            metrics={},
            more=[{"op": "import", "files": given.files, "groups": given.groups}],
        )
    return stage.name


def _choose(run: Run, name: str) -> StageRun:
    if name:
        run.stage(name)  # there is such a stage
    unfinished = [stage for stage in run.stages if not stage.folder.is_finished()]
    chosen = [stage for stage in unfinished if name in ("", stage.name)]
    if not chosen:
        what = f"stage '{name}'" if name else "every stage"
        raise UserError(f"{what} is finished in {run.workdir}; import into another work directory")
    stack = chosen[0].recipe.stack
    if stack:
        raise UserError(
            f"stage '{chosen[0].name}' stacks ({', '.join(stack)}): no directory holds what comes "
            "of that; train it here"
        )
    return chosen[0]


def _read_adapter(stage: StageRun, folder, roster: Roster) -> Imported:
    base, (trained, before) = stage.setup.base, _base_of(stage)
    read = read_adapter(folder, base.config, base.family, roster, trained, before)
    leaves = jax.tree.map(jax.device_put, read.base, stage.setup.shardings(read.base))
    return dataclasses.replace(read, base=leaves)


def _read_upcycled(stage: StageRun, folder, roster: Roster) -> Imported:
    setup, (trained, before) = stage.setup, _base_of(stage)
    base = setup.base
    return read_upcycled(folder, base.config, base.family, roster, trained, before, setup.shardings)


def _base_of(stage: StageRun) -> tuple[set[str], Callable[[], Params]]:
    """The base leaves that a stage trains, and what gives the base that it starts from."""
    recipe = stage.recipe

    def before() -> Params:
        model = open_trained(stage.run, recipe.after)
        roster, base = model.roster, model.whole
        for bank in recipe.merge:
            roster, base = lifecycle.merge(roster, model.banks, base, bank, donate=True)
        return base

    return match_leaves(decoder.shapes(stage.setup.base.config), recipe.train_base), before
