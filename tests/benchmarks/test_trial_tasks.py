"""The table of every task before and after: what it shows, and what it refuses."""

import json

import pytest

from benchmarks import pages, trial_tasks
from configs import trial
from medmoe_jax.evaluation.tasks import list_tasks


def _line(task, score, low, high, majority=None):
    line = dict.fromkeys((*trial_tasks.FIELDS, *trial_tasks.COUNTED), 0)
    names = {"task": task, "language": "en", "split": "dev", "metric": "accuracy", "n": 50}
    numbers = {"score": score, "low": low, "high": high, "majority": majority, "chance": None}
    return {**line, **names, **numbers}


def _report(folder, lines, failures=()):
    about = {"versions": {"jax": "1"}}
    report = {
        "results": lines,
        "failures": list(failures),
        "about": about,
        "settings": {"limit": 50},
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({**report, "more": 1}))
    return str(folder)


def test_what_is_clear_of_before_and_of_guessing_is_bold(tmp_path):
    before = [_line("rqe", 0.5, 0.4, 0.6, 0.55), _line("cmedtc", 0.1, 0.05, 0.2, 0.3)]
    after = [_line("cmedtc", 0.29, 0.25, 0.35, 0.3), _line("rqe", 0.7, 0.61, 0.8, 0.55)]
    folders = [_report(tmp_path / "a", before), _report(tmp_path / "b", after)]
    page, output = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("top\n<!-- tasks -->\nold\n<!-- end of tasks -->\nend\n")
    trial_tasks.main([*folders, f"--output={output}", f"--page={page}"])
    rows = pages.shown(page, "tasks").split("\n")[2:]
    # In the order of the list of tasks; above the score before is not above the commonest answer.
    start = "| en | dev | accuracy | 50 | –"
    assert rows == [
        f"| cmedtc {start} | 30.0 | 10.0 (5.0–20.0) | 29.0 (25.0–35.0) |",
        f"| rqe {start} | 55.0 | 50.0 (40.0–60.0) | **70.0 (61.0–80.0)** |",
    ]
    assert page.read_text().startswith("top\n") and page.read_text().endswith("\nend\n")
    page.write_text("<!-- tasks --><!-- end of tasks -->")
    trial_tasks.main([f"--output={output}", f"--page={page}"])
    assert pages.shown(page, "tasks").split("\n")[2:] == rows


def test_reports_that_do_not_fit(tmp_path):
    one = _report(tmp_path / "a", [_line("rqe", 0.5, 0.4, 0.6)])
    other = _report(tmp_path / "b", [_line("cmedtc", 0.5, 0.4, 0.6)])
    failed = _report(tmp_path / "c", [_line("rqe", 0.5, 0.4, 0.6)], ["mmlu"])
    with pytest.raises(SystemExit, match="same tasks"):
        trial_tasks.main([one, other])
    with pytest.raises(SystemExit, match="not all tasks were done"):
        trial_tasks.main([one, failed])


def test_the_page_holds_the_committed_figures():
    results = json.loads(trial_tasks.RESULTS.read_text())
    assert pages.shown(trial_tasks.PAGE, "tasks") == trial_tasks.table(results)


def test_the_recipe_reads_sets_of_the_list():
    names = {*trial.KNOWLEDGE, *trial.ALIGNMENT}
    assert names <= {task.name for task in list_tasks()}
    assert set(trial.get_config().stages.align.mixture) == set(trial.ALIGNMENT)
