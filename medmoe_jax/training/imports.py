"""A stage whose banks come from another tool's adapter directory instead of training."""

from __future__ import annotations

from pathlib import Path

import jax

from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.released import Imported, read_adapter
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.rules import shardings
from medmoe_jax.training import summary
from medmoe_jax.training.identity import check_stage, claim, stage_dir
from medmoe_jax.training.recipe import Stage, chain, next_roster
from medmoe_jax.training.run import load_final, save_end
from medmoe_jax.training.setup import Setup


def import_stage(setup: Setup, workdir: str | Path, folder: str | Path, name: str = "") -> str:
    """Finish a stage with the banks of an adapter directory.

    Afterwards the work directory is as if the stage had been trained; its manifest names the files
    the banks come from, by content.

    Args:
      setup: the configuration's parts.
      workdir: of the run.
      folder: see `checkpoints.released`.
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
    given = read_adapter(folder, setup.base.config, setup.base.family, roster)
    for one in chain(setup.stages, stage.after):
        check_stage(setup, workdir, one)
    before = load_final(setup, workdir, stage.after)["banks"] if stage.after else {}
    banks = {bank: given.banks[bank] if bank in given.banks else before[bank] for bank in roster}
    banks = jax.tree.map(jax.device_put, banks, shardings(banks, setup.mesh, setup.rules))
    fingerprint = claim(setup, workdir, stage, {}, given.files)
    _print(given, roster)
    save_end(
        setup,
        workdir,
        stage,
        roster,
        {"banks": banks},
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
    for what, names in (("trains leaves of the base", stage.train_base), ("stacks", stage.stack)):
        if names:
            raise UserError(
                f"stage '{stage.name}' {what} ({', '.join(names)}): no adapter directory holds "
                "what comes of that; train it here"
            )
    return stage


def _print(given: Imported, roster: Roster) -> None:
    for group, entry in given.groups.items():
        for bank in entry["banks"]:
            spec = roster[bank][0]
            line = f"group '{group}' is bank '{bank}': {' '.join(spec.sites)}, "
            line += f"{spec.experts} x {spec.rank}, s {entry['s']:g}"
            if entry["s"] != spec.s:
                line += f"; the bank's s is {spec.s:g}, so B is multiplied by their quotient"
            summary.note(line)
