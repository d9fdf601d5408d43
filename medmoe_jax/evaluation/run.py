"""Asking a model the items of tasks, and scoring what it says."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from tqdm import tqdm

from medmoe_jax.checkpoints.files import write_text
from medmoe_jax.errors import Stopped
from medmoe_jax.evaluation import answers, metrics
from medmoe_jax.evaluation.intervals import interval
from medmoe_jax.evaluation.report import Report, Result
from medmoe_jax.evaluation.tasks import Item, Task, load_task
from medmoe_jax.parallel import processes


class LanguageModel(Protocol):
    """All that evaluation asks of a model. A prompt is the text of the user's turn."""

    def choose(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, int]]]:
        """For each prompt and choice: (sum of log probabilities, number of tokens)."""

    def generate(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy completions, up to the end of the turn."""


def evaluate(
    model: LanguageModel,
    tasks: Sequence[Task | str | os.PathLike],
    *,
    limit: int | None = None,
    seed: int = 0,
    normalise: bool = False,
    free: bool = False,
    batch: int = 32,
    records: str | os.PathLike | None = None,
    progress: bool = True,
    resamples: int = 1000,
    stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Scores a model on tasks, given as such or by name (then `limit` and `seed` hold).

    normalise: a choice's log probability is divided by its number of tokens.
    free: items with choices are answered in free text, and the choice is read out of it.
    records: a file that gets one JSON line an item: prompt hash, prediction, answer.
    resamples: bootstrap draws for the intervals of scores that are no plain share.
    stop: asked after every batch of items, whether to end there.
    Raises ValueError where the model returns NaN, and Stopped where `stop` said so.
    """
    loaded = [t if isinstance(t, Task) else load_task(t, limit, seed) for t in tasks]
    results, lines = [], []
    quiet = not progress or processes.index() > 0
    with tqdm(total=sum(len(t.items) for t in loaded), disable=quiet) as bar:
        for task in loaded:
            bar.set_description(task.name)
            predictions, rankings = [], []
            for items in _batches(task.items, batch):
                if task.kind == "choice" and not free:
                    ranked = _rank(model, task, items, normalise)
                    rankings += ranked
                    predictions += [ranking[0] for ranking in ranked]
                else:
                    predictions += _write(model, task, items, free)
                bar.update(len(items))
                if stop():
                    raise Stopped(f"evaluation was asked to stop, in task '{task.name}'")
            results.append(_score(task, predictions, rankings, seed, resamples))
            lines += _records(task, predictions)
    if records is not None:
        write_text(records, "".join(line + "\n" for line in lines))
    settings = {"seed": seed, "normalise": normalise, "free": free, "limit": limit}
    return Report(results, settings)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _rank(model, task: Task, items: Sequence[Item], normalise: bool) -> list[list[str]]:
    """The choices of each item, best first; of equals the one that stands first."""
    scores = model.choose([i.prompt for i in items], [i.choices for i in items])
    rankings = []
    for item, pairs in zip(items, scores, strict=True):
        values = [total / max(1, count) if normalise else total for total, count in pairs]
        if any(math.isnan(value) for value in values):
            raise ValueError(f"{task.name}: the model's score of a choice is NaN")
        by_value = sorted(zip(values, item.choices, strict=True), key=lambda pair: -pair[0])
        rankings.append([choice for _, choice in by_value])
    return rankings


def _write(model, task: Task, items: Sequence[Item], free: bool) -> list[str]:
    """Generated answers; in free form, the choice named in them ('' for none)."""
    most = max(task.max_tokens, 512) if free and task.kind == "choice" else task.max_tokens
    texts = model.generate([item.prompt for item in items], most)
    if task.kind == "generate":
        return list(texts)
    return [answers.pick(text, item.choices) or "" for text, item in zip(texts, items, strict=True)]


def _score(task: Task, predictions, rankings, seed: int, resamples: int) -> Result:
    right = [item.answer for item in task.items]
    metric = metrics.find(task.metric)
    rows = metric.prepare(rankings if metric.ranked else predictions, right)
    low, high = interval(metric, rows, seed, resamples)
    also = {}
    for name in task.also:
        further = metrics.find(name)
        given = rankings if further.ranked else predictions
        if given:
            also[name] = further.reduce(further.prepare(given, right))
    return Result(
        task=task.name,
        language=task.language,
        group=task.group,
        kind=task.kind,
        metric=task.metric,
        score=metric.reduce(rows),
        low=low,
        high=high,
        majority=task.majority,
        n=len(right),
        also=also,
    )


def _records(task: Task, predictions: Sequence[str]) -> Iterator[str]:
    for item, prediction in zip(task.items, predictions, strict=True):
        digest = hashlib.sha256(item.prompt.encode()).hexdigest()
        record = {
            "task": task.name,
            "prompt_sha256": digest,
            "prediction": prediction,
            "answer": item.answer,
        }
        yield json.dumps(record, ensure_ascii=False)
