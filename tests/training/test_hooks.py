"""What the hooks that come with the project leave behind: lines, a bar, events, a trace."""

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from tqdm import tqdm

from medmoe_jax.screen import TerminalBar
from medmoe_jax.training import terminal
from medmoe_jax.training.config import recipe
from medmoe_jax.training.hooks.bar import Bar
from medmoe_jax.training.hooks.profiler import Profiler
from medmoe_jax.training.hooks.protocol import Hook, Progress, StepRecord
from medmoe_jax.training.hooks.writers import TensorBoard
from medmoe_jax.training.terminal import LogHandler, StepBar, note


def progress_of(last, first=0):
    return Progress("learn", first, last, {"a": jnp.zeros(2)})


def record_of(step):
    return StepRecord(step, {}, {}, {"loss": 1 / step, "tokens_per_second": 1234.5})


def ticking():
    """A clock on which ten seconds pass from one look to the next."""
    return SimpleNamespace(monotonic=iter(range(0, 700, 10)).__next__)


def run_through(hook, last, first=0, seen=lambda step: None):
    """Tell a hook of steps `first + 1 .. last`, as the loop does without saves."""
    progress, add = progress_of(last, first), jax.jit(lambda x: x + 1)
    hook.on_start(progress)
    for step in range(first + 1, last + 1):
        with jax.profiler.StepTraceAnnotation("learn", step_num=step):
            progress.state = jax.tree.map(add, progress.state)
        progress.step = step
        hook.on_step(progress)
        hook.on_metrics(progress, record_of(step))
        seen(step)
    hook.on_end(progress)


@pytest.fixture
def screen(monkeypatch):
    """What the console shows, a terminal of 100 columns or not."""

    def open_console(is_terminal):
        text = io.StringIO()
        console = Console(file=text, force_terminal=is_terminal, width=100, color_system=None)
        monkeypatch.setattr(terminal, "console", console)
        return text

    return open_console


def test_a_hook_does_nothing_unless_it_says_so():
    quiet = type("Quiet", (Hook,), {})()
    progress = progress_of(1)
    assert quiet.on_step(progress) == {}
    for event in (quiet.on_start, quiet.on_save, quiet.on_end):
        assert event(progress) is None
    assert quiet.on_metrics(progress, record_of(1)) is None


def test_without_a_terminal_there_is_a_line_every_few_steps(screen, monkeypatch):
    text = screen(is_terminal=False)
    monkeypatch.setattr(terminal, "time", ticking())
    run_through(Bar(3), 7)
    assert text.getvalue().splitlines() == [
        "learn: step 3 of 7, loss 0.3333, 1,234 tok/s, 0:00:40 left",
        "learn: step 6 of 7, loss 0.1667, 1,234 tok/s, 0:00:10 left",
        "learn: step 7 of 7, loss 0.1429, 1,234 tok/s, 0:00:00 left",
    ]


def test_the_time_left_goes_by_the_steps_since_the_restart(screen, monkeypatch):
    text = screen(is_terminal=False)
    monkeypatch.setattr(terminal, "time", ticking())
    run_through(Bar(2), last=104, first=100)
    assert "step 102 of 104" in text.getvalue() and "0:00:20 left" in text.getvalue()


def test_a_bar_tells_loss_speed_and_the_time_left(screen):
    text = screen(is_terminal=True)
    run_through(Bar(3), 7)
    last = next(line for line in text.getvalue().splitlines() if "7/7" in line)
    assert "learn" in last and "loss 0.1429, 1,234 tok/s, 0:00:00 left" in last


def test_lines_stand_above_the_bar(screen, monkeypatch):
    """Notes and log lines begin on a line of their own, and the bar is drawn again below."""
    text = screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", text)
    logger = logging.getLogger("medmoe_jax.test_hooks")
    handler = LogHandler()
    logger.addHandler(handler)
    logger.propagate = False
    bar = StepBar("learn", 3, 0, 1)
    try:
        bar.update(1, "loss 9")
        logger.warning("a checkpoint was passed over")
        note("a note")
        bar.update(2, "loss 8")
    finally:
        bar.close()
        logger.removeHandler(handler)
    shown = [
        line.rsplit("\r", 1)[-1].replace("\x1b[2K", "") for line in text.getvalue().split("\n")
    ]
    shown = [line.removeprefix("\x1b[?25l").strip() for line in shown]
    assert "a checkpoint was passed over" in shown and "a note" in shown
    assert shown.index("a note") < next(n for n, s in enumerate(shown) if "2/3" in s)


def test_lines_stand_above_a_bar_of_tqdm(screen, monkeypatch):
    """The bar is wiped before each of them, and drawn again after it."""
    text = screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", text)
    with tqdm(total=3, file=text, desc="asking") as bar:
        bar.update()
        LogHandler().emit(logging.makeLogRecord({"msg": "a checkpoint was passed over"}))
        note("a note")
        *lines, last = re.split(r"\n", text.getvalue())
    seen = [line.rsplit("\r", 1)[-1].strip() for line in lines]
    assert seen == ["a checkpoint was passed over", "a note"] and "asking" in last


@pytest.mark.parametrize("stream", ["terminal", "file", "none"])
def test_a_bar_is_drawn_at_a_terminal_alone(screen, monkeypatch, stream):
    """And there may be no standard error at all, as in pythonw."""
    text = None if stream == "none" else screen(is_terminal=stream == "terminal")
    if text is not None:
        text.isatty = lambda: stream == "terminal"
    monkeypatch.setattr("sys.stderr", text)
    for quiet in (True, False):
        assert list(TerminalBar(range(3), "asking", quiet=quiet)) == [0, 1, 2]
        note("a note")
        LogHandler().emit(logging.makeLogRecord({"msg": "a line"}))
        shown = text is not None and "asking" in text.getvalue()
        assert shown == (stream == "terminal" and not quiet)


def test_every_bar_is_one_of_the_screen():
    """That of tqdm itself would be drawn everywhere."""
    package = Path(terminal.__file__).parents[1]
    assert [path.name for path in package.rglob("*.py") if "(tqdm)" in path.read_text()] == [
        "screen.py"
    ]
    assert not [path for path in package.rglob("*.py") if re.search(r"\btqdm\(", path.read_text())]


def test_log_lines_go_to_standard_error_as_it_is(capsys):
    handler = LogHandler()
    handler.emit(logging.makeLogRecord({"msg": "after the handler was made"}))
    assert capsys.readouterr().err == "after the handler was made\n"


def test_tensorboard_has_the_steps_that_are_due(tmp_path, monkeypatch):
    given = []
    hook = TensorBoard(tmp_path, 3)
    progress = progress_of(7)
    hook.on_start(progress)
    monkeypatch.setattr(hook._writer, "write_event", given.append)
    for step in range(1, 8):
        hook.on_metrics(progress, record_of(step))
    hook.on_end(progress)
    values = [(event.step, value) for event in given for value in event.summary.value]
    assert [(step, value.tag) for step, value in values if "loss" in value.tag] == [
        (step, "learn/loss") for step in (3, 6, 7)
    ]
    losses = [value.simple_value for _, value in values if value.tag == "learn/loss"]
    assert losses == pytest.approx([1 / 3, 1 / 6, 1 / 7], rel=1e-6)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def traced_steps(folder):
    """The numbers of the steps in the trace under a folder."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    return {
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "learn"
    }


@pytest.mark.parametrize(
    "first, count, begun, steps",
    [(2, 2, 0, {2, 3}), (1, 1, 0, {1}), (4, 9, 0, {4, 5}), (2, 3, 2, {3, 4})],
    ids=["middle", "first", "cut short", "after a restart"],
)
def test_a_trace_holds_the_steps_asked_for(tmp_path, screen, first, count, begun, steps):
    text = screen(is_terminal=False)
    run_through(Profiler(tmp_path / "profile", first, count), 5, begun)
    assert traced_steps(tmp_path / "profile") == steps
    assert f"in {tmp_path / 'profile'}" in text.getvalue()


@pytest.mark.parametrize("first, begun", [(6, 0), (9, 0), (1, 3)])
def test_steps_that_are_not_made_are_not_traced(tmp_path, screen, first, begun):
    text = screen(is_terminal=False)
    run_through(Profiler(tmp_path / "profile", first, 2), 5, begun)
    assert not (tmp_path / "profile").exists()
    assert ("nothing is traced" in text.getvalue()) == (first > 5)


def test_nothing_is_traced_by_default():
    assert recipe().run.profile == ()
