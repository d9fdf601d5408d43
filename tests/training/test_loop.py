"""The loop's order of work, with a step that only counts, and what its hooks are told."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.training import loop as loop_lib
from medmoe_jax.training.config import evaluation
from medmoe_jax.training.hooks.evaluations import Evaluations
from medmoe_jax.training.hooks.faults import Faults
from medmoe_jax.training.hooks.figures import LearningRate, Measured, Routers
from medmoe_jax.training.hooks.protocol import Hook
from medmoe_jax.training.hooks.writers import MetricsFile
from medmoe_jax.training.loop import Loop


class Stream:
    """Batches that know their number."""

    def __init__(self, first=0):
        self.at = first

    def __next__(self):
        self.at += 1
        return {"tokens": np.array([self.at])}

    def get_state(self):
        return {"at": self.at}


class Watch(Hook):
    """Writes down all that it is told."""

    def __init__(self):
        self.told = []
        self.metrics = []

    def on_start(self, progress):
        self.told.append(("start", progress.step))

    def on_step(self, progress):
        self.told.append(("step", progress.step, progress.state))
        return {}

    def on_metrics(self, progress, record):
        self.told.append(("metrics", record.step, progress.step))
        self.metrics.append(record.metrics)

    def on_save(self, progress):
        self.told.append(("save", progress.step, progress.state))

    def on_end(self, progress):
        self.told.append(("end", progress.step))


def make_loop(tmp_path, first=0, poison=None, hooks=(), bad_frozen=(), **fields):
    """A loop of seven steps whose state is the number of steps made, and the saves it makes."""
    saves = []

    def step_fn(state, frozen, batch):
        assert frozen == "frozen" and batch["tokens"][0] == state + 1
        metrics = {"loss": 1.0 / (state + 1), "gradient_norm": 1.0, "tokens": 5.0}
        metrics |= {"target_tokens": 3.0, "router": {}, "non_finite": 0.0}
        if poison and state == poison[1]:
            metrics[poison[0]] = poison[2]
        return state + 1, metrics

    loop = Loop(
        name="s",
        step_fn=step_fn,
        stream=Stream(first),
        to_mesh=lambda batch: batch,
        hooks=[
            Faults(
                lambda batch: f"kept {batch['tokens'][0]}",
                {"noise": 4},
                lambda: bad_frozen,
                lambda step: 0.1 * step,
                lambda: [one[0] for one in saves],
            ),
            LearningRate(lambda step: 0.1 * step),
            Measured(2, lambda state: {"overlap": float(state)}),
            Routers(2),
            *hooks,
            MetricsFile(tmp_path / "m.jsonl", lambda: None),
        ],
        **{
            "save": lambda *saved: saves.append(saved),
            "steps": 7,
            "save_every": 3,
            "stop": lambda: False,
            **fields,
        },
    )
    return loop, saves


def saved(*steps):
    return [(n, n, {"data": {"at": n}}) for n in steps]


def test_order_of_work(tmp_path):
    loop, saves = make_loop(tmp_path)
    assert loop_lib.run(loop, 0, "frozen", 0) == 7
    assert saves == saved(3, 6, 7)
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in rows] == [1 / n for n in range(1, 8)]
    np.testing.assert_allclose([r["learning_rate"] for r in rows], [0.1 * n for n in range(7)])
    # The probe sees the state after the step whose line it stands in.
    assert {r["step"]: r["overlap"] for r in rows if "overlap" in r} == {2: 2, 4: 4, 6: 6, 7: 7}
    assert [r["step"] for r in rows if "router" in r] == [2, 4, 6, 7]
    assert all(r["tokens_per_second"] > 0 for r in rows)


def test_what_hooks_are_told(tmp_path):
    """A step's metrics come one step later, or at once where the state is saved."""
    watch = Watch()
    loop, _ = make_loop(tmp_path, hooks=[watch], steps=4)
    loop_lib.run(loop, 0, "frozen", 0)
    assert watch.told == [
        ("start", 0),
        ("step", 1, 1),
        ("metrics", 1, 2),
        ("step", 2, 2),
        ("metrics", 2, 3),
        ("step", 3, 3),
        ("metrics", 3, 3),
        ("save", 3, 3),
        ("step", 4, 4),
        ("metrics", 4, 4),
        ("save", 4, 4),
        ("end", 4),
    ]


def test_a_hook_adds_to_the_metrics_that_those_after_it_see(tmp_path):
    class Halved(Hook):
        def on_metrics(self, progress, record):
            record.metrics["half"] = record.metrics["loss"] / 2

    watch = Watch()
    loop, _ = make_loop(tmp_path, hooks=[Halved(), watch])
    loop_lib.run(loop, 0, "frozen", 0)
    halves = [1 / (2 * n) for n in range(1, 8)]
    assert [m["half"] for m in watch.metrics] == halves
    assert [r["half"] for r in read_metrics(tmp_path / "m.jsonl")] == halves


def scored(tmp_path, value, begin=0, **fields):
    """The hook of evaluations, its measure a function of the step, and the steps it held."""
    held = []
    section = evaluation(every=2, best="mean", **fields)

    def measure(step, state):
        assert state == step  # that which the step has left
        return {"mean": value(step)}

    return Evaluations(section, [measure], held.append, tmp_path / "m.jsonl", begin), held


@pytest.mark.parametrize("first", [0, 3, 4])
def test_the_best_step_is_saved_and_known_again(tmp_path, first):
    """Steps 2, 4, 6, 7 are scored 0, 2, 2, 1; of equals the first is the best."""

    def value(step):
        return {2: 0, 4: 2, 6: 2, 7: 1}[step]

    if first:  # a run that was stopped in the step after
        hook, _ = scored(tmp_path, value)
        loop, _ = make_loop(tmp_path, hooks=[hook], poison=("loss", first, math.nan))
        with pytest.raises(UserError):
            loop_lib.run(loop, 0, "frozen", 0)
    hook, held = scored(tmp_path, value)
    loop, saves = make_loop(tmp_path, first, hooks=[hook])
    assert loop_lib.run(loop, first, "frozen", first) == 7
    assert hook.best == (4, 2)
    assert held == {0: [2, 4], 3: [2, 4], 4: [4]}[first]
    assert saves == saved(*(step for step in (2, 3, 4, 6, 7) if step > first))
    rows = read_metrics(tmp_path / "m.jsonl")
    assert {r["step"]: r["eval/mean"] for r in rows if "eval/mean" in r} == {2: 0, 4: 2, 6: 2, 7: 1}
    assert [r["loss"] for r in rows] == [1 / n for n in range(1, 8)]


def test_a_stage_that_gets_no_better_ends(tmp_path):
    hook, _ = scored(tmp_path, lambda step: -step, patience=1)
    loop, saves = make_loop(tmp_path, hooks=[hook])
    assert loop_lib.run(loop, 0, "frozen", 0) == 4 and hook.best == (2, -2)
    assert saves == saved(2, 3, 4)
    hook, held = scored(tmp_path, None, patience=1)  # the same, where its end was not written
    loop, saves = make_loop(tmp_path, 4, hooks=[hook])
    assert loop_lib.run(loop, 4, "frozen", 4) == 4 and saves == [] and held == [2]


@pytest.mark.parametrize("first", [0, 3, 5])
def test_steps_before_a_given_one_judge_nothing(tmp_path, first):
    """Scores only fall, so step 2 would be the best, and step 4 the end of patience."""
    if first:  # a run that was stopped in the step after
        hook, _ = scored(tmp_path, lambda step: -step, begin=4, patience=1)
        loop, _ = make_loop(tmp_path, hooks=[hook], poison=("loss", first, math.nan))
        with pytest.raises(UserError):
            loop_lib.run(loop, 0, "frozen", 0)
    hook, held = scored(tmp_path, lambda step: -step, begin=4, patience=1)
    loop, _ = make_loop(tmp_path, first, hooks=[hook])
    assert loop_lib.run(loop, first, "frozen", first) == 6 and hook.best == (4, -4)
    assert held == [4]
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [r["step"] for r in rows if "eval/mean" in r] == [2, 4, 6]  # told all the same


def test_a_notice_while_a_step_is_scored(tmp_path):
    """The step is neither written nor saved; the run goes on from the save before."""
    notices = iter([Stopped("asked to stop")])

    def value(step):
        for notice in notices if step == 4 else ():
            raise notice
        return step

    hook, held = scored(tmp_path, value)
    loop, saves = make_loop(tmp_path, hooks=[hook])
    with pytest.raises(Stopped):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == saved(2, 3) and held == [2]
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]
    hook, held = scored(tmp_path, value)
    loop, saves = make_loop(tmp_path, 3, hooks=[hook])
    assert loop_lib.run(loop, 3, "frozen", 3) == 7 and held == [2, 4, 6, 7]
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_that_went_wrong_is_not_scored(tmp_path):
    hook, held = scored(tmp_path, lambda step: pytest.fail("it is not finite"))
    loop, _ = make_loop(tmp_path, hooks=[hook], poison=("gradient_norm", 1, math.inf))
    with pytest.raises(UserError, match="step 2: gradient_norm is inf"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert not held


class EndBelow(Hook):
    """Ends the stage once the loss is low, by an event of its choice; knows it after a restart."""

    def __init__(self, path, limit, event="on_metrics"):
        self.path, self.limit = path, limit
        if event == "on_step":
            self.on_metrics = lambda progress, record: None
            self.on_step = lambda progress: self.judge(progress, 1 / progress.step) or {}

    def on_start(self, progress):
        for row in read_metrics(self.path) if self.path.exists() else ():
            if row["step"] <= progress.step:
                self.judge(progress, row["loss"])

    def on_metrics(self, progress, record):
        self.judge(progress, record.metrics["loss"])

    def judge(self, progress, loss):
        if loss < self.limit:
            progress.end()


@pytest.mark.parametrize("event, last", [("on_metrics", 5), ("on_step", 4)])
def test_a_hook_may_end_the_stage(tmp_path, event, last):
    """After the step under way, with all that its last step has; a restart knows it at once."""
    path = tmp_path / "m.jsonl"
    loop, saves = make_loop(tmp_path, hooks=[EndBelow(path, 0.26, event)])
    assert loop_lib.run(loop, 0, "frozen", 0) == last
    assert saves == saved(3, last)
    rows = read_metrics(path)
    assert [r["step"] for r in rows] == [*range(1, last + 1)] and "router" in rows[-1]
    loop, saves = make_loop(tmp_path, last, hooks=[EndBelow(path, 0.26, event)])
    assert loop_lib.run(loop, last, "frozen", last) == last
    assert not saves and read_metrics(path) == rows


def test_every_hook_that_was_started_is_ended(tmp_path):
    class Bad(Hook):
        def on_start(self, progress):
            raise OSError("no space")

    first, second = Watch(), Watch()
    loop, _ = make_loop(tmp_path, hooks=[first, Bad(), second])
    with pytest.raises(OSError, match="no space"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert first.told == [("start", 0), ("end", 0)] and second.told == []
    loop, _ = make_loop(tmp_path, hooks=[first], poison=("loss", 0, math.nan))
    with pytest.raises(UserError):
        loop_lib.run(loop, 0, "frozen", 0)
    assert first.told[-1] == ("end", 2)


def test_a_step_moves_nothing_between_host_and_devices(tmp_path):
    """The transfer guard is on while a step is dispatched, and off for the hooks."""
    loop, _ = make_loop(tmp_path)
    step_fn, add = loop.step_fn, jax.jit(lambda x: x + 1)
    add(np.ones(3))  # compiled

    def moving(*arguments):
        add(np.ones(3))
        return step_fn(*arguments)

    loop.step_fn = moving
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop_lib.run(loop, 0, "frozen", 0)


def test_lines_are_written_before_the_save_that_vouches_for_them(tmp_path):
    synced, seen = [], []
    loop, _ = make_loop(tmp_path, save=lambda step, *_: seen.append((step, synced[-1])))

    class Synced(Hook):
        def on_save(self, progress):
            synced.append(len((tmp_path / "m.jsonl").read_text().splitlines()))

    loop.hooks.append(Synced())
    loop_lib.run(loop, 0, "frozen", 0)
    assert seen == [(3, 3), (6, 6), (7, 7)]


def test_it_continues_after_the_first_steps(tmp_path):
    loop, saves = make_loop(tmp_path, first=6)
    assert loop_lib.run(loop, 6, "frozen", 6) == 7
    assert saves == saved(7)
    loop, saves = make_loop(tmp_path, first=7)
    assert loop_lib.run(loop, 7, "frozen", 7) == 7 and saves == []


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_before_a_save(tmp_path, name, value):
    """A gradient that is not finite spoils the weights although this step's loss is fine."""
    loop, saves = make_loop(tmp_path, poison=(name, 5, value))
    message = rf"stage 's', step 6: {name} is (nan|inf)\. The losses before did not rise .*kept in "
    message += (
        r"kept 6; else lower learning_rate \(it was 0\.5\)\. The checkpoint of step 3 is intact"
    )
    with pytest.raises(UserError, match=message):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == saved(3)
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_what_a_step_that_is_not_finite_comes_from(tmp_path):
    """Base, rows and rates are told apart, and no checkpoint is claimed that is not there."""

    def said(at=0, first=0, rising=False, **fields):
        loop, _ = make_loop(tmp_path, first=first, poison=("loss", at, math.nan), **fields)
        step_fn = loop.step_fn

        def with_losses(state, frozen, batch):
            state, metrics = step_fn(state, frozen, batch)
            return state, metrics | {"loss": metrics["loss"] + 10.0 * state * rising}

        loop.step_fn = with_losses
        with pytest.raises(UserError) as caught:
            loop_lib.run(loop, first, "frozen", first)
        return str(caught.value)

    first = said()
    assert "step 1: loss is nan. No update was made since the start" in first
    assert first.endswith("There is no checkpoint yet.") and "kept 1" in first
    assert "No update was made" in said(at=2, first=2)
    rising = said(at=5, rising=True)
    assert "The losses before rose (" in rising
    assert "lower learning_rate (it was 0.5)" in rising and "step 3 is intact" in rising
    base = said(at=5, bad_frozen=("base.embed",))
    assert "in the base or a frozen bank: base.embed holds NaN" in base
    assert "learning_rate" not in base


def test_logits_that_are_not_finite_name_their_router(tmp_path):
    """The loss may still be finite: the router's flag alone stops the run."""
    loop, saves = make_loop(tmp_path, poison=("non_finite", 5, 3.0))
    step_fn = loop.step_fn

    def with_stats(state, frozen, batch):
        state, metrics = step_fn(state, frozen, batch)
        ones = np.ones(2)
        stats = RouterStats(ones, ones[:, None], ones[:, None], ones, ones, ones, np.array([0, 3]))
        fine = stats._replace(non_finite=np.zeros(2))
        return state, metrics | {"router": {"noise/mlp.up": stats, "noise/mlp.down": fine}}

    loop.step_fn = with_stats
    message = "stage 's', step 6: layer 5, mlp.up: the logits of bank 'noise'"
    with pytest.raises(UserError, match=message):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == saved(3)


def test_a_stop_saves_after_that_step(tmp_path):
    asked = iter([False] * 3 + [True])
    loop, saves = make_loop(tmp_path, stop=lambda: next(asked))
    with pytest.raises(Stopped, match="stage 's' was asked to stop and is saved at step 4"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == saved(3, 4)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


def test_the_time_that_a_step_waited_for_its_batch_is_logged(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(loop_lib, "time", SimpleNamespace(monotonic=lambda: now))

    class Slow(Stream):
        def __next__(self):
            nonlocal now
            now += 3.0 * (self.at == 4)
            return super().__next__()

    loop, _ = make_loop(tmp_path)
    loop.stream = Slow()
    loop_lib.run(loop, 0, "frozen", 0)
    waits = [row["data_wait"] for row in read_metrics(tmp_path / "m.jsonl")]
    assert waits == [0, 0, 0, 0, 3.0, 0, 0]


def test_tokens_a_second_are_of_the_step_that_ends(tmp_path, monkeypatch):
    """Not of the moment when it was handed to the device, which does one after the other."""
    now = 0.0
    monkeypatch.setattr(loop_lib, "time", SimpleNamespace(monotonic=lambda: now))

    class OnDevice:
        def __array__(self, *_, **__):  # waits for the step's end
            nonlocal now
            now += 2.0
            return np.array(1.0)

    def save(*_):
        nonlocal now
        now += 3.0

    loop, _ = make_loop(tmp_path, save=save)
    step_fn = loop.step_fn

    def slow(*arguments):
        state, metrics = step_fn(*arguments)
        return state, metrics | {"loss": OnDevice()}

    loop.step_fn = slow
    loop_lib.run(loop, 0, "frozen", 0)
    rates = [row["tokens_per_second"] for row in read_metrics(tmp_path / "m.jsonl")]
    # Five tokens in two seconds; steps 4 and 7 come after a save.
    assert rates == [2.5, 2.5, 2.5, 1.0, 2.5, 2.5, 1.0]


def test_a_first_batch_without_target_is_an_error(tmp_path):
    loop, saves = make_loop(tmp_path, poison=("target_tokens", 0, 0.0))
    with pytest.raises(UserError, match=r"no token of the first batch is a target.*data\.length"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == []
    loop, _ = make_loop(tmp_path, poison=("target_tokens", 4, 0.0))
    assert loop_lib.run(loop, 0, "frozen", 0) == 7
