"""Running a recipe: every stage in order, resuming where the work directory says.

W/stages/<stage>/recipe.json    what the stage was started with
W/stages/<stage>/steps          checkpoints while it trains
W/stages/<stage>/metrics.jsonl  one line a step
W/stages/<stage>/final          its banks and trained base leaves
W/stages/<stage>/manifest.json  written last: the stage is finished
W/stages/<stage>/bad_batch.npz  the batch of a step that was not finite

With several processes all of them call everything here alike.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from medmoe_jax.adapters import adalora
from medmoe_jax.adapters.lifecycle import Roster
from medmoe_jax.base import trees
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.files import MetricsLog, read_metrics, write_bytes
from medmoe_jax.checkpoints.manifest import BankEntry, Manifest, library_versions
from medmoe_jax.checkpoints.processes import check_shared, from_first_process, to_host, union
from medmoe_jax.data.batches import BatchStream, make_stream
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.languages import detector, name_languages
from medmoe_jax.data.sources import RowFitter, check_source, open_source
from medmoe_jax.errors import UserError, field_names
from medmoe_jax.parallel import processes
from medmoe_jax.parallel.mesh import batch_shards
from medmoe_jax.parallel.rules import placed
from medmoe_jax.training import loop as loop_lib
from medmoe_jax.training import recipe as recipe_lib
from medmoe_jax.training import summary
from medmoe_jax.training.compiling import compile_ahead
from medmoe_jax.training.identity import (
    check_stage,
    claim,
    is_imported,
    operations,
    parent_fingerprint,
    stage_dir,
)
from medmoe_jax.training.parts import (
    jit_step,
    make_objective,
    make_optimiser,
    make_probe,
    place,
    split,
)
from medmoe_jax.training.placement import Placement
from medmoe_jax.training.recipe import Stage
from medmoe_jax.training.setup import Setup


@dataclass(frozen=True)
class Trained:
    """A model at the end of a stage (or the bare base), ready for the forward pass.

    Attributes:
      stage: its name, "" for the base.
      roster, banks, base: see `adapters.lifecycle`.
    """

    stage: str
    roster: Roster
    banks: Mapping[str, Any]
    base: Any


class StageData(NamedTuple):
    """What a stage reads.

    Attributes:
      stream: its batches, those of this process's data shards.
      placement: puts them on the mesh.
      digests: content of each of its sources.
      languages: of each source, how many rows named their language, had it detected, or are of
        unknown language; empty without a table of languages.
    """

    stream: BatchStream
    placement: Placement
    digests: dict[str, str]
    languages: dict[str, dict[str, int]]


def open_trained(setup: Setup, workdir: str | Path, name: str) -> Trained:
    """The model at the end of a finished stage; "" is the bare base.

    Raises:
      CheckpointError: the stage's files are damaged.
      UserError: the stage is not finished, or the work directory is of another base, tokenizer or
        other banks.
    """
    final_of = functools.partial(load_final, setup, workdir)
    for stage in recipe_lib.chain(setup.stages, name):
        check_stage(setup, workdir, stage)
    base = setup.load_base()
    roster, banks, base = recipe_lib.replay(
        setup.stages, name, base, setup.base.config, final_of, setup.place
    )
    return Trained(name, roster, banks, base)


def last_finished(setup: Setup, workdir: str | Path) -> str:
    """The last stage in order that is finished, or ""."""
    done = [s.name for s in setup.stages if store.is_finished(stage_dir(workdir, s.name))]
    return done[-1] if done else ""


def train(
    setup: Setup,
    workdir: str | Path,
    evaluate: Callable[[Trained], dict[str, Any]] = lambda _: {},
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run every stage that is not finished, in order.

    Args:
      setup: the configuration's parts.
      workdir: where everything is kept; the same directory continues the same recipe.
      evaluate: figures of the model at the end of a stage, for its manifest.
      stop: asked after every step, whether to save and end there.

    Raises:
      UserError: the work directory belongs to another recipe or base, or an input is bad.
      Stopped: `stop` said so.
    """
    check_shared(workdir)
    imported = {stage.name for stage in setup.stages if is_imported(workdir, stage)}
    for stage in (stage for stage in setup.stages if stage.name not in imported):
        for name in (name for name, weight in stage.mixture.items() if weight):
            source = setup.config.data.sources[name]
            check_source(name, source.path, source.reader)
    for stage in setup.stages:
        directory = stage_dir(workdir, stage.name)
        if stage.name in imported:
            check_stage(setup, workdir, stage)
            summary.note(f"stage '{stage.name}' was not trained here: skipped")
            continue
        data = open_data(setup, stage)
        fingerprint = claim(setup, workdir, stage, data.digests)
        if store.is_finished(directory):
            summary.note(f"stage '{stage.name}' is finished: skipped")
        else:
            _run_stage(setup, workdir, stage, data, fingerprint, evaluate, stop)
        data.stream.close()


def open_data(setup: Setup, stage: Stage) -> StageData:
    """A stage's batches, and what is known of its sources.

    Raises:
      UserError: a source cannot be read, a row is of a language that the table lacks, or the batch
        does not divide over the devices.
    """
    data = setup.config.data
    used = {name: weight for name, weight in stage.mixture.items() if weight}
    fit = RowFitter(Encoder(setup.tokenizer, setup.template), data.length)
    opened = {name: open_source(name, **data.sources[name].to_dict(), fit=fit) for name in used}
    if fit.shortened:
        summary.note(f"{fit.shortened:,} rows were shortened to fit {data.length} tokens")
    shards = batch_shards(setup.mesh) * setup.config.run.accumulation
    if data.global_batch % shards:
        raise UserError(
            f"data.global_batch: {data.global_batch} rows do not divide over "
            f"{batch_shards(setup.mesh)} devices x run.accumulation {setup.config.run.accumulation}"
        )
    datasets = {name: rows for name, (rows, _) in opened.items()}
    languages: dict[str, dict[str, int]] = {}
    if setup.languages:
        detect = detector(data.detect_language)
        for name in used:
            where = data.sources[name].path or data.sources[name].reader
            datasets[name], languages[name] = name_languages(
                f"data.sources.{name}: {where}", datasets[name], setup.languages.ids, detect
            )
    placement = Placement(setup.mesh, data.global_batch, data.shards)
    stream = make_stream(
        datasets,
        used,
        setup.tokenizer,
        setup.template,
        data.mask,
        data.length,
        data.global_batch,
        data.shards,
        data.seed,
        pack=data.pack,
        shard_ids=placement.shard_ids,
        languages=setup.languages.ids if setup.languages else None,
    )
    digests = {name: digest for name, (_, digest) in opened.items()}
    return StageData(stream, placement, digests, languages)


def load_final(setup: Setup, workdir, name: str) -> dict[str, Any]:
    """`{"banks", "base"}` at the end of a finished stage, on the mesh; one that is empty is absent.

    Raises:
      CheckpointError: the stage's files are damaged.
    """
    directory = stage_dir(workdir, name)
    tree = store.abstract_final(directory)
    return store.load_final(directory, placed(tree, setup.place(tree)))[0]


def _run_stage(setup, workdir, stage, data: StageData, fingerprint, evaluate, stop) -> None:
    directory, stream = stage_dir(workdir, stage.name), data.stream
    before = open_trained(setup, workdir, stage.after)
    roster, banks, base = recipe_lib.start(
        stage, before.roster, before.banks, before.base, setup.base.config, setup.place
    )
    steps = stage.config.steps
    steps = steps or max(1, round(stage.config.epochs * stream.steps_per_epoch(union)))
    rate = recipe_lib.schedule(stage.config, steps)
    plans = recipe_lib.plans(stage, roster, steps)
    optimiser = make_optimiser(stage, rate, plans)
    objective = make_objective(setup, stage, roster)
    frozen, trainable = split(stage, roster, banks, base)
    del base, banks, before
    summary.print_stage(stage, roster, trainable, frozen, setup.base.config, steps)
    summary.print_languages(data.languages)
    state, frozen = place(setup, optimiser, trainable, frozen)
    summary.print_undivided({"state": state, "frozen": frozen}, setup.rules)
    with store.StageCheckpoints(directory, keep=setup.config.run.keep) as checkpoints:
        restored = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
        )
        first = 0
        if restored is not None:
            state, first = restored.state, restored.step
            stream.set_state(restored.extra["data"])
            summary.note(f"stage '{stage.name}' continues after step {first} of {steps}")
        with field_names("run."):
            step_fn, how = compile_ahead(
                jit_step(setup, objective, optimiser, state),
                *(state, frozen, data.placement.abstract(stream.names, setup.config.data.length)),
            )
        summary.note(f"stage '{stage.name}': its step was {how}")
        with _open_logs(workdir, directory, first) as (metrics_log, board):
            loop = loop_lib.Loop(
                name=stage.name,
                step_fn=step_fn,
                stream=stream,
                place=data.placement,
                save=functools.partial(_save, checkpoints),
                keep=functools.partial(_keep_batch, directory),
                stop=stop,
                log=metrics_log,
                board=board,
                probe=make_probe(setup, objective, plans, frozen),
                rate=rate,
                first_layer={name: spec.start for name, (spec, _) in roster.items()},
                steps=steps,
                log_every=setup.config.run.log_every,
                save_every=setup.config.run.save_every,
            )
            state = loop_lib.run(loop, state, frozen, first)
        counts = stream.counters(union)
    summary.print_counts(stage, counts)
    read = {"rows": counts, "languages": data.languages}
    _finish(setup, workdir, stage, roster, state, frozen, steps, read, fingerprint, evaluate)


def _save(checkpoints: store.StageCheckpoints, state, extra: Mapping[str, Any]) -> None:
    """A checkpoint with the data state of every process's shards."""
    checkpoints.save(int(jax.device_get(state.step)), state, {"data": union(extra["data"])})


def _keep_batch(directory: Path, batch: Mapping[str, jax.Array]) -> Path:
    """Write a batch as it lay on the mesh, for a replay."""
    content = io.BytesIO()
    np.savez(content, **{name: to_host(array) for name, array in batch.items()})
    write_bytes(directory / "bad_batch.npz", content.getvalue())
    return directory / "bad_batch.npz"


def _finish(setup, workdir, stage, roster, state, frozen, steps, read, fingerprint, evaluate):
    """Evaluate the stage's end, then save it with its manifest."""
    directory = stage_dir(workdir, stage.name)
    banks = trees.overlay(frozen["banks"], state.trainable["banks"])
    final = {"banks": banks, "base": state.trainable["base"]}
    trained = jax.tree.map(lambda leaf: leaf.astype(setup.dtype), state.trainable["base"])
    base = trees.overlay(frozen["base"], trained)
    figures = evaluate(Trained(stage.name, roster, banks, base))
    ranks = {
        a.bank: adalora.ranks(roster[a.bank][0], banks[a.bank]) for a in stage.allocators.values()
    }
    summary.print_ranks(stage, ranks)
    last = from_first_process(lambda: read_metrics(directory / "metrics.jsonl")[-1])
    last.pop("router", None)
    metrics = {"train": last, "ranks": ranks, **read, "evaluation": figures}
    save_end(setup, workdir, stage, roster, final, fingerprint, steps=steps, metrics=metrics)


def save_end(
    setup: Setup,
    workdir: str | Path,
    stage: Stage,
    roster: Roster,
    final: Mapping[str, Any],
    fingerprint: str,
    *,
    steps: int,
    metrics: dict[str, Any],
    more: Sequence[dict[str, Any]] = (),
) -> None:
    """Save the end of a stage, which is finished then.

    Args:
      setup, workdir, stage: whose folder.
      roster: the stage's banks.
      final: `{"banks", "base"}`: their parameters, and the base leaves it has trained.
      fingerprint: of its recipe, from `identity.claim`.
      steps, metrics: for the manifest.
      more: operations for the manifest besides those of the recipe.

    Raises:
      CheckpointError: it cannot be written.
    """
    manifest = Manifest(
        stage=stage.name,
        after=stage.after,
        recipe_fingerprint=fingerprint,
        base_fingerprint=setup.base_fingerprint,
        parent_fingerprint=parent_fingerprint(workdir, stage),
        operations=[*operations(stage), *more],
        banks={
            name: BankEntry(roster[name][1], _shapes(params))
            for name, params in final["banks"].items()
        },
        steps=steps,
        metrics=metrics,
        versions=library_versions(),
    )
    directory = stage_dir(workdir, stage.name)
    store.save_final(directory, {k: v for k, v in final.items() if v}, manifest)


def _shapes(params) -> dict[str, list[int]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@contextlib.contextmanager
def _open_logs(workdir, directory: Path, first: int):
    """The log of metrics from step `first` on and TensorBoard's; None where others write them."""
    if processes.index():
        yield None, None
        return
    # Imported here: tensorboardX imports torch wherever that is installed.
    from tensorboardX import SummaryWriter

    with (
        MetricsLog(directory / "metrics.jsonl", first) as metrics_log,
        SummaryWriter(str(Path(workdir) / "tensorboard")) as board,
    ):
        yield metrics_log, board
