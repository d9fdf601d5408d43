"""The trials' tables in Markdown, from their results alone.

Results are `{"base": {seed: {"loss": {rows: nats}}}, "arms": {arm: {seed: {"loss", "parameters",
...}}}}`. A cell is the mean over seeds ± their standard deviation (n − 1); a difference is taken
seed by seed, which removes what the seeds have in common: the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from configs import trial_families, trial_skills

Results = Mapping[str, Any]
Values = dict[str, float]  # by seed


def cell(values: Values, signed: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    numbers = list(values.values())
    if not numbers:
        return "–"
    spread = f" ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):{'+' if signed else ''}.3f}{spread}"


def minus(one: Values, other: Values) -> Values:
    """The difference of the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; numbers stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _losses(arm: Mapping[str, Any], names: Sequence[str]) -> Values:
    """The mean loss over these rows, each name weighing the same."""
    return {seed: float(np.mean([f["loss"][n] for n in names])) for seed, f in arm.items()}


def _base(results: Results, names: Sequence[str]) -> str:
    """The base's mean loss over these rows, which no seed changes."""
    return f"{next(iter(_losses(results['base'], names).values())):.3f}"


def _compared(
    results: Results,
    what: str,
    rows: Mapping[str, Sequence[str]],
    arms: Mapping[str, str],
    pairs: Sequence[tuple[str, str]],
) -> str:
    """A loss a row and arm, the differences of pairs of arms, their parameters and seeds."""
    found = {arm: results["arms"].get(arm, {}) for arm in arms}
    header = [what, "base", *arms.values(), *(f"{arms[a]} − {arms[b]}" for a, b in pairs)]
    lines = []
    for label, names in rows.items():
        by_arm = {arm: _losses(figures, names) for arm, figures in found.items()}
        differences = (cell(minus(by_arm[a], by_arm[b]), signed=True) for a, b in pairs)
        lines.append([label, _base(results, names), *map(cell, by_arm.values()), *differences])
    counts = [{f["parameters"] for f in found[arm].values()} for arm in arms]
    cells = [" ".join(f"{n:,}" for n in sorted(some)) or "–" for some in counts]
    lines.append(["trainable parameters", "0", *cells, *[""] * len(pairs)])
    lines.append(["seeds", "", *(str(len(found[arm])) for arm in arms), *[""] * len(pairs)])
    return markdown(header, lines)


def _scored(results: Results) -> list[str]:
    """The names of the rows that were scored."""
    return list(next(iter(results["base"].values()))["loss"])


def mixture(results: Results) -> str:
    """Loss by task."""
    names = _scored(results)
    rows = {**{name: [name] for name in names}, "**mean**": names}
    arms = {"lora": "LoRA", "experts": "MING-MOE"}
    return _compared(results, "task", rows, arms, [("experts", "lora")])


def families(results: Results) -> str:
    """Loss by family, and of the language that was held out."""
    out = trial_families.HELD_OUT
    names = [name for name in _scored(results) if name != out]
    rows = {
        **{name: [name] for name in names},
        "**mean**": names,
        f"{out}, never trained on": [out],
    }
    arms = {
        "dense": "dense",
        "dense_last": "dense, last 2",
        "last": "families, last 2",
        "everywhere": "families, all",
    }
    pairs = [("last", "dense"), ("last", "dense_last"), ("last", "everywhere")]
    return _compared(results, "family", rows, arms, pairs)


def best_skill(results: Results, task: str, rows: str) -> dict[str, str]:
    """By seed, the single skill with the least loss on the task's rows that the router sees."""
    skills = {name: results["arms"].get(name, {}) for name in trial_skills.SKILLS}
    out = {}
    for seed in results["base"]:
        found = {
            name: by_seed[seed]["loss"][f"pick_{task}_{rows}"]
            for name, by_seed in skills.items()
            if seed in by_seed
        }
        if found:
            out[seed] = min(found, key=found.__getitem__)
    return out


def skills(results: Results) -> str:
    """Loss on tasks that no skill has seen, then that of each skill and its mixing weights."""
    return f"{_downstream(results)}\n\n{_single(results)}"


def _downstream(results: Results) -> str:
    header = ["task", "its rows", "base", "best single skill", "skills + router", "plain LoRA"]
    header += ["router − best skill", "router − LoRA", "seeds"]
    lines = []
    for task in trial_skills.TASKS:
        for rows in trial_skills.ROWS:
            best = best_skill(results, task, rows)
            one = {seed: results["arms"][b][seed]["loss"][task] for seed, b in best.items()}
            arms = (results["arms"].get(f"{a}_{task}_{rows}", {}) for a in ("route", "lora"))
            routed, plain = (_losses(arm, [task]) for arm in arms)
            differences = (cell(minus(routed, x), signed=True) for x in (one, plain))
            cells = [_base(results, [task]), *map(cell, (one, routed, plain))]
            lines.append([task, rows, *cells, *differences, str(len(routed))])
    return markdown(header, lines)


def _single(results: Results) -> str:
    header = ["skill, alone"]
    header += [
        f"{what} {task}" for task in trial_skills.TASKS for what in ("loss on", "weight for")
    ]
    lines = []
    for number, name in enumerate(trial_skills.SKILLS):
        cells = []
        for task in trial_skills.TASKS:
            routed = results["arms"].get(f"route_{task}_all", {})
            weights = {seed: figures["mix"][number] for seed, figures in routed.items()}
            cells += [cell(_losses(results["arms"].get(name, {}), [task])), cell(weights, True)]
        lines.append([name, *cells])
    return markdown(header, lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "mixture": mixture,
    "families": families,
    "skills": skills,
}
