"""Look for what would stop a run, and say what to do.

  medmoe doctor
  medmoe doctor --config=medcare:qwen2-1.5b --workdir=runs/mine

Without a configuration it looks at the machine: versions that do not fit each other, devices that
are not found or held by another process, memory and disk. With one also at the base, the tokenizer
and the template beside it, how a batch divides, the first rows of every source, and the tasks; with
a work directory at whether it can be written, who writes there, how far it is, whether its stages
are of this recipe, and at the configuration that it names. The base's weights and the rows behind
the first are not read. Ends with status 1 where a run would fail.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.text import Text

from medmoe_jax.api.in_training import task_scorer
from medmoe_jax.api.tasks import stage_evaluator
from medmoe_jax.checkpoints.lease import check_folder, writer
from medmoe_jax.cli import machine
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.machine import Finding
from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.batches import check_shards
from medmoe_jax.data.encoded_rows import encoded_at
from medmoe_jax.data.languages import detector, name_languages
from medmoe_jax.data.sources import check_targets, first_rows, streamed_rows
from medmoe_jax.data.templates import doubts
from medmoe_jax.errors import UserError
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import cache_folder, is_remote, nearest, place
from medmoe_jax.training.hooks.trackers import check_installed
from medmoe_jax.training.kept import is_kept
from medmoe_jax.training.reading import check_sources, place_batches
from medmoe_jax.training.recipe import check_learns
from medmoe_jax.training.run import Run, StageRun
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.stage import Stage
from medmoe_jax.training.terminal import console

_ROWS = 200  # of each source that are looked at
_COLOURS = {"ok": "green", "look": "yellow", "bad": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--workdir", default="", help="of a run, there already or not")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run the command."""
    if not any(word.startswith("--config") for word in rest):
        no_rest(rest)
    rows, bad = [], 0
    for found in _findings(arguments.workdir, rest):
        bad += found.state == "bad"
        remedy = f"\n-> {found.remedy}" if found.remedy else ""
        state = Text(found.state, _COLOURS[found.state])
        rows.append((state, found.what, Text(found.text + remedy)))
    console.print(ScreenTable(("", "looked at", "found"), (), rows))
    if bad:
        raise UserError(f"{bad} of the things looked at would stop a run")


def _findings(workdir: str, rest: list[str]) -> Iterator[Finding]:
    yield from machine.versions()
    yield from machine.holders()
    yield from machine.devices()
    places = {"what is fetched": cache_folder()}
    if workdir and not is_remote(place(workdir)):
        places["the run"] = Path(workdir).absolute()
    yield from machine.disk(places)
    setup = None
    try:
        if rest or (workdir and is_kept(workdir)):
            setup = open_setup(load_config(rest, workdir))
    except (UserError, OSError) as error:
        yield Finding("bad", "recipe", str(error))
    needed = _base_bytes(setup) if setup and jax.default_backend() == "cpu" else 0
    yield from machine.memory(needed)
    if setup:
        run = Run(setup, workdir)
        yield from _recipe(setup)
        yield from _tried("trackers", partial(check_installed, setup.config.run.trackers))
        trained = [stage.recipe for stage in run.stages if not (workdir and _is_imported(stage))]
        for stage in run.stages:
            if not (workdir and stage.folder.is_finished()):
                roster = setup.roster(stage.name)
                yield from _tried("recipe", partial(check_learns, stage.recipe, roster))
        if trained:
            yield from _tried("batch", partial(place_batches, setup))
        yield from _rows(setup, trained)
        tasks = (partial(one, run, _never) for one in (stage_evaluator, task_scorer))
        found = [finding for check in tasks for finding in _tried("tasks", check)]
        yield from dict.fromkeys(found)  # what is against both is told once
    if workdir:
        yield from _workdir(workdir, setup)


def _never() -> bool:
    """Nothing asks what is only looked at to stop."""
    return False


def _tried(what: str, check: Callable[[], object]) -> Iterator[Finding]:
    """What a check of training's own has against the run, if anything."""
    try:
        check()
    except (UserError, OSError) as error:
        yield Finding("bad", what, str(error))


def _base_bytes(setup: Setup) -> int:
    leaves = jax.tree.leaves(setup.base.abstract(setup.dtype))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _recipe(setup: Setup) -> Iterator[Finding]:
    stages = ", ".join(stage.name for stage in setup.stages) or "none"
    yield Finding("ok", "recipe", f"base of {setup.base.config.n_layers} layers; stages: {stages}")
    for text in (*setup.base.notes, *doubts(setup.template, setup.tokenizer)):
        yield Finding("look", "template", text)


def _is_imported(stage: StageRun) -> bool:
    """Whether training passes a stage over; where its records are damaged, `_stages` says so."""
    with contextlib.suppress(UserError):
        return stage.is_imported()
    return False


def _rows(setup: Setup, stages: Sequence[Stage]) -> Iterator[Finding]:
    """What the sources of some stages hold."""
    faults = {}
    for stage in stages:
        try:
            check_sources(setup, stage)
        except UserError as error:
            faults[str(error)] = None
    trained = dict.fromkeys(name for stage in stages for name in stage.sources)
    held_out = (name for stage in stages for name in stage.held_out)
    for name in dict.fromkeys((*trained, *held_out)):
        try:
            yield _source(setup, name, name in trained)
        except (UserError, OSError) as error:
            faults[str(error)] = None
    for text in faults:
        yield Finding("bad", "rows", text)


def _source(setup: Setup, name: str, trained: bool) -> Finding:
    """What the first rows of a source are once they are encoded. Raises UserError."""
    data, encoder = setup.config.data, setup.encoder
    fields = data.sources[name].to_dict()
    if fields["window"]:
        streamed_rows(data.to_dict(), name, encoder)
    most = max(_ROWS, data.shards)
    rows = first_rows(name, fields, data.ignore, most)
    if encoder.languages is not None:
        rows, _ = name_languages(rows, encoder.languages, detector(data.detect_language))
    encoded = [one for i in range(len(rows)) for one in encoded_at(rows, i, encoder.rows)]
    tokens = np.mean([len(one.tokens) for one in encoded])
    targets = [int(one.loss_mask[: data.length].sum()) for one in encoded]
    cut = sum(len(one.tokens) > data.length for one in encoded)
    if trained:
        check_shards(name, len(encoded), data.shards)
    if len(rows) < most and fields["reader"] == "rows":  # all of them, as they are trained
        check_targets(name, len(encoded), targets.count(0), data.length)
    text = (
        f"source '{name}', first {len(rows)} rows: {tokens:.0f} tokens each, "
        f"{np.mean(targets):.0f} of them targets; {cut} are cut at {data.length}, "
        f"{targets.count(0)} hold no target"
    )
    return Finding("look" if cut or 0 in targets else "ok", "rows", text)


def _workdir(workdir: str, setup: Setup | None) -> Iterator[Finding]:
    folder = place(workdir)
    try:
        check_folder(folder)
        who = writer(folder)
    except (UserError, OSError) as error:
        yield Finding("bad", "work directory", str(error))
        return
    if who:
        yield Finding("look", "work directory", who)
    if not is_remote(folder):
        yield from _writable(Path(workdir))
    if setup:
        yield from _stages(Run(setup, workdir))


def _stages(run: Run) -> Iterator[Finding]:
    """How far the stages of a work directory are, and what is against going on with them."""
    done = [stage.name for stage in run.stages if stage.folder.is_finished()]
    ready = [stage for stage in run.stages if stage.recipe.after in ("", *done)]
    found = [one for stage in ready for one in _tried("work directory", stage.check_claim)]
    yield from dict.fromkeys(found)  # what is against several is told once
    text = f"finished stages: {', '.join(done) or 'none'} of {len(run.stages)}"
    yield Finding("ok", "work directory", text)


def _writable(folder: Path) -> Iterator[Finding]:
    """A file is made and removed where the run would write; the folder itself is not made."""
    there = nearest(folder)
    trial = there / f".medmoe-doctor-{uuid.uuid4().hex}"
    try:
        with trial.open("wb") as file:
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
        trial.unlink()
    except OSError as error:
        text = f"{there} cannot be written: {error.strerror}"
        yield Finding(
            "bad", "work directory", text, "another --workdir, or the right to write there"
        )
        return
    yield Finding("ok", "work directory", f"{there} can be written")
