"""The loop's order of work, with a step that only counts."""

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from medmoe_jax.checkpoints.files import MetricsLog, read_metrics
from medmoe_jax.errors import Stopped, UserError
from medmoe_jax.kernels.router_equations import RouterStats
from medmoe_jax.training import loop as loop_lib
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


class Board:
    """Remembers what it is given."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, float(value), step))


def make_loop(tmp_path, first=0, poison=None, **fields):
    """A loop of seven steps whose state is the number of steps made, and the saves it makes."""
    saves = []

    def step_fn(state, frozen, batch):
        assert frozen == "frozen" and batch["tokens"][0] == state + 1
        metrics = {"loss": 1.0 / (state + 1), "gradient_norm": 1.0, "tokens": 5.0}
        metrics |= {"target_tokens": 3.0, "router": {}, "non_finite": 0.0}
        if poison and state == poison[1]:
            metrics[poison[0]] = poison[2]
        return state + 1, metrics

    fields = {"save": lambda state, extra: saves.append((state, extra)), **fields}
    loop = Loop(
        name="s",
        step_fn=step_fn,
        stream=Stream(first),
        place=lambda batch: batch,
        keep=lambda batch: f"kept {batch['tokens'][0]}",
        log=MetricsLog(tmp_path / "m.jsonl", first),
        board=Board(),
        probe=lambda state: {"overlap": float(state)},
        rate=lambda step: 0.1 * step,
        first_layer={"noise": 4},
        **{"steps": 7, "log_every": 2, "save_every": 3, "stop": lambda: False, **fields},
    )
    return loop, saves


def test_order_of_work(tmp_path):
    loop, saves = make_loop(tmp_path)
    assert loop_lib.run(loop, 0, "frozen", 0) == 7
    assert saves == [(n, {"data": {"at": n}}) for n in (3, 6, 7)]
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in rows] == [1 / n for n in range(1, 8)]
    np.testing.assert_allclose([r["learning_rate"] for r in rows], [0.1 * n for n in range(7)])
    # The probe sees the state after the step whose line it stands in.
    assert {r["step"]: r["overlap"] for r in rows if "overlap" in r} == {2: 2, 4: 4, 6: 6, 7: 7}
    assert {step for name, _, step in loop.board.scalars if name == "s/loss"} == {2, 4, 6, 7}


def test_lines_are_written_before_the_save_that_vouches_for_them(tmp_path):
    loop, _ = make_loop(tmp_path)
    synced, seen, sync = [], [], loop.log.sync

    def watched_sync():
        sync()
        synced.append(len((tmp_path / "m.jsonl").read_text().splitlines()))

    loop.log.sync = watched_sync
    loop.save = lambda state, extra: seen.append((state, synced[-1]))
    loop_lib.run(loop, 0, "frozen", 0)
    assert seen == [(3, 3), (6, 6), (7, 7)]


def test_it_continues_after_the_first_steps(tmp_path):
    loop, saves = make_loop(tmp_path, first=6)
    assert loop_lib.run(loop, 6, "frozen", 6) == 7
    assert [n for n, _ in saves] == [7]
    loop, saves = make_loop(tmp_path, first=7)
    assert loop_lib.run(loop, 7, "frozen", 7) == 7 and saves == []


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_before_a_save(tmp_path, name, value):
    """A gradient that is not finite spoils the weights although this step's loss is fine."""
    loop, saves = make_loop(tmp_path, poison=(name, 5, value))
    message = rf"stage 's', step 6: {name} is (nan|inf); lower learning.*kept in kept 6\."
    with pytest.raises(UserError, match=message):
        loop_lib.run(loop, 0, "frozen", 0)
    assert [n for n, _ in saves] == [3]
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


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
    assert [n for n, _ in saves] == [3]


def test_a_stop_saves_after_that_step(tmp_path):
    asked = iter([False] * 3 + [True])
    loop, saves = make_loop(tmp_path, stop=lambda: next(asked))
    with pytest.raises(Stopped, match="stage 's' was asked to stop and is saved at step 4"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == [(n, {"data": {"at": n}}) for n in (3, 4)]
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


def test_the_time_that_a_step_waited_for_its_batch_is_logged(tmp_path):
    loop, _ = make_loop(tmp_path)
    real = loop.stream.__class__.__next__

    class Slow(Stream):
        def __next__(self):
            if self.at == 4:
                time.sleep(0.05)
            return real(self)

    loop.stream = Slow()
    loop_lib.run(loop, 0, "frozen", 0)
    waits = [row["data_wait"] for row in read_metrics(tmp_path / "m.jsonl")]
    assert waits[4] >= 0.05 > max(waits[:4] + waits[5:])


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

    loop, _ = make_loop(tmp_path, save=save, log_every=1)
    step_fn = loop.step_fn

    def slow(*arguments):
        state, metrics = step_fn(*arguments)
        return state, metrics | {"loss": OnDevice()}

    loop.step_fn = slow
    loop_lib.run(loop, 0, "frozen", 0)
    rates = [v for name, v, _ in loop.board.scalars if name == "s/tokens_per_second"]
    # Five tokens in two seconds; steps 4 and 7 come after a save.
    assert rates == [2.5, 2.5, 2.5, 1.0, 2.5, 2.5, 1.0]


def test_a_first_batch_without_target_is_an_error(tmp_path):
    loop, saves = make_loop(tmp_path, poison=("target_tokens", 0, 0.0))
    with pytest.raises(UserError, match=r"no token of the first batch is a target.*data\.length"):
        loop_lib.run(loop, 0, "frozen", 0)
    assert saves == []
    loop, _ = make_loop(tmp_path, poison=("target_tokens", 4, 0.0))
    assert loop_lib.run(loop, 0, "frozen", 0) == 7
