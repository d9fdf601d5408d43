"""One page of an evaluation: scores, languages, confusion, examples; or of several side by side."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from medmoe_jax.evaluation import metrics
from medmoe_jax.evaluation.compare import Difference, by_task, rows_of
from medmoe_jax.evaluation.html import HeatMapSection, ResultsSection, Section, TableSection
from medmoe_jax.evaluation.intervals import interval
from medmoe_jax.evaluation.report import Report, percent

EXAMPLES = 20  # of right and of wrong answers
_MOST_LABELS = 30  # of a confusion matrix
_MOST_LETTERS = 1200  # of a prompt that is shown


def of_report(report: Report, found: Sequence[dict], seed: int = 0) -> list[Section]:
    """The sections of one evaluation."""
    out: list[Section] = [ResultsSection("Scores", report)]
    out += _about(report)
    out += _by(found, "language", "Languages")
    out += _by(found, "part", "Parts")
    out += [section for name, of in by_task(found).items() for section in _confusion(name, of)]
    out += _examples(found, seed, right=True)
    out += _examples(found, seed, right=False)
    return out


def beside(
    reports: Mapping[str, Report], differences: Mapping[str, Sequence[Difference]]
) -> list[Section]:
    """Several runs beside another: their scores, and each against the first."""
    out: list[Section] = [_side_by_side(reports)]
    for name, of in differences.items():
        out.append(difference_table(f"{name} against {next(iter(reports))}", of))
    out += [ResultsSection(name, report) for name, report in reports.items()]
    return out


COLUMNS = ("task", "metric", "n", "A", "B", "B − A", "95% interval", "only A", "only B", "p")


def difference_cells(one: Difference) -> list[str]:
    """The texts of a row of differences, in the order of `COLUMNS`."""
    return [
        one.task,
        one.metric,
        str(one.n),
        percent(one.score_a),
        percent(one.score_b),
        f"{100 * one.difference:+.1f}",
        f"{100 * one.low:+.1f} – {100 * one.high:+.1f}",
        "" if one.only_a is None else str(one.only_a),
        "" if one.only_b is None else str(one.only_b),
        "" if one.p is None else f"{one.p:.2g}",
    ]


def difference_table(title: str, found: Sequence[Difference]) -> TableSection:
    """Differences as a table."""
    unpaired = found[-1].unpaired
    note = (
        "Interval: paired bootstrap. p: McNemar's exact test on the items that one alone has right."
    )
    note += f" {unpaired} items of these tasks are in one run only." if unpaired else ""
    return TableSection(title, COLUMNS, [difference_cells(one) for one in found], note)


def _side_by_side(reports: Mapping[str, Report]) -> TableSection:
    scores = {name: {r.title: r for r in report.results} for name, report in reports.items()}
    titles = list(dict.fromkeys(title for of in scores.values() for title in of))
    lines = []
    for title in titles:
        found = [of.get(title) for of in scores.values()]
        known = next(r for r in found if r)
        lines.append(
            [title, known.metric, percent(known.chance), percent(known.majority)]
            + [
                f"{percent(r.score)} ({percent(r.low)}–{percent(r.high)})" if r else ""
                for r in found
            ]
        )
    columns = ("task", "metric", "chance", "majority", *reports)
    return TableSection("Side by side", columns, lines, "95% intervals in brackets.")


def _reach(low: float, high: float) -> str:
    return f"{percent(low)}–{percent(high)}"


def _about(report: Report) -> list[Section]:
    known = {**report.about, **{k: v for k, v in report.settings.items() if v is not None}}
    lines = [
        [key, value if isinstance(value, str) else json.dumps(value)]
        for key, value in known.items()
    ]
    out: list[Section] = [TableSection("What was asked, and whom", ("what", "is"), lines)]
    told = [[r.title, note] for r in report.results for note in r.notes()]
    told += [[f["task"], f"not done: {f['error']}"] for f in report.failures]
    return [*out, TableSection("To know besides", ("task", "note"), told)] if told else out


def _by(found: Sequence[dict], field: str, title: str) -> list[Section]:
    """A table of scores by a field of the records, for tasks in which it has several values."""
    lines = []
    for task, of in by_task(found).items():
        groups: dict[str, list[dict]] = defaultdict(list)
        for record in of:
            groups[record.get(field, "")].append(record)
        if len(groups) > 1:
            metric = metrics.find(of[0]["metric"])
            for value, some in sorted(groups.items()):
                rows_N = rows_of(metric, some)
                low, high = interval(metric, rows_N)
                score = percent(metric.reduce(rows_N))
                lines.append([task, value, metric.name, score, _reach(low, high), len(some)])
    columns = ("task", field, "metric", "score", "95% interval", "n")
    return [TableSection(title, columns, lines)] if lines else []


def _confusion(task: str, found: Sequence[dict]) -> list[Section]:
    """Which answer was given for which, as shares of the right one."""
    given = {r["answer"] for r in found} | {r["prediction"] for r in found if r["choices"]}
    known = dict.fromkeys(choice for r in found for choice in r["choices"])
    labels = [choice for choice in known if choice in given] + sorted(given - known.keys())
    if not found[0]["choices"] or not 1 < len(labels) <= _MOST_LABELS:
        return []
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)))
    for record in found:
        counts[place[record["answer"]], place[record["prediction"]]] += 1
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [label or "(none)" for label in labels]
    title = f"Confusion: {task}"
    note = "Rows: the right answer; columns: what was given; shares of a row."
    return [HeatMapSection(title, shares, names, names, "given", "right", note, (0.0, 1.0))]


def _examples(found: Sequence[dict], seed: int, right: bool) -> list[Section]:
    """A seeded draw of items that were right, or that were not."""
    fitting = [r for r in found if (r["right"] >= 1) == right]
    drawn = random.Random(seed).sample(fitting, min(EXAMPLES, len(fitting)))
    lines = [[r["task"], _shown(r["prompt"]), r["answer"], _said(r)] for r in drawn]
    title = "Right answers" if right else "Wrong answers"
    columns = ("task", "prompt", "right answer", "answer")
    return (
        [TableSection(title, columns, lines, f"{len(drawn)} of {len(fitting)}.")] if lines else []
    )


def _shown(prompt) -> str:
    text = prompt if isinstance(prompt, str) else "\n".join(t["content"] for t in prompt)
    return text if len(text) <= _MOST_LETTERS else f"… {text[-_MOST_LETTERS:]}"


def _said(record: dict) -> str:
    raw = record["raw"][0] if record["raw"] else ""
    if not raw or raw == record["prediction"]:
        return record["prediction"] or "(none)"
    return f"{record['prediction'] or '(none)'} ← {raw[:_MOST_LETTERS]}"
