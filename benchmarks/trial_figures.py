"""One figure a question of docs/trials.md, from the results alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.trial_tables import (
    Pair,
    Results,
    Values,
    best_skill,
    interval,
    mean_loss,
    minus,
    pairs,
)
from configs import trial_families, trial_medcare, trial_skills

FOLDER = Path(__file__).parents[1] / "docs" / "figures" / "trials"
SEVERAL = "mean and 95% interval over seeds"


def draw(question: str, results: Mapping[str, Results]) -> Path:
    """Write the figure of a question; the same results give the same file."""
    path = FOLDER / f"{question}.svg"
    path.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": question, "font.size": 9}):
        FIGURES[question](results).savefig(path, metadata={"Date": None}, bbox_inches="tight")
    # The writer leaves blanks at the ends of lines.
    text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text + "\n", encoding="utf-8")
    return path


def medcare(results: Mapping[str, Results]) -> Figure:
    """What every stage 2 forgets, over what it learns."""
    arms = results["medcare"]["arms"]
    start = {seed: figures["without_noise"] for seed, figures in arms["aggregate"].items()}
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    sets = tuple(trial_medcare.ALIGNMENT), tuple(trial_medcare.KNOWLEDGE)
    for arm, mark in zip(trial_medcare.ALIGNED, "os^Dv<>", strict=True):
        change = [minus(mean_loss(arms[arm], names), mean_loss(start, names)) for names in sets]
        (x, *x_ends), (y, *y_ends) = map(interval, change)
        axes.errorbar(x, y, _ends(y, y_ends), _ends(x, x_ends), fmt=mark, capsize=2, label=arm)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.set_xlabel("alignment sets: change of the loss in stage 2, nats (left is learnt)")
    axes.set_ylabel("knowledge sets: the same (up is forgotten)")
    axes.set_title(f"MedCare's stage 2 ({SEVERAL})")
    return figure


def mixture(results: Mapping[str, Results]) -> Figure:
    """MING-MOE's loss over that of two LoRAs, by mixture."""
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    others = {"lora": "as many trainable parameters", "lora_active": "as many active ones"}
    for shift, (other, label) in zip((-0.12, 0.12), others.items(), strict=True):
        values = [
            minus(mean_loss(found["arms"]["experts"]), mean_loss(found["arms"][other]))
            for found in results.values()
        ]
        _points(axes, np.arange(len(values)) + shift, values, f"LoRA with {label}")
    names = [name.removeprefix("mixture_") for name in results]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("tasks in the mixture")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_ylabel("MING-MOE − LoRA, nats")
    axes.set_title(f"Below 0 MING-MOE is better ({SEVERAL})")
    axes.legend(frameon=False)
    return figure


def skills(results: Mapping[str, Results]) -> Figure:
    """Loss on tasks that no skill has seen, by how many of their rows were read."""
    found = results["skills"]
    figure = Figure(figsize=(7, 3.4))
    rows = list(trial_skills.ROWS)
    names = {"route": "skills + router", "lora": "LoRA", "started": "LoRA on mixed skills"}
    for axes, task in zip(
        figure.subplots(1, len(trial_skills.TASKS)), trial_skills.TASKS, strict=True
    ):
        for arm, label in names.items():
            losses = [mean_loss(found["arms"][f"{arm}_{task}_{n}"], [task]) for n in rows]
            _points(axes, range(len(rows)), losses, label, "o-")
        best = [
            {
                seed: found["arms"][skill][seed]["loss"][task]
                for seed, skill in best_skill(found, task, n).items()
            }
            for n in rows
        ]
        _points(axes, range(len(rows)), best, "best single skill", "o--")
        axes.set_xticks(range(len(rows)), rows)
        axes.set_xlabel("rows of the task")
        axes.set_title(task)
        axes.set_ylabel("loss, nats")
    axes.legend(frameon=False)
    figure.suptitle(SEVERAL)
    figure.tight_layout()
    return figure


def families(results: Mapping[str, Results]) -> Figure:
    """Family experts less dense LoRA, by family; how families part in the routers, by layer."""
    arms = results["families"]["arms"]
    figure = Figure(figsize=(7.5, 3.6))
    left, right = figure.subplots(1, 2)
    scored = next(iter(arms["dense"].values()))["loss"]
    names = sorted(scored, key=lambda name: (name == trial_families.HELD_OUT, name))
    for shift, other in ((-0.15, "dense"), (0.15, "dense_last")):
        values = [minus(mean_loss(arms["last"], [n]), mean_loss(arms[other], [n])) for n in names]
        _points(left, np.arange(len(names)) + shift, values, f"last − {other}")
    left.set_xticks(range(len(names)), names, rotation=60, ha="right")
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set_ylabel("nats (below 0: families)")
    left.set_title("family experts − dense LoRA")
    left.margins(y=0.3)
    left.legend(frameon=False)
    for arm in ("everywhere", "unforced", "last"):
        found = [figures["routing"] for figures in arms[arm].values()]
        depth = found[0]["first_layer"] + np.arange(len(found[0]["divergence"]))
        values = np.array([one["divergence"] for one in found])
        right.plot(depth, values.mean(axis=0), "o-", markersize=3, label=arm)
        right.fill_between(depth, values.min(axis=0), values.max(axis=0), alpha=0.2)
    right.set_xlabel("layer")
    right.set_ylabel("0: alike, 1: apart")
    right.set_title("how families part in the routers")
    right.legend(frameon=False)
    figure.suptitle(f"{SEVERAL}; bands: all seeds")
    figure.tight_layout()
    return figure


def settings(results: Mapping[str, Results]) -> Figure:
    """The difference of every comparison, by setting."""
    figure = Figure(figsize=(7.5, 3.6))
    found: dict[str, list[Pair]] = {}
    for pair in pairs(results):
        found.setdefault(pair.what, []).append(pair)
    for axes, (what, some) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        differences = [minus(pair.method, pair.beside) for pair in some]
        _points(axes, range(len(some)), differences, what)
        axes.set_xticks(range(len(some)), [pair.setting for pair in some], rotation=60, ha="right")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(what.replace(" − ", "\n− ").replace(", ", ",\n"), fontsize=8)
        axes.margins(x=0.2)
    figure.suptitle(f"nats, below 0 the method is better; {SEVERAL}", fontsize=9)
    figure.tight_layout()
    return figure


def _points(
    axes: Axes, places: Sequence[float], values: Sequence[Values], label: str, mark: str = "o"
) -> None:
    """Means with their intervals."""
    found = [interval(one) for one in values]
    means = [mean for mean, _, _ in found]
    ends = np.array([_ends(mean, ends)[:, 0] for mean, *ends in found]).T
    axes.errorbar(places, means, ends, fmt=mark, capsize=2, markersize=4, label=label)


def _ends(mean: float, ends: Sequence[float]) -> np.ndarray:
    """How far the ends of an interval lie from its mean, [2, 1]; 0 where it has none."""
    low, high = ends
    return np.nan_to_num(np.array([[mean - low], [high - mean]]))


FIGURES: dict[str, Callable[[Mapping[str, Results]], Figure]] = {
    "medcare": medcare,
    "mixture": mixture,
    "skills": skills,
    "families": families,
    "settings": settings,
}
