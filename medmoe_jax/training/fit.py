"""A stage whose mixing weights are fitted on a few rows of a task instead of trained.

Axes: R rows, T tokens, N layers of the bank (or 1), E skills, P candidates, K weights of a fit.
Every step sees every row, without dropout, so a fit depends on its rows and its settings alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cma
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from medmoe_jax.adapters.bank import mixing
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.base.attention import row_slots
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.data.batches import epoch_batches
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.sources import open_source
from medmoe_jax.errors import UserError
from medmoe_jax.mesh_axes import SEQUENCE
from medmoe_jax.parallel import processes
from medmoe_jax.parallel.mesh import batch_sharding, put, replicated, round_up_rows
from medmoe_jax.training import recipe as recipe_lib
from medmoe_jax.training import summary
from medmoe_jax.training.config import source
from medmoe_jax.training.identity import check_stage, claim, is_claimed, stage_dir
from medmoe_jax.training.parts import (
    jit_step,
    make_objective,
    make_optimiser,
    place,
    split,
)
from medmoe_jax.training.recipe import Stage, chain, next_roster
from medmoe_jax.training.run import open_trained, save_end
from medmoe_jax.training.setup import Setup
from medmoe_jax.training.step import Objective, micro_batches, nll

SPREAD = 0.5  # standard deviation of the first candidates of CMA-ES around the starting weights


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
      skills: names of the E stacked banks.
      weights: their mixing weights, after the softmax if there is one, `[N][E]`.
      loss_before, loss: mean negative log-likelihood a target token plus the stage's terms, nats,
        at the starting weights and at these.
      rows: how many it was fitted on.
    """

    skills: list[str]
    weights: list[list[float]]
    loss_before: float
    loss: float
    rows: int


def fit_stage(
    setup: Setup,
    workdir: str | Path,
    name: str,
    path: str | Path,
    method: str = "gradient",
    steps: int = 100,
    seed: int = 0,
) -> Fit:
    """Finish a stage by fitting the mixing weights of the bank that it stacks.

    Afterwards the work directory is as if the stage had been trained. Where it was fitted with the
    same rows and settings already, what was found then is returned.

    Args:
      setup: the configuration's parts.
      workdir: of the run; the stages before this one are finished.
      name: of the stage.
      path: the rows: a JSON or JSONL file, or a built data set.
      method: a key of METHODS.
      steps: updates, or generations.
      seed: of what the method draws.

    Raises:
      UserError: the stage trains anything but mixing weights, the rows are bad, or the stage was
        made otherwise.
    """
    stage, directory = find(setup, name), stage_dir(workdir, name)
    for one in chain(setup.stages, stage.after):
        check_stage(setup, workdir, one)
    rows, digest = _read(setup, name, path)
    origin = {"rows": digest, "method": method, "steps": steps, "seed": seed}
    if is_claimed(workdir, stage):
        claim(setup, workdir, stage, {}, origin)
    if store.is_finished(directory):
        summary.note(f"stage '{name}' is finished: skipped")
        return Fit(**Manifest.read(directory / store.MANIFEST).metrics["fit"])
    batch, parts = _batch(setup, name, rows)
    before = open_trained(setup, workdir, stage.after)
    roster, banks, base = recipe_lib.start(
        stage, before.roster, before.banks, before.base, setup.base.config, setup.place
    )
    frozen, trainable = split(stage, roster, banks, base)
    del before, banks, base
    objective = _objective(setup, stage, roster, parts)
    optimiser = make_optimiser(stage, recipe_lib.schedule(stage.config, steps))
    state, frozen = place(setup, optimiser, trainable, frozen)
    loss = jax.jit(functools.partial(mean_loss, objective), out_shardings=replicated(setup.mesh))
    first = _finite(name, loss(state.trainable, frozen, batch))
    search = METHODS[method](setup, objective, optimiser, state, frozen, batch, steps, seed)
    quiet = processes.index() > 0
    with tqdm(search, desc=name, total=steps, unit="step", disable=quiet) as bar:
        for values, best in bar:
            state = state._replace(trainable=best)
            lowest = min(_finite(name, value) for value in values)
            bar.set_postfix_str(f"loss {lowest:.4f}", refresh=False)
    last = _finite(name, loss(state.trainable, frozen, batch))
    banks = trees.overlay(frozen["banks"], state.trainable["banks"])
    skills, weights = mixture(stage, roster, banks)
    fit = Fit(skills, weights, first, last, len(rows))
    save_end(
        setup,
        workdir,
        stage,
        roster,
        {"banks": banks, "base": {}},
        claim(setup, workdir, stage, {}, origin),
        steps=steps,
        metrics={"fit": asdict(fit)},
        more=[{"op": "fit", **origin}],
    )
    return fit


def find(setup: Setup, name: str) -> Stage:
    """A stage of which only mixing weights are to be found.

    Raises:
      UserError: there is no such stage, or it trains anything else.
    """
    by_name = {stage.name: stage for stage in setup.stages}
    if name not in by_name:
        raise UserError(
            f"there is no stage '{name}'; the recipe has {', '.join(by_name) or 'none'}"
        )
    stage, roster = by_name[name], {}
    for one in chain(setup.stages, name):
        roster = next_roster(one, roster)
    trained = [bank for bank, (_, state) in roster.items() if state in ("train", "gate")]
    if trained != _mixed(stage, roster) or len(trained) != 1 or stage.train_base:
        raise UserError(
            f"stage '{name}' does not train the mixing weights of one bank that it stacks with "
            "gate 'skill', and nothing else; run medmoe train for it"
        )
    return stage


def _mixed(stage: Stage, roster: Roster) -> list[str]:
    """The banks that a stage stacks under mixing weights."""
    return [bank for bank in stage.stack if roster[bank][0].gate == "skill"]


def mixture(stage: Stage, roster: Roster, banks) -> tuple[list[str], list[list[float]]]:
    """The skills that a stage of `find` has stacked, and their mixing weights `[N][E]`."""
    (name,) = _mixed(stage, roster)
    weights_NxE = mixing(roster[name][0], banks[name]["mix"]["weight"])
    return list(stage.stack[name][0]), np.asarray(weights_NxE).tolist()


def mean_loss(objective: Objective, trainable, frozen, batch: Mapping[str, jax.Array]):
    """What `step.gradients` differentiates, float32 scalar, without dropout and router losses."""

    def micro(sums, one):
        loss, (weight, _) = nll(objective.model, trainable, frozen, one)
        return (sums[0] + loss, sums[1] + weight), None

    zeros = (jnp.float32(0), jnp.float32(0))
    (loss, weight), _ = jax.lax.scan(micro, zeros, micro_batches(batch, objective.accumulation))
    specs = {spec.name: spec for spec in objective.specs}
    banks = trees.overlay(frozen["banks"], trainable["banks"])
    terms = sum(term.weight * term.value(specs, banks) for term in objective.terms)
    return loss / jnp.maximum(weight, 1.0) + terms


# A method yields, step by step, the losses that it has seen and the best trainable tree so far.
Steps = Iterator[tuple[np.ndarray, Any]]


def _by_gradient(setup, objective, optimiser, state, frozen, batch, steps, seed) -> Steps:
    """The stage's own optimiser and schedule; nothing is drawn."""
    del seed
    update = jit_step(setup, objective, optimiser, state)
    for _ in range(steps):
        state, metrics = update(state, frozen, batch)
        yield np.atleast_1d(metrics["loss"]), state.trainable


def _by_evolution(setup, objective, optimiser, state, frozen, batch, steps, seed) -> Steps:
    """CMA-ES: a generation's losses from one compiled call, and no gradient."""
    del optimiser
    start_K, tree_of = ravel_pytree(state.trainable)

    @functools.partial(jax.jit, out_shardings=replicated(setup.mesh))
    def losses(candidates_PxK, frozen, batch):
        one = functools.partial(mean_loss, objective)
        return jax.lax.map(lambda w_K: one(tree_of(w_K), frozen, batch), candidates_PxK)

    layout = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
    rng = np.random.default_rng(seed)
    options = {
        "maxiter": steps,
        "verbose": -9,
        # Left to itself it draws from numpy's global state.
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": math.nan,
    }
    search = cma.CMAEvolutionStrategy(np.asarray(start_K, np.float64), SPREAD, options)
    while not search.stop():
        candidates = search.ask()
        values_P = np.asarray(losses(np.asarray(candidates, np.float32), frozen, batch))
        search.tell(candidates, values_P.tolist())
        best = jax.device_get(tree_of(np.asarray(search.result.xbest, np.float32)))
        yield values_P, jax.device_put(best, layout)


METHODS: Mapping[str, Callable[..., Steps]] = {"gradient": _by_gradient, "cma": _by_evolution}


def _read(setup: Setup, name: str, path: str | Path):
    """A task's rows and a digest of their content."""
    fields = source(str(path)).to_dict()
    rows, digest = open_source(name, **fields, fit=lambda row: row)
    if not rows:
        raise UserError(f"{path}: no row in the file")
    encoder = Encoder(setup.tokenizer, setup.template, length=setup.config.data.length)
    cut = sum(encoder(row).truncated for row in rows)
    if cut:
        summary.note(f"task '{name}': {cut:,} of {len(rows):,} rows were cut at data.length")
    return rows, digest


def _batch(setup: Setup, name: str, rows) -> tuple[dict[str, jax.Array], int]:
    """All rows `[R, T]`, filled up to whole micro-batches of `run.score_batch`, and how many."""
    data = setup.config.data
    size = round_up_rows(setup.mesh, min(setup.config.run.score_batch, len(rows)))
    languages = setup.languages.ids if setup.languages else None
    parts = list(
        epoch_batches(
            rows,
            setup.tokenizer,
            setup.template,
            data.mask,
            data.length,
            size,
            languages=languages,
        )
    )
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if not arrays["loss_mask"].any():
        raise UserError(
            f"task '{name}': no token of its rows is a target, so there is nothing to fit; most "
            "likely data.length cuts them before their answers begin"
        )
    longest = int((arrays["segment_ids"] > 0).sum(1).max())
    length = row_slots(longest, setup.mesh.shape[SEQUENCE], data.length)
    where = batch_sharding(setup.mesh)
    return {k: put(a[:, :length], where) for k, a in arrays.items()}, len(parts)


def _objective(setup: Setup, stage: Stage, roster: Roster, parts: int) -> Objective:
    still = {name: (spec.replace(dropout=0.0), state) for name, (spec, state) in roster.items()}
    return replace(make_objective(setup, stage, still), accumulation=parts)


def _finite(name: str, loss: Any) -> float:
    if not math.isfinite(loss):
        raise UserError(
            f"stage '{name}': the loss is {float(loss)}; lower learning_rate, or look at the rows"
        )
    return float(loss)
