"""What work directories have logged, as pictures: losses, scores, routers, ranks, angles.

Every figure that a step has logged under a name with a `/` is drawn: those of one kind, such as
`overlap/BANKS/cos`, together. So what a new loss or a hook adds shows without being named here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation.html import (
    HeatMapSection,
    IntervalsSection,
    LinesSection,
    MomentsSection,
    Picture,
)
from medmoe_jax.storage.places import place
from medmoe_jax.training.kept import is_kept, kept

# Figures of every step that tell how training went; the others of no `/` count what was read.
_OF_STEPS = {"loss": "loss", "router_loss": "router loss", "gradient_norm": "gradient norm"}
_NOTES = {
    "eval": "Measured while the stage trains.",
    "router entropy": "Of a token's probabilities over its largest value, log E; 1 is undecided.",
    "router imbalance": "Experts times the largest share of the picks, in the worst layer; 1 is "
    "even.",
    "overlap cos": "Mean |cos| between the rows of the two banks; 0 is orthogonal.",
    "allocation kept": "Triplets with Λ that is not 0, of all sites, layers and experts.",
}
_USE = "Share of a batch's picks; every row sums to one. Layer 0 is the first of the bank's own."
_RANKS = "Rank that is left of each expert's matrix, mean over the experts."
_SCORES = "At the end of each stage, on the tasks of run.tasks, with 95% intervals."


class Logged(NamedTuple):
    """What a stage of a run has logged.

    Attributes:
      run: the work directory as it was given.
      stage: the stage's name.
      rows: a dictionary a step.
      figures: `metrics` of its manifest; {} where it is not finished.
    """

    run: str
    stage: str
    rows: list[dict[str, Any]]
    figures: dict[str, Any]


def read_logged(workdirs: Sequence[str]) -> list[Logged]:
    """What the stages of some runs have logged, in order.

    Raises:
      UserError: none is named, one is named twice, is no work directory, or has logged nothing.
    """
    if not workdirs:
        raise UserError("no work directory is named")
    if len(set(workdirs)) < len(workdirs):
        raise UserError("a work directory is named twice")
    return [one for workdir in workdirs for one in _read(workdir)]


def _read(workdir: str) -> list[Logged]:
    stages = place(workdir) / "stages"
    if not stages.is_dir():
        raise UserError(f"{workdir}: is no work directory: there is no folder 'stages' in it")
    order = list(kept(workdir).stages.order) if is_kept(workdir) else []
    names = sorted(path.name for path in stages.iterdir() if path.is_dir())
    found = []
    for name in [*(one for one in order if one in names), *(n for n in names if n not in order)]:
        folder = StageFolder.of(workdir, name)
        rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
        done = Manifest.read(folder.manifest).metrics if folder.manifest.is_file() else {}
        if rows or done:
            found.append(Logged(workdir, name, rows, done))
    if not any(one.rows or one.figures.get("evaluation") for one in found):
        raise UserError(f"{workdir}: nothing is logged there yet; train first")
    return found


def pictures(logged: Sequence[Logged]) -> Iterator[tuple[str, Picture]]:
    """Yields `(name of a file, picture)`: scores of all stages, then each stage's own figures.

    A name that is taken gets a number; large and small letters are one to some file systems.
    """
    taken: set[str] = set()
    for name, picture in _pictures(logged):
        numbered = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(2)))
        free = next(one for one in numbered if one.casefold() not in taken)
        taken.add(free.casefold())
        yield free, picture


def _pictures(logged: Sequence[Logged]) -> Iterator[tuple[str, Picture]]:
    several = len({one.run for one in logged}) > 1
    yield from _scores(logged, several)
    spans = _spans(_lines(logged, several=True))
    for stage in dict.fromkeys(one.stage for one in logged):
        own = [one for one in logged if one.stage == stage]
        for kind, lines in _lines(own, several).items():
            x, y, note = "step", kind, _NOTES.get(kind, _NOTES.get(kind.split()[0], ""))
            title = f"{stage}: {kind}"
            yield _file(stage, kind), LinesSection(title, lines, x, y, note, spans.get(kind))
        for one in own:
            whose = f"{one.run}, {stage}" if several else stage
            yield from _use(one, whose)
            yield from _ranks(one, whose)


def _file(*words: str) -> str:
    """The name of a picture's file, without its suffix; others may have the same."""
    return re.sub(r"[^\w.=-]+", "_", ".".join(words)).strip("_.")


def _scores(logged: Sequence[Logged], several: bool) -> Iterator[tuple[str, Picture]]:
    stages = list(dict.fromkeys(one.stage for one in logged if one.figures.get("evaluation")))
    series: dict[str, list[tuple[float, float, float] | None]] = {}
    for one in logged:
        for task, found in one.figures.get("evaluation", {}).items():
            name = f"{one.run}: {task}" if several else task
            values = series.setdefault(name, [None] * len(stages))
            values[stages.index(one.stage)] = (found["score"], found["low"], found["high"])
    if series:
        lines = list(series.items())
        yield (
            "scores",
            IntervalsSection("Scores by stage", stages, lines, "stage", "score", _SCORES),
        )


def _lines(
    logged: Sequence[Logged], several: bool
) -> dict[str, list[tuple[str, list[int], np.ndarray]]]:
    """Lines of a stage's figures, by their kind."""
    found: dict[str, list[tuple[str, list[int], np.ndarray]]] = {}
    for one in logged:
        for key in dict.fromkeys([*_OF_STEPS, *(key for row in one.rows for key in row)]):
            if key in _OF_STEPS:
                kind, name = _OF_STEPS[key], ""
            elif "/" in key:
                kind, name = _parted(key)
            else:
                continue
            known = [row for row in one.rows if isinstance(row.get(key), int | float)]
            if known:
                label = ": ".join(filter(None, (one.run if several else "", name))) or kind
                values = np.asarray([row[key] for row in known], np.float64)
                found.setdefault(kind, []).append((label, [row["step"] for row in known], values))
    return found


def _spans(
    lines: dict[str, list[tuple[str, list[int], np.ndarray]]],
) -> dict[str, tuple[float, float]]:
    """The least and the greatest value of every kind, over all stages, that has a finite one."""
    found = {kind: np.concatenate([values for *_, values in some]) for kind, some in lines.items()}
    finite = {kind: values[np.isfinite(values)] for kind, values in found.items()}
    return {
        kind: (float(values.min()), float(values.max()))
        for kind, values in finite.items()
        if len(values)
    }


def _parted(key: str) -> tuple[str, str]:
    """The kind of a figure and what it is of: `overlap/BANKS/cos` is `overlap cos` of BANKS."""
    group, _, rest = key.partition("/")
    of, slash, what = rest.rpartition("/")
    if group == "eval" or not slash:  # a task's name may hold anything
        return group, rest
    return f"{group} {what}", of


def _use(one: Logged, whose: str) -> Iterator[tuple[str, Picture]]:
    """How each router's layers used its experts, step by step."""
    routed = [row for row in one.rows if row.get("router")]
    for router in dict.fromkeys(name for row in routed for name in row["router"]):
        steps = {
            f"step {row['step']}": _table(one, row, router)
            for row in routed
            if router in row["router"]
        }
        layers, experts = np.shape(next(iter(steps.values())))
        names = [f"layer {n}" for n in range(layers)], [str(e) for e in range(experts)]
        title = f"{whose}: use of the experts of {router}"
        yield _file(whose, "use", router), MomentsSection(title, steps, *names, _USE)


def _table(one: Logged, row: dict[str, Any], router: str) -> np.ndarray:
    """Use of the experts `[layers, experts]` in a row. Raises UserError where it is none."""
    try:
        use_NxE = np.asarray(row["router"][router]["use"], np.float64)
    except (KeyError, TypeError, ValueError):
        use_NxE = np.empty(0)
    if use_NxE.ndim != 2:
        raise UserError(
            f"{one.run}: stage '{one.stage}', step {row['step']}: the router '{router}' has no "
            "table `use` of layers and experts"
        )
    return use_NxE


def _ranks(one: Logged, whose: str) -> Iterator[tuple[str, Picture]]:
    """The ranks that allocation has left, by site and layer."""
    for bank, sites in one.figures.get("ranks", {}).items():
        matrix = [np.mean(ranks_NxE, axis=1).tolist() for ranks_NxE in sites.values()]
        layers = [f"layer {n}" for n in range(len(matrix[0]))]
        title = f"{whose}: ranks of {bank}"
        yield (
            _file(whose, "ranks", bank),
            HeatMapSection(title, matrix, list(sites), layers, "", "", _RANKS),
        )
