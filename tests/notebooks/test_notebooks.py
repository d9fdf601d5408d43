"""The notebooks: valid, without outputs, and their cells run."""

import ast
from pathlib import Path

import matplotlib
import nbformat
import pytest

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
def test_medcare_notebook_runs(monkeypatch, tmp_path, capsys):
    """From the first cell to the last, with two steps a stage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    matplotlib.use("agg")
    names = {}
    for tags, source in code_cells(ROOT / "notebooks" / "medcare_colab.ipynb"):
        if "train" in tags:
            for stage in names["config"].stages.order:
                names["config"].stages[stage].steps = 2
        exec(compile(source, "cell", "exec"), names)
    printed = capsys.readouterr().out
    assert (
        "lerning_rate" in printed and "align      What does a lack of vitamin C cause?" in printed
    )
    assert [ax.get_title() for ax in names["axes"]] == ["pretrain", "aggregate", "align"]
    assert all(len(ax.lines[0].get_xdata()) == 2 for ax in names["axes"])
