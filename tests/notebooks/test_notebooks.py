"""The notebooks: valid, without outputs, alike in what they share, and run from the wheel."""

import ast
import re

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

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
            ast.parse(TransformerManager().transform_cell(cell.source))
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


@pytest.mark.processes
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


@pytest.mark.processes
def test_two_stages_runs(tmp_path):
    """On the tiny base, with two steps a stage and tasks that need no generation."""
    steps = {f"stages.{name}.steps": 2 for name in ("aggregate", "align", "align_free")}
    tasks = "\nTASKS = ('demo_knowledge:en', 'demo_knowledge:zh')"
    ran = execute("two_stages", tmp_path, settings(**steps) + tasks)
    assert "assistant" in printed(ran) and len(shown(ran, "image/png")) == 1
    table = printed(ran, "scores")
    for model in ("base", "stage 1", "stage 2", "stage 2, free"):
        assert re.search(rf"^ *{model} +\d+% +\d+%$", table, re.MULTILINE), model
    cosines = re.findall(r"^align(?:_free)? +(0\.\d{4})$", printed(ran, "cosines"), re.MULTILINE)
    assert len(cosines) == 2 and float(cosines[0]) < float(cosines[1])
    assert "stage 2, free: " in printed(ran, "forgotten")


@pytest.mark.processes
def test_configs_runs(tmp_path):
    """The sweep trains its own stages only, and one table has them all."""
    steps = {f"stages.{name}.steps": 2 for name in ("aggregate", "align")}
    few = "\nTASKS, WEIGHTS, EXPERTS, RANKS = ('demo_knowledge:en',), {'free': 0.0}, (2,), ()"
    ran = execute("configs", tmp_path, settings(**steps) + few)
    told = printed(ran)
    assert "did you mean 'stages.align.learning_rate'" in told
    assert re.search(r"^free +after aggregate$", told, re.MULTILINE)
    assert re.search(r"^experts_2 +after the base$", told, re.MULTILINE)
    table = printed(ran, "table")
    names = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert {"aggregate", "align", "free", "experts_2"} <= set(names)
    more = printed(ran, "more")
    for name in ("aggregate", "align", "free", "experts_2"):
        assert f"stage '{name}' is finished: skipped" in more
    assert "stage 'stronger': 2 steps" in more and len(shown(ran, "image/png")) == 2


@pytest.mark.processes
def test_languages_runs(tmp_path):
    """On the tiny base: tables and pictures of every language, taught or not."""
    layers = {"stages.mixture.banks.experts.layers": (-2, None)}
    ran = execute("languages", tmp_path, settings(**layers, **{"stages.mixture.steps": 2}))
    assert len(shown(ran, "image/png")) == 1
    shares, new, added = (printed(ran, tag) for tag in ("shares", "new", "added"))
    for code in ("en", "de", "es", "fr", "sw", "zh"):
        assert re.search(rf"\b{code}( +[\d.e-]+){{5}}$", shares, re.MULTILINE), code
    for code in ("pt", "nl"):
        # Its expert is known only once the table has it.
        assert re.search(rf"\b{code}( +[\d.e-]+){{4}}$", new, re.MULTILINE), code
        assert re.search(rf"\b{code}( +[\d.e-]+){{5}}$", added, re.MULTILINE), code
    assert "experts" in printed(ran, "refused") and "5" in printed(ran, "refused")


@pytest.mark.aot
def test_plan_a_pod_runs(tmp_path):
    """A small decoder on one chip: a compilation for TPU takes most of the time."""
    decoder = {"vocab_size": 512, "d_model": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2}
    decoder |= {"head_dim": 128, "d_ff": 512, "max_positions": 32768}
    small = {"base.path": "", "base.decoder": decoder, "data.length": 256, "data.global_batch": 2}
    small |= {"data.shards": 2, "run.accumulation": 1}
    parameters = f"SETTINGS, SLICES = {small!r}, ('v5e:1x1',)"
    parameters += "\nCHANGES = {}"
    ran = execute("plan_a_pod", tmp_path, parameters)
    assert len(shown(ran, "image/png")) == 1
    table = printed(ran, "plans")
    assert re.search(r"v5e:1x1 +yes +1 +[\d.]+ +16$", table, re.MULTILINE)
    assert re.search(r"as it is +yes +[\d.]+ +\d+$", printed(ran, "smaller"), re.MULTILINE)


@pytest.mark.processes
def test_reuse_runs(tmp_path):
    """With a few steps."""
    told = printed(execute("reuse", tmp_path, "STEPS = 3"))
    assert "('blocks.0.up', 'blocks.1.up')" in told and "changed by 0.0" in told
    assert "'experts' has gate 'token'" in told and "Linear Linear" in told
    whole, merged = map(float, re.search(r"loss ([\d.]+), merged ([\d.]+)", told).groups())
    assert abs(whole - merged) < 2e-4
