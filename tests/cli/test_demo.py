"""`medmoe demo`, with a few steps and items: what it trains, asks, prints and writes."""

import json

import pytest

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
    # Two steps of 5e-4 turn nothing by much: both are cosines, and the stages are two.
    assert set(report["mean_abs_cos"]) == {"align", "align_free"}
    return report, (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_chat_model_is_asked_before_and_after(tmp_path, capsys):
    main(
        [
            "demo", *FEW, f"--workdir={tmp_path}", f"--config.base.path={tiny.base_path()}",
            f"--config.base.tokenizer={tiny.tokenizer().path}", "--config.data.length=96",
            "--config.data.template=user_assistant",
        ]
    )  # fmt: skip
    report, page = shown(tmp_path)
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
    assert "Use of the experts, aggregate: noise" in page


@pytest.mark.slow
def test_the_tiny_one_makes_its_own_base_and_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--config.stages.pretrain.steps=2", "--config.base.decoder.n_layers=1"]
    main(["demo", "--tiny", *FEW, *few])
    report, page = shown(tmp_path / "runs" / "demo-tiny")
    assert report["answers"] == [] and "Open questions" not in page
    assert (tmp_path / "runs" / "demo-tiny" / "tokenizer.model").exists()
    assert "chance is 25% on knowledge (3 items)" in capsys.readouterr().err
