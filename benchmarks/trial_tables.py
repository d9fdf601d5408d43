"""The trials' tables in Markdown, from their results alone.

Results are `{"base": {seed: scores}, "arms": {arm: {seed: {**scores, "parameters", ...}}},
"choice": {arm: {factor: loss}}}` with scores `{"loss": {rows: nats}, "accuracy": {task: share}}`.
A cell is the mean over seeds ± their standard deviation (n − 1). A difference is taken seed by
seed, which removes what the seeds have in common, the same rows in the same order; behind it in
brackets stands its 95% interval by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks import trial_settings
from benchmarks.pages import markdown
from configs import trial_families, trial_medcare, trial_mixture, trial_skills

Results = Mapping[str, Any]
Values = dict[str, float]  # by seed


class Question(NamedTuple):
    """A part of the page: the trials that answer it, and what makes its tables of their results."""

    trials: tuple[str, ...]
    table: Callable[[Mapping[str, Results]], str]


def cell(values: Values, digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    numbers = list(values.values())
    if not numbers:
        return "–"
    spread = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"


def interval(values: Values) -> tuple[float, float, float]:
    """Mean over seeds and the ends of its 95% interval; the ends are NaN for one seed."""
    numbers = np.array(list(values.values()))
    if len(numbers) < 2:
        return float(numbers.mean()), np.nan, np.nan
    half = stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers)
    return float(numbers.mean()), float(numbers.mean() - half), float(numbers.mean() + half)


def difference(one: Values, other: Values, digits: int = 3) -> str:
    """The mean of the differences of the seeds that both have, and its interval."""
    found = minus(one, other)
    if not found:
        return "–"
    mean, low, high = interval(found)
    ends = f" ({low:+.{digits}f} to {high:+.{digits}f})" if len(found) > 1 else ""
    return f"{mean:+.{digits}f}{ends}"


def minus(one: Values, other: Values) -> Values:
    """The difference of the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def mean_loss(arm: Mapping[str, Any], names: Sequence[str] = ()) -> Values:
    """The mean loss over rows, each name weighing the same; none = all."""
    return {
        seed: float(np.mean([f["loss"][n] for n in names or f["loss"]])) for seed, f in arm.items()
    }


def accuracy(arm: Mapping[str, Any], task: str) -> Values:
    """The accuracy on a task in percent."""
    return {seed: 100 * figures["accuracy"][task] for seed, figures in arm.items()}


def medcare(results: Mapping[str, Results]) -> str:
    """Stage 1 with and without its noise bank, then every stage 2."""
    found = results["medcare"]
    arms = found["arms"]
    first = arms.get("aggregate", {})
    bare = {seed: figures["without_noise"] for seed, figures in first.items()}
    sets = tuple(trial_medcare.KNOWLEDGE), tuple(trial_medcare.ALIGNMENT)
    tasks = list(next(iter(found["base"].values()))["accuracy"])
    header = ["model", "knowledge, nats", "alignment, nats", *(f"{task}, %" for task in tasks)]

    def line(label: str, arm: Mapping[str, Any]) -> list[str]:
        scored = (cell(accuracy(arm, task), 1) for task in tasks)
        return [label, *(cell(mean_loss(arm, names)) for names in sets), *scored]

    def against(label: str, arm: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
        nats = (difference(mean_loss(arm, names), mean_loss(other, names)) for names in sets)
        return [
            label,
            *nats,
            *(difference(accuracy(arm, task), accuracy(other, task), 1) for task in tasks),
        ]

    lines = [
        line("base", found["base"]),
        line("stage 1, with the noise bank", first),
        line("stage 1, noise bank dropped", bare),
        against("dropped − with", bare, first),
        *(line(f"stage 2, `{arm}`", arms.get(arm, {})) for arm in trial_medcare.ALIGNED),
        *(
            against(f"`{arm}` − `frozen`", arms.get(arm, {}), arms.get("frozen", {}))
            for arm in trial_medcare.ALIGNED
            if arm != "frozen"
        ),
        against("`kept` − `orthogonal`", arms.get("kept", {}), arms.get("orthogonal", {})),
    ]
    return f"{markdown(header, lines)}\n\n{rates(found)}"


_MIXTURE = {"lora": "LoRA", "lora_active": "LoRA, active", "experts": "MING-MOE"}


def mixture(results: Mapping[str, Results]) -> str:
    """Mean loss by mixture, then by task of the twelve."""
    header = ["tasks", "base", *_MIXTURE.values(), "MING-MOE − LoRA", "MING-MOE − active"]
    lines = [
        _mixture_line(name.removeprefix("mixture_"), found, ()) for name, found in results.items()
    ]
    first = trial_mixture.FOUR[0]
    grown = [
        _mixture_line(f"{first}, among {name.removeprefix('mixture_')}", found, (first,))
        for name, found in results.items()
        if first in next(iter(found["base"].values()))["loss"]
    ]
    twelve = results["mixture_12"]
    tasks = [_mixture_line(task, twelve, (task,)) for task in trial_mixture.TWELVE]
    counts = [_parameters(twelve["arms"].get(arm, {})) for arm in _MIXTURE]
    last = ["trainable parameters", "0", *counts, "", ""]
    return (
        f"{markdown(header, [*lines, *grown, last])}\n\nThe twelve, one by one:\n\n"
        f"{markdown(['task', *header[1:]], tasks)}\n\n{rates(twelve)}"
    )


def _mixture_line(label: str, found: Results, names: Sequence[str]) -> list[str]:
    by_arm = {arm: mean_loss(found["arms"].get(arm, {}), names) for arm in _MIXTURE}
    differences = (difference(by_arm["experts"], by_arm[arm]) for arm in ("lora", "lora_active"))
    return [label, _base(found, names), *map(cell, by_arm.values()), *differences]


def _base(found: Results, names: Sequence[str]) -> str:
    """The base's mean loss over these rows, which no seed changes."""
    return f"{next(iter(mean_loss(found['base'], names).values())):.3f}"


def _parameters(arm: Mapping[str, Any]) -> str:
    return " ".join(f"{n:,}" for n in sorted({f["parameters"] for f in arm.values()})) or "–"


_FAMILIES = {
    "dense": "dense",
    "dense_last": "dense, last 2",
    "last": "families, last 2",
    "everywhere": "families, all",
    "unforced": "all, unforced",
}


def families(results: Mapping[str, Results]) -> str:
    """Loss by family, and of the language that was held out."""
    found, out = results["families"], trial_families.HELD_OUT
    scored = [name for name in next(iter(found["base"].values()))["loss"] if name != out]
    rows = {**{name: [name] for name in scored}, "**mean**": scored}
    rows[f"{out}, never trained on"] = [out]
    pairs = [("last", "dense"), ("last", "dense_last"), ("last", "everywhere")]
    header = ["family", "base", *_FAMILIES.values()]
    header += [f"{_FAMILIES[a]} − {_FAMILIES[b]}" for a, b in pairs]
    lines = []
    for label, names in rows.items():
        by_arm = {arm: mean_loss(found["arms"].get(arm, {}), names) for arm in _FAMILIES}
        differences = (difference(by_arm[a], by_arm[b]) for a, b in pairs)
        lines.append([label, _base(found, names), *map(cell, by_arm.values()), *differences])
    counts = (_parameters(found["arms"].get(arm, {})) for arm in _FAMILIES)
    lines.append(["trainable parameters", "0", *counts, *[""] * len(pairs)])
    return f"{markdown(header, lines)}\n\n{rates(found)}"


def best_skill(found: Results, task: str, rows: str) -> dict[str, str]:
    """By seed, the single skill with the least loss on the task's rows that the router sees."""
    skills = {name: found["arms"].get(name, {}) for name in trial_skills.SKILLS}
    out = {}
    for seed in found["base"]:
        seen = {
            name: by_seed[seed]["loss"][f"pick_{task}_{trial_skills.PICK[rows]}"]
            for name, by_seed in skills.items()
            if seed in by_seed
        }
        if seen:
            out[seed] = min(seen, key=seen.__getitem__)
    return out


_SKILL_ARMS = {
    "route": "skills + router",
    "lora": "plain LoRA",
    "started": "LoRA on mixed skills",
}


def skills(results: Mapping[str, Results]) -> str:
    """Loss on tasks that no skill has seen, then that of each skill and its mixing weights."""
    found = results["skills"]
    return f"{_downstream(found)}\n\n{_single(found)}\n\n{rates(found)}"


def _downstream(found: Results) -> str:
    header = ["task", "its rows", "base", "best single skill", *_SKILL_ARMS.values()]
    header += ["router − best skill", "router − LoRA", "on mixed skills − LoRA"]
    lines = []
    for task in trial_skills.TASKS:
        for rows in trial_skills.ROWS:
            best = best_skill(found, task, rows)
            one = {seed: found["arms"][b][seed]["loss"][task] for seed, b in best.items()}
            by_arm = {
                arm: mean_loss(found["arms"].get(f"{arm}_{task}_{rows}", {}), [task])
                for arm in _SKILL_ARMS
            }
            pairs = ((by_arm["route"], one), (by_arm["route"], by_arm["lora"]))
            pairs += ((by_arm["started"], by_arm["lora"]),)
            cells = [_base(found, [task]), cell(one), *map(cell, by_arm.values())]
            lines.append([task, rows, *cells, *(difference(a, b) for a, b in pairs)])
    return markdown(header, lines)


def _single(found: Results) -> str:
    header = ["skill, alone", "loss on its own set", "of the base"]
    header += [
        f"{what} {task}" for task in trial_skills.TASKS for what in ("loss on", "weight for")
    ]
    lines = []
    for number, name in enumerate(trial_skills.SKILLS):
        alone = found["arms"].get(name, {})
        cells = [cell(mean_loss(alone, [name])), _base(found, [name])]
        for task in trial_skills.TASKS:
            routed = found["arms"].get(f"route_{task}_all", {})
            weights = {seed: figures["mix"][number] for seed, figures in routed.items()}
            cells += [cell(mean_loss(alone, [task])), cell(weights)]
        lines.append([name, *cells])
    return markdown(header, lines)


class Pair(NamedTuple):
    """A method in one setting, and what it is compared with: their losses."""

    what: str
    setting: str
    method: Values
    beside: Values
    parameters: str


def pairs(results: Mapping[str, Results]) -> Iterator[Pair]:
    """Every comparison of benchmarks/trial_settings.py."""
    noise = results["settings_noise"]["arms"]
    sets = {"knowledge": trial_medcare.KNOWLEDGE, "alignment": trial_medcare.ALIGNMENT}
    for rows, names in sets.items():
        for setting in trial_settings.NOISE.settings:
            kept = noise.get(f"aggregate_{setting}", {})
            dropped = {seed: figures["without_noise"] for seed, figures in kept.items()}
            losses = (mean_loss(arm, tuple(names)) for arm in (dropped, kept))
            yield Pair(f"noise bank dropped − kept, {rows}", setting, *losses, _parameters(kept))
    for trial, what, config in (
        ("settings_experts", "MING-MOE − LoRA", trial_settings.EXPERTS),
        ("settings_families", "families − LoRA in the same layers", trial_settings.FAMILIES),
    ):
        arms = results[trial]["arms"]
        for setting in config.settings:
            one, other = (arms.get(f"{arm}_{setting}", {}) for arm in config.rates)
            yield Pair(what, setting, mean_loss(one), mean_loss(other), _parameters(one))


def settings(results: Mapping[str, Results]) -> str:
    """Arms of the other trials in every setting: the method, what it is compared with, the gap."""
    header = ["method − beside it", "setting", "method", "beside it", "difference", "parameters"]
    lines = [
        [
            pair.what,
            pair.setting,
            cell(pair.method),
            cell(pair.beside),
            difference(pair.method, pair.beside),
            pair.parameters,
        ]
        for pair in pairs(results)
    ]
    return markdown(header, lines)


def rates(found: Results) -> str:
    """The factor of the recipe's learning rate that every arm has taken."""
    taken: dict[str, list[str]] = {}
    for arm, by_factor in found["choice"].items():
        if by_factor:
            taken.setdefault(min(by_factor, key=by_factor.__getitem__), []).append(f"`{arm}`")
    parts = (f"{factor} for {', '.join(arms)}" for factor, arms in sorted(taken.items()))
    return f"Learning rates, times the recipe's: {'; '.join(parts)}."


TABLES = {
    "medcare": Question(("medcare",), medcare),
    "mixture": Question(tuple(f"mixture_{name}" for name in trial_mixture.MIXTURES), mixture),
    "skills": Question(("skills",), skills),
    "families": Question(("families",), families),
    "settings": Question(("settings_noise", "settings_experts", "settings_families"), settings),
}
