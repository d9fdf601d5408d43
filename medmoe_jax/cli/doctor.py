"""Look for what would stop a run, and say what to do.

  medmoe doctor
  medmoe doctor --config=medcare:qwen2-1.5b --workdir=runs/mine

Without a configuration it looks at the machine: versions that do not fit each other, devices that
are not found or held by another process, memory and disk. With one also at the base, the tokenizer
and the template beside it, and the first rows of every source; with a work directory at whether it
can be written, who writes there, how far it is, and at the configuration that it names. Ends with
status 1 where a run would fail.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.text import Text

from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.lease import writer
from medmoe_jax.cli import machine
from medmoe_jax.cli.configs import load_config
from medmoe_jax.cli.machine import Finding
from medmoe_jax.cli.session import no_rest
from medmoe_jax.data.sources import first_rows
from medmoe_jax.data.templates import doubts
from medmoe_jax.errors import UserError
from medmoe_jax.screen import ScreenTable
from medmoe_jax.storage.places import cache_folder, is_remote, place
from medmoe_jax.training.kept import is_kept
from medmoe_jax.training.reading import check_sources
from medmoe_jax.training.setup import Setup, open_setup
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
    if rest or (workdir and is_kept(workdir)):
        try:
            setup = open_setup(load_config(rest, workdir))
        except UserError as error:
            yield Finding("bad", "recipe", str(error))
    needed = _base_bytes(setup) if setup and jax.default_backend() == "cpu" else 0
    yield from machine.memory(needed)
    if setup:
        yield from _recipe(setup)
        yield from _rows(setup)
    if workdir:
        yield from _workdir(workdir, setup)


def _base_bytes(setup: Setup) -> int:
    leaves = jax.tree.leaves(setup.base.abstract(setup.dtype))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _recipe(setup: Setup) -> Iterator[Finding]:
    stages = ", ".join(stage.name for stage in setup.stages) or "none"
    yield Finding("ok", "recipe", f"base of {setup.base.config.n_layers} layers; stages: {stages}")
    for text in (*setup.base.notes, *doubts(setup.template, setup.tokenizer)):
        yield Finding("look", "template", text)


def _rows(setup: Setup) -> Iterator[Finding]:
    faults = {}
    for stage in setup.stages:
        try:
            check_sources(setup, stage)
        except UserError as error:
            faults[str(error)] = None
    for name in dict.fromkeys(name for stage in setup.stages for name in stage.sources):
        try:
            yield _source(setup, name)
        except UserError as error:
            faults[str(error)] = None
    for text in faults:
        yield Finding("bad", "rows", text)


def _source(setup: Setup, name: str) -> Finding:
    """What the first rows of a source are once they are encoded. Raises UserError."""
    data = setup.config.data
    rows = first_rows(name, data.sources[name].to_dict(), data.ignore, _ROWS)
    encoded = [one for row in rows for one in setup.encoder.rows(row)]
    tokens = np.mean([len(one.tokens) for one in encoded] or [0])
    targets = [int(one.loss_mask[: data.length].sum()) for one in encoded]
    cut = sum(len(one.tokens) > data.length for one in encoded)
    text = (
        f"source '{name}', first {len(rows)} rows: {tokens:.0f} tokens each, "
        f"{np.mean(targets or [0]):.0f} of them targets; {cut} are cut at {data.length}, "
        f"{targets.count(0)} hold no target"
    )
    return Finding("look" if cut or 0 in targets else "ok", "rows", text)


def _workdir(workdir: str, setup: Setup | None) -> Iterator[Finding]:
    folder = place(workdir)
    who = writer(folder)
    if who:
        yield Finding("look", "work directory", who)
    if not is_remote(folder):
        yield from _writable(Path(workdir))
    if setup:
        names = [stage.name for stage in setup.stages]
        done = [name for name in names if StageFolder.of(workdir, name).manifest.exists()]
        text = f"finished stages: {', '.join(done) or 'none'} of {len(names)}"
        yield Finding("ok", "work directory", text)


def _writable(folder: Path) -> Iterator[Finding]:
    """A file is made and removed where the run would write; the folder itself is not made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
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
