"""The notebooks: valid, without outputs, alike in what they share, and run from the wheel."""

import ast
import re

import nbformat
import pytest

from notebooks import shared
from tests import tiny
from tests.notebooks.executed import execute, printed, shown

NOTEBOOKS = shared.NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell.cell_type == "code":
            ast.parse(cell.source)
    text = path.read_text(encoding="utf-8")
    assert len(text) < 100_000 and text == nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_notebooks_share_is_the_same_in_all(path):
    """As of now, and with an address that the project may get."""
    as_it_is = nbformat.read(path, as_version=4)
    again = shared.fill(nbformat.read(path, as_version=4), shared.repository(), path.name)
    assert again == as_it_is, "run `make notebooks`"
    assert again.cells[0].cell_type == "markdown" and again.cells[0].source.startswith("# ")
    filled = shared.fill(again, "https://github.com/org/some.name.git", path.name)
    text = nbformat.writes(filled)
    assert f"/github/org/some.name/blob/main/notebooks/{path.name})" in text
    assert 'REPOSITORY = \\"https://github.com/org/some.name.git\\"' in text
    back = shared.fill(filled, "", path.name)
    assert "colab-badge" not in nbformat.writes(back)


def test_a_notebook_that_shares_nothing_is_refused():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    del notebook.cells[1].metadata["tags"]
    with pytest.raises(ValueError, match="0 cells are tagged 'colab'"):
        shared.fill(notebook, "", "a.ipynb")


def settings(**fields) -> str:
    """Code that makes a notebook on a chat model run in seconds."""
    small = {
        "base.path": str(tiny.base_path()),
        "base.tokenizer": str(tiny.tokenizer().path),
        "data.template": "user_assistant",
        "data.length": 96,
        **fields,
    }
    return f"LIMIT = 3\nSETTINGS |= {small!r}"


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    """On the tiny base and with two steps a stage."""
    steps = {"stages.aggregate.steps": 2, "stages.align.steps": 2}
    ran = execute("quickstart", tmp_path, settings(**steps))
    told = printed(ran)
    assert "did you mean 'stages.align.learning_rate'" in told
    assert "stage 2" in told and "Scurvy" in told
    assert "Finished(aggregate, align; in runs/quickstart)" in told
    pages = "\n".join(shown(ran, "text/html"))
    assert pages.count("demo_knowledge:en") >= 2 and "95% interval" in pages
    for name in ("aggregate: loss", "align: loss", "align: overlap cos"):
        assert name in pages


@pytest.mark.slow
def test_reuse_runs(tmp_path):
    """With a few steps."""
    told = printed(execute("reuse", tmp_path, "STEPS = 3"))
    assert "('blocks.0.up', 'blocks.1.up')" in told and "changed by 0.0" in told
    assert "'experts' has gate 'token'" in told and "Linear Linear" in told
    whole, merged = map(float, re.search(r"loss ([\d.]+), merged ([\d.]+)", told).groups())
    assert abs(whole - merged) < 2e-4
