"""Two evaluations on the same items: which is better, and is it more than luck?

Items are paired by what they ask. A difference has a 95% interval by the paired bootstrap: both
runs' items are drawn alike. Where an item is right or wrong, McNemar's exact test is on the items
that one run has right and the other wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import metrics, records
from medmoe_jax.evaluation.report import titled
from medmoe_jax.evaluation.run import rows
from medmoe_jax.evaluation.ways import Response
from medmoe_jax.ranges import COUNT, NOT_NEGATIVE

POOLED = "all tasks"


@dataclass(frozen=True)
class Difference:
    """Run B against run A on a task, or on all.

    score_a, score_b: on the items that both have, `n` of them; of all tasks their mean.
    difference, low, high: B − A with its 95% interval.
    only_a, only_b: items that one alone has right; p: McNemar's, None where the metric has no
      right and wrong.
    unpaired: items of the task that one run alone has.
    """

    task: str
    metric: str
    n: int
    score_a: float
    score_b: float
    difference: float
    low: float
    high: float
    only_a: int | None
    only_b: int | None
    p: float | None
    unpaired: int = 0


@dataclass(frozen=True)
class _Pairs:
    """A task's paired items, and what its metric sees of both runs."""

    task: str
    metric: metrics.Metric
    a: np.ndarray
    b: np.ndarray
    unpaired: int


def compare(
    a: Sequence[dict], b: Sequence[dict], *, seed: int = 0, resamples: int = 2000
) -> list[Difference]:
    """The differences on each task that both runs have, and on all of them.

    Args:
      a, b: records of the two runs.
      seed, resamples: of the bootstrap.

    Raises:
      UserError: they have no item in common, a task's metric differs, or a number is out of range.
    """
    NOT_NEGATIVE.check_whole("seed", seed)
    COUNT.check_whole("resamples", resamples)
    pairs = _paired(a, b)
    if not pairs:
        raise UserError("the two runs have no item in common: they asked other tasks or items")
    generator = np.random.default_rng(seed)
    out, draws = [], []
    for pair in pairs:
        n = len(pair.a)
        picks = generator.integers(0, n, (resamples, n))
        gains = np.array([_gain(pair, pick) for pick in picks])
        draws.append(gains)
        out.append(_difference(pair, gains))
    return [*out, _pooled(out, pairs, np.mean(draws, 0))] if len(out) > 1 else out


def alone(a: Sequence[dict], b: Sequence[dict]) -> list[str]:
    """The tasks with an item in the records `a`, and none in the records `b`."""
    of_b = by_task(b)
    return [task for task in by_task(a) if task not in of_b]


def apart(a: Sequence[dict], b: Sequence[dict]) -> list[str]:
    """The tasks of which both have records, but none of the same item."""
    of_a, of_b = _by_item(a), _by_item(b)
    return [task for task in of_a if task in of_b and not of_a[task].keys() & of_b[task].keys()]


def _gain(pair: _Pairs, pick: np.ndarray) -> float:
    return pair.metric.reduce(pair.b[pick]) - pair.metric.reduce(pair.a[pick])


def _difference(pair: _Pairs, gains: np.ndarray) -> Difference:
    score_a, score_b = pair.metric.reduce(pair.a), pair.metric.reduce(pair.b)
    only_a, only_b = _split(pair)
    low, high = np.percentile(gains, [2.5, 97.5])
    return Difference(
        task=pair.task,
        metric=pair.metric.name,
        n=len(pair.a),
        score_a=score_a,
        score_b=score_b,
        difference=score_b - score_a,
        low=float(low),
        high=float(high),
        only_a=only_a,
        only_b=only_b,
        p=None if only_a is None or only_b is None else mcnemar(only_a, only_b),
        unpaired=pair.unpaired,
    )


def _split(pair: _Pairs) -> tuple[int | None, int | None]:
    """Items that A alone and that B alone has right."""
    if not pair.metric.binary:
        return None, None
    return int(((pair.a == 1) & (pair.b == 0)).sum()), int(((pair.a == 0) & (pair.b == 1)).sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: the discordant items as throws of a coin."""
    from scipy.stats import binomtest

    n = only_a + only_b
    return float(binomtest(only_a, n, 0.5).pvalue) if n else 1.0


def _pooled(found: Sequence[Difference], pairs: Sequence[_Pairs], gains: np.ndarray) -> Difference:
    """The mean over tasks, each weighing the same, and McNemar's test over all their items."""
    binary = [d for d in found if d.only_a is not None]
    only_a, only_b = (sum(getattr(d, key) for d in binary) for key in ("only_a", "only_b"))
    low, high = np.percentile(gains, [2.5, 97.5])
    a, b = (float(np.mean([getattr(d, key) for d in found])) for key in ("score_a", "score_b"))
    return Difference(
        task=POOLED,
        metric="mean",
        n=sum(d.n for d in found),
        score_a=a,
        score_b=b,
        difference=b - a,
        low=float(low),
        high=float(high),
        only_a=only_a if binary else None,
        only_b=only_b if binary else None,
        p=mcnemar(only_a, only_b) if binary else None,
        unpaired=sum(d.unpaired for d in found),
    )


def _paired(a: Sequence[dict], b: Sequence[dict]) -> list[_Pairs]:
    of_a, of_b = _by_item(a), _by_item(b)
    out = []
    for task in of_a:
        shared = [key for key in of_a[task] if key in of_b.get(task, {})]
        if not shared:
            continue
        one, other = ([of[task][key] for key in shared] for of in (of_a, of_b))
        names = {record["metric"] for record in (*one, *other)}
        if len(names) > 1:
            raise UserError(f"{task}: scored by {' and by '.join(sorted(names))}: not comparable")
        metric = metrics.find(names.pop())
        unpaired = len(of_a[task]) + len(of_b[task]) - 2 * len(shared)
        out.append(_Pairs(task, metric, *(rows_of(metric, r) for r in (one, other)), unpaired))
    return out


def by_task(found: Sequence[dict]) -> dict[str, list[dict]]:
    """Task with split -> its records."""
    out: dict[str, list[dict]] = defaultdict(list)
    for record in found:
        out[titled(record["task"], record.get("split", ""))].append(record)
    return out


def _by_item(found: Sequence[dict]) -> dict[str, dict[tuple[str, int], dict]]:
    """Task -> item -> record; of items that are asked twice, each by its number."""
    out: dict[str, dict[tuple[str, int], dict]] = defaultdict(dict)
    for task, of in by_task(found).items():
        seen: Counter = Counter()
        for record in of:
            out[task][record["id"], seen[record["id"]]] = record
            seen[record["id"]] += 1
    return out


def rows_of(metric: metrics.Metric, found: Sequence[dict]) -> np.ndarray:
    """What a metric sees of records, before it reduces them to a score."""
    given = [Response(r["prediction"], tuple(r.get("ranking", ()))) for r in found]
    return rows(metric, given, [records.item_of(r) for r in found])
