"""`medmoe demo`, with a few steps and items: what it trains, asks, prints and writes."""

import json
import re
import shutil

import pytest

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.cli import demo
from medmoe_jax.cli.main import main
from medmoe_jax.data.demo import answers
from tests import tiny

LABELS = [
    "base",
    "stage 1, with the noise bank",
    "stage 1, noise bank dropped",
    "stage 2",
    "stage 2 without orthogonality",
]
FEW = ["--config.run.task_limit=3"] + [
    f"--config.stages.{stage}.steps=2" for stage in ("aggregate", "align", "align_free")
]


def shown(folder):
    """report.json, and report.html as text, of a demonstration whose scores are whole."""
    report = json.loads((folder / "report.json").read_text())
    assert set(report["models"]) == set(LABELS)
    for results in report["models"].values():
        assert [r["n"] for r in results] == [3, 3]
        assert [r["group"] for r in results] == ["knowledge", "alignment"]
    # Two steps turn nothing by much: both are cosines, and the stages are two.
    assert set(report["mean_abs_cos"]) == {"align", "align_free"}
    return report, (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_chat_model_is_asked_before_and_after(tmp_path, capsys):
    workdir = tmp_path / "a b"
    main(
        [
            "demo", *FEW, f"--workdir={workdir}", f"--config.base.path={tiny.base_path()}",
            f"--config.base.tokenizer={tiny.tokenizer().path}", "--config.data.length=96",
            "--config.data.template=user_assistant",
        ]
    )  # fmt: skip
    report, page = shown(workdir)
    asked = [LABELS[0], LABELS[2], LABELS[3]]
    assert len(report["answers"]) == len(answers.questions())
    for one, question in zip(report["answers"], answers.questions(), strict=True):
        assert one["question"] == question.text and set(one["answers"]) == set(asked)
        assert question.text in page
    assert {r["task"] for r in report["models"]["base"]} == {
        "demo_knowledge:en",
        "demo_alignment:en",
    }
    printed = capsys.readouterr().err
    for label in asked:
        assert f"{label}: 0 of 10 medical, 0 of 5 everyday questions answered right" in printed
    assert "aggregate: use of the experts of noise" in page
    assert f"talk with it: medmoe chat '--workdir={workdir}'" in printed
    log = read_metrics(workdir / "stages" / "aggregate" / "metrics.jsonl")
    tokens = f"{sum(int(row['tokens']) for row in log):,}"
    cells = ["aggregate", "2", "4 × 96", "0.003"]
    line = "".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in cells)
    assert re.search(rf"{line}<td[^>]*>[\d,]+</td><td[^>]*>{tokens}</td>", page)


@pytest.mark.parametrize("words", [["--tiny"], [f"--config.base.path={tiny.folder()}"]])
def test_the_folder_of_another_run_is_left_alone(tmp_path, capsys, words):
    workdir = shutil.copytree(tiny.trained()[1], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert main(["demo", *words, f"--workdir={workdir}"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "holds another run (stages aggregate, align); give the demonstration a new" in said
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_the_tiny_one_makes_its_own_tokenizer_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.corpus, "texts_for_tokenizer", lambda: ["What is it? It is 药。"] * 99)
    size = ["--config.base.decoder.vocab_size=280"]
    made = []
    for _ in range(2):
        run = demo._open(demo.TINY, tmp_path, size)
        assert run.setup.tokenizer.path == tmp_path / "tokenizer.model"
        assert [one.name for one in run.stages] == ["pretrain", "aggregate", "align_free", "align"]
        made.append((tmp_path / "tokenizer.model").stat().st_mtime_ns)
    assert made[0] == made[1]
    stages = {one.stage for one in demo.TINY.models}
    assert stages == {"pretrain", "aggregate", "align", "align_free"}
