"""Training a run: every stage in order, resuming where the work directory says.

With several processes all of them call everything here alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.agreement import check_shared, from_first_process, union
from medmoe_jax.checkpoints.finite import not_finite
from medmoe_jax.checkpoints.lease import only_writer
from medmoe_jax.checkpoints.stage_records import check_metrics
from medmoe_jax.checkpoints.staging import check_processes
from medmoe_jax.data.sources import Opened
from medmoe_jax.errors import UserError
from medmoe_jax.parallel import processes
from medmoe_jax.storage.places import place
from medmoe_jax.training import loop as loop_lib
from medmoe_jax.training import summary
from medmoe_jax.training.finish import Evaluate, finish
from medmoe_jax.training.held_out import HeldOut
from medmoe_jax.training.hooks.bar import Bar
from medmoe_jax.training.hooks.evaluations import Evaluations, Measure
from medmoe_jax.training.hooks.faults import Faults, keep_batch
from medmoe_jax.training.hooks.figures import figures
from medmoe_jax.training.hooks.profiler import Profiler
from medmoe_jax.training.hooks.protocol import Hook
from medmoe_jax.training.hooks.trackers import Trackers
from medmoe_jax.training.hooks.writers import Checked, MetricsFile, TensorBoard
from medmoe_jax.training.preparing import Prepared, prepare
from medmoe_jax.training.reading import (
    StageData,
    check_sources,
    open_data,
    open_rows,
    place_batches,
)
from medmoe_jax.training.recipe import budget_schedules, check_learns
from medmoe_jax.training.recomputation import compile_step, told_what_fits
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.step import TrainState
from medmoe_jax.training.terminal import note

# Hooks for a stage that is about to train.
MakeHooks = Callable[[Prepared], Sequence[Hook]]
# What scores the tasks of `stages.*.evaluation` while a stage trains.
MakeMeasure = Callable[[Prepared], Measure]


@dataclass(frozen=True)
class _Callers:
    """What the caller of `train` plugs in, and what all stages share.

    Attributes:
      confirm_lease: ends a run that lost it.
      trackers: of the run.
    """

    evaluate: Evaluate
    stop: Callable[[], bool]
    more_hooks: MakeHooks
    score_tasks: MakeMeasure | None
    confirm_lease: Callable[[], None]
    trackers: Trackers


def train(
    run: Run,
    evaluate: Evaluate = lambda _: {},
    stop: Callable[[], bool] = lambda: False,
    more_hooks: MakeHooks = lambda _: (),
    score_tasks: MakeMeasure | None = None,
) -> None:
    """Run every stage that is not finished, in order.

    Args:
      run: the recipe and its work directory.
      evaluate: figures of the model at the end of a stage, for its manifest.
      stop: asked after every step, whether to save and end there.
      more_hooks: gives hooks of the caller, told after those which add metrics and before those
        which write them.
      score_tasks: gives what scores a stage's `evaluation.tasks` while it trains.

    Raises:
      UserError: the work directory belongs to another recipe or base, or an input is bad.
      LeaseError: another program writes into the work directory.
      StorageError: it cannot be written.
      Stopped: `stop` said so.
    """
    check_processes(place(run.workdir))
    check_shared(run.workdir)
    config = run.setup.config
    trackers = Trackers(config.run.trackers, run.workdir, config.to_dict())
    with only_writer(run.workdir) as confirm_lease, trackers:
        callers = _Callers(evaluate, stop, more_hooks, score_tasks, confirm_lease, trackers)
        _run_stages(run, callers)


def _run_stages(run: Run, callers: _Callers) -> None:
    imported = {stage.name for stage in run.stages if stage.is_imported()}
    left = [s for s in run.stages if not (s.name in imported or s.folder.is_finished())]
    for stage in left:
        check_learns(stage.recipe, run.setup.roster(stage.name))
    for stage in run.stages:
        if stage.name not in imported:
            check_sources(run.setup, stage.recipe)
            if stage.recipe.config.evaluation.tasks and callers.score_tasks is None:
                raise UserError(
                    f"stages.{stage.name}.evaluation.tasks: nothing was given that scores tasks "
                    "(`train(score_tasks=...)`)"
                )
    trained = [stage.recipe for stage in run.stages if stage.name not in imported]
    if trained:
        place_batches(run.setup)  # before rows are read, which may take long
    opened = open_rows(run.setup, trained)
    for stage in left[1:]:  # the first is about to begin
        _check_ahead(stage, opened)
    for stage in run.stages:
        if stage.name in imported:
            stage.check_whole()
            note(f"stage '{stage.name}' was not trained here: skipped")
            continue
        data = open_data(run.setup, stage.recipe, opened)
        callers.confirm_lease()
        fingerprint = stage.claim(data.digests)
        if stage.folder.is_finished():
            stage.check_whole()
            note(f"stage '{stage.name}' is finished: skipped")
        else:
            _run_stage(stage, data, fingerprint, callers)
        data.stream.close()


def _check_ahead(stage: StageRun, opened: Mapping[str, Opened]) -> None:
    """Raise UserError for a stage that could not begin, before those ahead of it are trained."""
    setup, recipe = stage.setup, stage.recipe
    data = open_data(setup, recipe, opened)
    if recipe.allocators:  # else nothing asks for the number of steps, for which rows are packed
        budget_schedules(recipe, setup.roster(stage.name), _steps(recipe, data))
    data.stream.close()


def _steps(recipe: Stage, data: StageData) -> int:
    """How many a stage takes."""
    given = recipe.config.steps
    return given or max(1, round(recipe.config.epochs * data.stream.steps_per_epoch(union)))


def _run_stage(stage: StageRun, data: StageData, fingerprint: str, callers: _Callers) -> None:
    """Train a stage and finish it; none of its arrays are held when the next one begins."""
    callers.trackers.begin()
    prepared, state, read = _make_steps(stage, data, fingerprint, callers)
    finish(prepared, state, read, fingerprint, callers.evaluate, callers.confirm_lease)


def _make_steps(
    stage: StageRun, data: StageData, fingerprint: str, callers: _Callers
) -> tuple[Prepared, TrainState, dict[str, Any]]:
    """The stage with the state that it ends with, and what it has read."""
    config, section = stage.setup.config, stage.recipe.config
    steps = _steps(stage.recipe, data)
    prepared, state = prepare(stage, steps)
    summary.print_stage(prepared, state)
    summary.print_languages(data.languages)
    summary.print_undivided({"state": state, "frozen": prepared.frozen}, stage.setup.rules)
    callers.confirm_lease()
    of = {"stage": stage.name, "recipe": fingerprint}
    log = MetricsFile(stage.folder.metrics, callers.confirm_lease)
    with store.StageCheckpoints(stage.folder, config.run.keep, of) as checkpoints:
        state, first, remat = _resume(prepared, checkpoints, data, state)
        step = compile_step(prepared, state, remat)
        scored = _evaluations(prepared, data, callers, checkpoints)
        loop = loop_lib.Loop(
            name=stage.name,
            step_fn=step.function,
            stream=data.stream,
            to_mesh=data.placement,
            save=functools.partial(_save, checkpoints, log, step.remat),
            stop=callers.stop,
            hooks=_hooks(prepared, scored, callers, checkpoints.saved, log),
            steps=steps,
            save_every=config.run.save_every,
        )
        with told_what_fits(prepared, _shapes(state), step):
            state = loop_lib.run(loop, state, prepared.frozen, first)
        read = {"rows": data.stream.counters(union), "languages": data.languages}
        found = scored.best if scored else None
        if found:
            read["best"] = {"step": found[0], section.evaluation.best: found[1]}
            if section.evaluation.final == "best" and found[0] != int(jax.device_get(state.step)):
                note(f"stage '{stage.name}' ends with step {found[0]}, its best")
                shapes = _shapes(state)
                del state  # it is not held twice
                state = checkpoints.restore_step(found[0], shapes)
    summary.print_counts(stage.name, read["rows"])
    return prepared, state, read


def _evaluations(
    prepared: Prepared,
    data: StageData,
    callers: _Callers,
    checkpoints: store.StageCheckpoints,
) -> Evaluations | None:
    """What scores the stage while it trains, where its recipe asks for it."""
    section = prepared.stage.recipe.config.evaluation
    if not section.every:
        return None
    measures: list[Measure] = []
    if data.held_out:
        measures.append(HeldOut(prepared, data.held_out))
    if section.tasks and callers.score_tasks is not None:
        measures.append(callers.score_tasks(prepared))
    frozen = max((one.freeze for one in prepared.budget_schedules.values()), default=0)
    metrics = prepared.stage.folder.metrics
    return Evaluations(section, measures, checkpoints.hold, metrics, frozen)


def _shapes(state: TrainState) -> TrainState:
    """The state's shapes on the mesh."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _resume(
    prepared: Prepared, checkpoints: store.StageCheckpoints, data: StageData, state: TrainState
) -> tuple[TrainState, int, str]:
    """The last checkpoint's state, step and rematerialisation, with the stream set to go on from
    there; "" where there is no checkpoint.
    """
    restored = checkpoints.restore(_shapes(state))
    if restored is None:
        return state, 0, ""
    check_metrics(prepared.stage.folder, restored.step, restored.extra["metrics"])
    data.stream.set_state(restored.extra["data"])
    name, steps = prepared.stage.name, prepared.steps
    note(f"stage '{name}' continues after step {restored.step} of {steps}")
    return restored.state, restored.step, restored.extra.get("remat", "")


def _save(
    checkpoints: store.StageCheckpoints,
    log: MetricsFile,
    remat: str,
    step: int,
    state: TrainState,
    extra: Mapping[str, Any],
) -> None:
    """A checkpoint with the data state of every process's shards, the mark of the metrics and what
    a step recomputes, with which the stage goes on.
    """
    metrics = from_first_process(log.mark)
    kept = {"data": union(extra["data"]), "metrics": metrics, "remat": remat}
    checkpoints.save(step, state, kept)


def _hooks(
    prepared: Prepared,
    scored: Evaluations | None,
    callers: _Callers,
    saved: Callable[[], list[int]],
    log: MetricsFile,
) -> list[Hook]:
    """All hooks of a stage: what may end it, what adds metrics, the caller's, what writes."""
    stage = prepared.stage
    settings, folder = stage.setup.config.run, stage.folder
    hooks: list[Hook] = [
        Checked(callers.confirm_lease),
        Faults(
            functools.partial(keep_batch, folder.bad_batch),
            {name: spec.start for name, (spec, _) in prepared.roster.items()},
            lambda: not_finite(prepared.frozen),
            prepared.rate,
            saved,
        ),
        *figures(prepared),
        # An evaluation takes its time.
        *([scored, Checked(callers.confirm_lease)] if scored else []),
        *callers.more_hooks(prepared),
    ]
    if processes.index() == 0:
        hooks.append(log)
        hooks.append(TensorBoard(place(stage.run.workdir) / "tensorboard", settings.log_every))
        hooks.extend(callers.trackers.hooks(settings.log_every))
        hooks.append(Bar(settings.log_every))
        if settings.profile:
            hooks.append(Profiler(folder.profile, *settings.profile))
    return hooks
