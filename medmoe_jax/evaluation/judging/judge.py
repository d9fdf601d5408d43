"""Free answers judged: the questions put, the verdicts summed up, two judges compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmoe_jax.evaluation.intervals import bootstrap
from medmoe_jax.evaluation.judging.endpoint import Client, Reply
from medmoe_jax.evaluation.judging.questions import JudgeQuestion, answer_of
from medmoe_jax.evaluation.judging.verdicts import Verdicts, key_of
from medmoe_jax.evaluation.report import titled

RUBRIC = "rubric"
GRADES = (1, 2, 3, 4, 5)
_REPLY = 80  # tokens of a verdict with its reason


@dataclass(frozen=True)
class Judge:
    """Whose verdict is asked.

    Attributes:
      place: where it is asked (`JudgeEndpoint.place`).
      model: its name there.
      request: further fields of a request, such as `temperature`.
    """

    place: str
    model: str
    request: Mapping[str, Any]

    def body(self, question: JudgeQuestion) -> dict[str, Any]:
        """The request that asks a question."""
        turns = [{"role": "user", "content": question.text}]
        return {"model": self.model, "messages": turns, **self.request}

    def key(self, question: JudgeQuestion) -> str:
        """All that decides the verdict, as a hash."""
        return key_of(self.place, self.body(question))


def tokens(text: str) -> int:
    """About how many tokens a text is: four ASCII characters, or one of another script."""
    ascii_ = sum(map(str.isascii, text))
    return math.ceil(ascii_ / 4) + len(text) - ascii_


@dataclass(frozen=True)
class JudgingCost:
    """About what judging takes: calls, and tokens read and written. Verdicts at hand cost none."""

    calls: int
    read: int
    written: int

    def price(self, read: float, written: float) -> float:
        """Its price, from those of a million tokens."""
        return (self.read * read + self.written * written) / 1e6


def cost(judge: Judge, asked: Iterable[JudgeQuestion], known: Verdicts) -> JudgingCost:
    """About what the questions cost that have no verdict yet."""
    new = {judge.key(one): tokens(one.text) for one in asked}
    sizes = [size for key, size in new.items() if key not in known]
    return JudgingCost(len(sizes), sum(sizes), _REPLY * len(sizes))


def put(
    judge: Judge,
    client: Client,
    asked: Sequence[JudgeQuestion],
    known: Verdicts,
    parallel: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Reply]:
    """What came of each question; a verdict is kept as soon as it is there.

    Equal questions are asked once: what came of the first, less its tokens, is that of the others.

    Raises:
      UserError: the endpoint refuses all questions.
    """

    def one(key: str, question: JudgeQuestion) -> Reply:
        if key in known:
            return Reply(known[key], "", (0, 0))
        said = client.ask(judge.body(question), question.read)
        if said.value is not None:
            known.add(key, said.value)
        return said

    came: dict[str, Future[Reply]] = {}
    out = []
    pool = ThreadPoolExecutor(parallel)
    try:
        keys = [judge.key(question) for question in asked]
        for key, question in zip(keys, asked, strict=True):
            if key not in came:
                came[key] = pool.submit(one, key, question)
        paid: set[str] = set()
        for key in keys:
            said = came[key].result()
            out.append(said._replace(tokens=(0, 0)) if key in paid else said)
            paid.add(key)
            progress(1)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more is asked
    return out


def judged(
    records: Sequence[dict], asked: Sequence[JudgeQuestion], said: Sequence[Reply]
) -> list[dict]:
    """A line for each record that was asked about: its grades, or why it has none.

    A rubric of which one criterion has no verdict gives no score.
    """
    by_record: dict[int, list[tuple[JudgeQuestion, Reply]]] = defaultdict(list)
    for question, one in zip(asked, said, strict=True):
        by_record[question.record].append((question, one))
    lines = []
    for number, pairs in by_record.items():
        record = records[number]
        line: dict[str, Any] = {
            name: record.get(name, "") for name in ("task", "split", "part", "id")
        }
        line["judged"] = answer_of(record)
        problems = [one.problem for _, one in pairs if one.value is None]
        if problems:
            line["unjudged"] = problems[0]
        elif pairs[0][0].criterion < 0:
            line["grades"] = pairs[0][1].value
        else:
            line["met"] = [one.value["met"] for _, one in pairs]
            line[RUBRIC] = score(record["rubric"], line["met"])
        lines.append(line)
    return lines


def score(rubric: Sequence[dict], met: Sequence[bool]) -> float | None:
    """Points of the criteria that are met, by all that can be had; None where none can.

    Points of faults are negative, so that it may be below 0, as in HealthBench; the mean over items
    is then cut to 0 and 1.
    """
    possible = sum(max(0.0, one["points"]) for one in rubric)
    had = sum(one["points"] for one, is_met in zip(rubric, met, strict=True) if is_met)
    return had / possible if possible else None


@dataclass(frozen=True)
class Summary:
    """A task's mean on one scale (1 to 5), or by rubric (0 to 1), with its 95% interval.

    Attributes:
      n, unjudged: answers with a verdict, and without; the mean is over the first alone.
      score, low, high: None without any verdict.
    """

    task: str
    scale: str
    n: int
    unjudged: int
    score: float | None
    low: float | None
    high: float | None


def summaries(lines: Sequence[dict], seed: int = 0) -> list[Summary]:
    """The means of all tasks, in the order of the lines."""
    tasks: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        tasks[titled(line["task"], line["split"])].append(line)
    out = []
    for task, own in tasks.items():
        values: dict[str, list[float]] = defaultdict(list)
        for line in own:
            for scale, grade in line.get("grades", {}).items():
                values[scale].append(grade)
            if line.get(RUBRIC) is not None:
                values[RUBRIC].append(line[RUBRIC])
        unjudged = sum("unjudged" in line for line in own)
        for scale, grades in values.items():
            reduce = _clipped if scale == RUBRIC else _mean
            rows = np.asarray(grades, np.float64)
            low, high = bootstrap(rows, reduce, seed)
            out.append(Summary(task, scale, len(grades), unjudged, reduce(rows), low, high))
        if not values:
            out.append(Summary(task, "", 0, unjudged, None, None, None))
    return out


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def _clipped(rows: np.ndarray) -> float:
    return min(1.0, max(0.0, _mean(rows)))


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers.

    Attributes:
      n: verdicts that both have given.
      exact: share of equal ones.
      kappa: Cohen's, with quadratic weights on a scale; None where one value alone was given.
    """

    task: str
    scale: str
    n: int
    exact: float
    kappa: float | None


def agreements(first: Sequence[dict], second: Sequence[dict]) -> list[Agreement]:
    """The agreement of two judges by task and scale, on the answers that both have judged."""
    from sklearn.metrics import cohen_kappa_score

    other = dict(_named(second))
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for name, line in _named(first):
        if name not in other:
            continue
        task = titled(line["task"], line["split"])
        for scale, grade in line.get("grades", {}).items():
            if scale in other[name].get("grades", {}):
                pairs[task, scale].append((grade, other[name]["grades"][scale]))
        both = (line.get("met", []), other[name].get("met", []))
        if len(both[0]) == len(both[1]):
            pairs[task, RUBRIC] += [(int(a), int(b)) for a, b in zip(*both, strict=True)]
    out = []
    for (task, scale), given in pairs.items():
        if not given:
            continue
        a, b = np.asarray(given).T
        labels, weights = ((0, 1), None) if scale == RUBRIC else (GRADES, "quadratic")
        several = len(np.unique(given)) > 1
        kappa = cohen_kappa_score(a, b, labels=labels, weights=weights) if several else None
        exact = float(np.mean(a == b))
        out.append(
            Agreement(task, scale, len(given), exact, None if kappa is None else float(kappa))
        )
    return out


def _named(lines: Sequence[dict]) -> Iterable[tuple[tuple, dict]]:
    """Lines by what they judge; of equal ones each has its number."""
    seen: Counter = Counter()
    for line in lines:
        name = tuple(line[field] for field in ("task", "split", "id", "judged"))
        seen[name] += 1
        yield (*name, seen[name]), line
