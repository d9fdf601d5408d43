"""The notebooks: valid, without outputs, and their cells run."""

import ast
from pathlib import Path

import matplotlib
import nbformat
import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path):
    """(tags, source) of every code cell, shell commands left out."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            lines = (line for line in cell.source.splitlines() if not line.strip().startswith("!"))
            yield set(cell.metadata.get("tags", ())), "\n".join(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for _, source in code_cells(path):
        ast.parse(source)
    assert NOTEBOOKS


@pytest.mark.slow
def test_quickstart_runs(monkeypatch, tmp_path, capsys):
    """From the first cell to the last, on the tiny base and with two steps a stage."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    small = {
        "base.path": str(tiny.base_path()),
        "base.tokenizer": str(tiny.tokenizer().path),
        "data.template": "user_assistant",
        "data.length": 96,
        "stages.aggregate.steps": 2,
        "stages.align.steps": 2,
    }
    names = {}
    for tags, source in code_cells(ROOT / "notebooks" / "quickstart.ipynb"):
        exec(compile(source.replace("limit=60", "limit=3"), "cell", "exec"), names)
        if "settings" in tags:
            names["SETTINGS"] |= small
    printed = capsys.readouterr().out
    assert "did you mean 'stages.align.learning_rate'" in printed
    assert "stage 2" in printed and "Scurvy" in printed
    assert names["done"].stages == ("aggregate", "align")
    assert [one.n for one in names["scores"].report.results] == [3, 3]
    assert {"aggregate.loss", "align.loss", "align.overlap_cos"} <= set(names["drawn"].pictures)
    assert "<iframe" in names["drawn"]._repr_html_()


@pytest.mark.slow
def test_reuse_notebook_runs(monkeypatch, tmp_path, capsys):
    """From the first cell to the last, with a few steps."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names = {}
    for _, source in code_cells(ROOT / "notebooks" / "reuse.ipynb"):
        exec(compile(source.replace("STEPS = 150", "STEPS = 3"), "cell", "exec"), names)
    printed = capsys.readouterr().out
    assert "('blocks.0.up', 'blocks.1.up')" in printed and "changed by 0.0" in printed
    assert "'experts' has gate 'token'" in printed and "Linear Linear" in printed
    whole, merged = map(float, printed.splitlines()[-1].replace("loss ", "").split(", merged "))
    assert abs(whole - merged) < 2e-4
