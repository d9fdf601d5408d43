"""How much a training step recomputes: the least that fits into memory, for `run.remat=auto`.

What a step needs beside its arguments, which are there already: its temporaries, results that are
no donated arguments, and its code. The compiler tells them, so nothing is tried by running out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from medmoe_jax.base.execution import REMAT
from medmoe_jax.errors import UserError, field_names
from medmoe_jax.parallel import large_pages, processes
from medmoe_jax.parallel.mesh import batch_shards, on_processors
from medmoe_jax.parallel.room import compiler_recomputes, room, taken
from medmoe_jax.training.compiling import compile_ahead
from medmoe_jax.training.parts import jit_step, recomputing
from medmoe_jax.training.placement import abstract_batch
from medmoe_jax.training.preparing import Prepared
from medmoe_jax.training.setup import AUTO
from medmoe_jax.training.step import Objective, TrainState
from medmoe_jax.training.terminal import note

_EXHAUSTED = "RESOURCE_EXHAUSTED"
_CLEARLY_LESS = 0.9  # of what a step needed that did not fit


class Step(NamedTuple):
    """A training step that is ready to run.

    Attributes:
      function: `(state, frozen, batch) -> (state, metrics)`.
      remat: what it recomputes, of `base.execution.REMAT`.
      needs: bytes of a device beside its arguments.
    """

    function: jax.stages.Compiled
    remat: str
    needs: int


def compile_step(prepared: Prepared, state: TrainState, remembered: str) -> Step:
    """The stage's step, compiled before the first one is due. All processes choose alike.

    Args:
      prepared, state: the stage, its arrays on the devices.
      remembered: what `auto` stood for when the stage began; "" = it begins now.

    Raises:
      UserError: not even the step that recomputes the most can be compiled for this memory.
    """
    setup, name = prepared.stage.setup, prepared.stage.name
    choices = setup.remats
    if setup.config.run.remat == AUTO and remembered in REMAT:
        choices = (remembered,)
    there = min(processes.gather(room(setup.mesh)))
    size = "large" if large_pages.in_use() else "small"
    paged = f", in {size} pages" if on_processors(setup.mesh) else ""
    for remat in choices:
        last = remat == choices[-1]
        try:
            with field_names("run."):
                step, arguments = _step(prepared, recomputing(prepared.objective, remat), state)
                function, how = compile_ahead(step, *arguments)
        except jax.errors.JaxRuntimeError as error:
            if _EXHAUSTED not in str(error):
                raise
            if last:
                raise UserError(_too_large(name, remat, error)) from error
            note(f"stage '{name}': remat '{remat}' does not fit")
            continue
        needs = taken(function.memory_analysis(), setup.mesh)
        said = f"its step was {how} and needs {_gib(needs)} of {_gib(there)} for itself{paged}"
        dear = compiler_recomputes(function.as_text() or "")
        also = ", and what the compiler takes by itself" if dear else ""
        if last or (needs <= there and not dear):
            note(f"stage '{name}': {said}; remat '{remat}'{also}")
            return Step(function, remat, needs)
        why = "does not fit" if needs > there else "fits only as the compiler recomputes"
        note(f"stage '{name}': {said}: remat '{remat}' {why}")
    raise AssertionError("the last choice returns or raises")


def _step(
    prepared: Prepared, objective: Objective, state: TrainState
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The stage's step and its arguments, of which the batch is a shape only."""
    setup, data = prepared.stage.setup, prepared.stage.setup.config.data
    batch = abstract_batch(setup.mesh, data.global_batch, data.length, bool(setup.languages))
    step = jit_step(setup, objective, prepared.optimiser, state)
    return step, (state, prepared.frozen, batch)


@contextlib.contextmanager
def told_what_fits(prepared: Prepared, shapes: TrainState, step: Step) -> Generator[None]:
    """Where the devices run out of memory meanwhile, say which setting needs clearly less.

    Args:
      prepared, shapes: the stage, and its state's shapes on the mesh.
      step: what runs.

    Raises:
      UserError: in place of the error that tells only that memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        found = _smaller(prepared, shapes, step)
        advice = found or "lower data.global_batch or data.length, or spread it over more devices"
        first = str(error).splitlines()[0]
        raise UserError(
            f"stage '{prepared.stage.name}': out of memory with run.remat '{step.remat}' and "
            f"run.accumulation {prepared.objective.accumulation}: {advice}; the same command then "
            f"goes on from the last checkpoint ({first})"
        ) from error


def _smaller(prepared: Prepared, shapes: TrainState, step: Step) -> str:
    """The first of the settings that recompute more, then of smaller micro-batches, that needs
    clearly less than the step; "" where none does.
    """
    setup = prepared.stage.setup
    limit = _CLEARLY_LESS * step.needs
    for settings, objective in _other_settings(prepared, step.remat):
        try:
            function, arguments = _step(prepared, objective, shapes)
            compiled = function.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if _EXHAUSTED not in str(error):
                raise
            continue
        needs = taken(compiled.memory_analysis(), setup.mesh)
        if needs <= limit:
            set_to = " ".join(f"--config.run.{name}={value}" for name, value in settings.items())
            return f"{set_to} needs {_gib(needs)} instead of {_gib(step.needs)}"
    return ""


def _other_settings(
    prepared: Prepared, remat: str
) -> Iterator[tuple[dict[str, str | int], Objective]]:
    """Fields of `config.run` that make a step smaller, with what is then minimised."""
    setup = prepared.stage.setup
    for more in REMAT[REMAT.index(remat) + 1 :]:
        yield {"remat": more}, recomputing(prepared.objective, more)
    own = prepared.objective.accumulation
    rows = setup.config.data.global_batch // batch_shards(setup.mesh)
    for parts in range(own + 1, rows + 1):
        if rows % parts == 0:
            objective = replace(recomputing(prepared.objective, REMAT[-1]), accumulation=parts)
            yield {"remat": REMAT[-1], "accumulation": parts}, objective


def _too_large(name: str, remat: str, error: Exception) -> str:
    first = str(error).splitlines()[0]
    return (
        f"stage '{name}': its step does not fit into the devices' memory, with run.remat "
        f"'{remat}'; raise run.accumulation, lower data.global_batch or data.length, or spread it "
        f"over more devices ({first})"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
