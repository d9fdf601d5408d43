"""A stage whose mixing weights are fitted on a few rows of a task instead of trained.

Every step sees every row, without dropout, so a fit depends on its rows and its settings alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.adapters.bank import mixing
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.encoded_rows import EncodedRows
from medmoe_jax.errors import UserError
from medmoe_jax.parallel.mesh import replicated
from medmoe_jax.training.finish import save_end
from medmoe_jax.training.fit_methods import METHODS, Problem, mean_loss
from medmoe_jax.training.fit_rows import batch_of, read_task
from medmoe_jax.training.parts import make_objective
from medmoe_jax.training.preparing import Prepared, prepare
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.step import Objective
from medmoe_jax.training.terminal import StepBar, note


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
      skills: names of the E stacked banks.
      weights: their mixing weights, after the softmax if there is one, `[N][E]`: one row for each
        of the bank's layers, or a single one.
      loss_before, loss: mean negative log-likelihood a target token plus the stage's losses on
        parameters, nats, at the starting weights and at these.
      rows: how many it was fitted on.
    """

    skills: list[str]
    weights: list[list[float]]
    loss_before: float
    loss: float
    rows: int


def fit_stage(
    run: Run,
    name: str,
    path: str | Path,
    method: str = "gradient",
    steps: int = 100,
    seed: int = 0,
) -> Fit:
    """Finish a stage by fitting the mixing weights of the bank that it stacks.

    Of all weights on the way, the starting ones included, those of the lowest loss are kept.
    Afterwards the work directory is as if the stage had been trained. Where it was fitted with the
    same rows and settings already, what was found then is returned.

    Args:
      run: the recipe and its work directory; the stages before this one are finished.
      name: of the stage.
      path: the rows: a JSON or JSONL file, or a built data set.
      method: a key of METHODS.
      steps: updates, or generations.
      seed: of what the method draws.

    Raises:
      UserError: the stage trains anything but mixing weights, the rows are bad, or the stage was
        made otherwise.
      LeaseError: another program writes into the work directory.
    """
    stage = find(run, name)
    for one in run.chain(stage.recipe.after):
        one.check()
    rows, digest = read_task(run.setup, name, path)
    origin = {"rows": digest, "method": method, "steps": steps, "seed": seed}
    with only_writer(run.workdir) as confirm_lease:
        return _fit(stage, rows, origin, confirm_lease)


def _fit(
    stage: StageRun, rows: EncodedRows, origin: Mapping[str, Any], confirm_lease: Callable[[], None]
) -> Fit:
    """What `fit_stage` gives; `origin` is what the fit depends on, for the records."""
    name, setup = stage.name, stage.setup
    if stage.is_claimed():
        stage.claim({}, origin)
    if stage.folder.is_finished():
        stage.check_whole()
        note(f"stage '{name}' is finished: skipped")
        return Fit(**Manifest.read(stage.folder.manifest).metrics["fit"])
    batch, parts = batch_of(setup, name, rows)
    prepared, state = prepare(stage, origin["steps"])
    prepared = replace(prepared, objective=_still(prepared, parts))
    loss = jax.jit(
        functools.partial(mean_loss, prepared.objective),
        out_shardings=replicated(setup.mesh),
    )
    before = _finite(name, loss(state.trainable, prepared.frozen, batch))
    problem = Problem(prepared, state, batch, loss)
    trainable = _search(problem, before, origin["method"], origin["seed"])
    after = _finite(name, loss(trainable, prepared.frozen, batch))
    banks = prepared.banks(state._replace(trainable=trainable))
    skills, weights = mixing_weights(stage.recipe, prepared.roster, banks)
    fit = Fit(skills, weights, before, after, len(rows))
    confirm_lease()
    save_end(
        stage,
        prepared.roster,
        {"banks": banks, "base": {}},
        stage.claim({}, origin),
        steps=origin["steps"],
        metrics={"fit": asdict(fit)},
        more=[{"op": "fit", **origin}],
    )
    return fit


def find(run: Run, name: str) -> StageRun:
    """A stage of which only mixing weights are to be found.

    Raises:
      UserError: there is no such stage, or it trains anything else.
    """
    stage = run.stage(name)
    roster = run.setup.roster(name)
    trained = [bank for bank, (_, state) in roster.items() if state in ("train", "gate")]
    recipe = stage.recipe
    if trained != _mixed(recipe, roster) or len(trained) != 1 or recipe.train_base:
        raise UserError(
            f"stage '{name}' does not train the mixing weights of one bank that it stacks with "
            "gate 'skill', and nothing else; run medmoe train for it"
        )
    return stage


def _mixed(stage: Stage, roster: Roster) -> list[str]:
    """The banks that a stage stacks under mixing weights."""
    return [bank for bank in stage.stack if roster[bank][0].gate == "skill"]


def mixing_weights(
    stage: Stage, roster: Roster, banks: Mapping[str, Any]
) -> tuple[list[str], list[list[float]]]:
    """The skills that a stage of `find` has stacked, and their mixing weights `[N][E]`."""
    (name,) = _mixed(stage, roster)
    weights_NxE = mixing(roster[name][0], banks[name]["mix"]["weight"])
    return list(stage.stack[name][0]), np.asarray(weights_NxE).tolist()


def _still(prepared: Prepared, parts: int) -> Objective:
    """The stage's objective without dropout, over `parts` micro-batches."""
    stage = prepared.stage
    still = {k: (spec.replace(dropout=0.0), s) for k, (spec, s) in prepared.roster.items()}
    return replace(make_objective(stage.setup, stage.recipe, still), accumulation=parts)


def _search(problem: Problem, before: float, method: str, seed: int) -> Any:
    """The best trainable tree that the method finds, or the start, whose loss is `before`."""
    prepared = problem.prepared
    name, every = prepared.stage.name, prepared.stage.setup.config.run.log_every
    best, least = jax.tree.map(jnp.copy, problem.state.trainable), before
    with contextlib.closing(StepBar(name, prepared.steps, 0, every)) as bar:
        for step, (values, found) in enumerate(METHODS[method](problem, seed), 1):
            lowest = min(_finite(name, value) for value in values)
            if lowest < least:
                best, least = jax.tree.map(jnp.copy, found), lowest
            bar.update(step, f"loss {lowest:.4f}")
    return best


def _finite(name: str, loss: Any) -> float:
    if not math.isfinite(loss):
        raise UserError(
            f"stage '{name}': the loss is {float(loss)}; lower learning_rate, or look at the rows"
        )
    return float(loss)
