"""The model card of an export, as the hub reads it, against what the run has recorded."""

import json
import math
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.stage_records import kept_files
from medmoe_jax.cli.main import main
from medmoe_jax.evaluation.report import Report, Result
from tests import tiny
from tests.forged import forge

CONFIG = """from tests import tiny

def get_config():
    config = tiny.medcare_config()
    config.base.path = {!r}
    return config
"""
COMMIT = "0123456789" * 4
CARD = """---
license: other
license_name: tiny-terms
license_link: LICENSE.txt
language: [en, fr]
---
# The base, by its makers
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny base as the hub's cache has it, with a card and a licence."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(tiny.base_path(), folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("the terms")
    return folder


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(tiny.trained()[1], tmp_path / "w")


def export(folder, workdir, kind, *options, base=""):
    """The card of an export of the last stage, or of another one."""
    (folder / "recipe.py").write_text(CONFIG.format(str(base or tiny.base_path())))
    arguments = [f"--config={folder / 'recipe.py'}", f"--workdir={workdir}", f"--format={kind}"]
    if main(["export", *arguments, f"--output={folder / kind}", *options]):
        return None
    return ModelCard.load(folder / kind / "README.md")


def report(path, content, score, off=()):
    """A saved evaluation of the model with that fingerprint."""
    result = Result(
        "quiz", "en", "mine", "choice", "accuracy", score, 0.5, 0.7, 0.3, 41, chance=0.25
    )
    about = {"stage": "align", "fingerprint": content, "off": list(off)}
    path.parent.mkdir(exist_ok=True)
    Report([result], {"seed": 0, "limit": None}, about).save(path)


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.content, re.M | re.S)[1]


def table(text, first):
    """The rows of the table whose first column has that name, as lists of cells."""
    lines = text.split(f"| {first} |", 1)[1].splitlines()[2:]
    found = [line for line in lines if line.startswith("|")][: lines.index("")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def numbers(value):
    """All numbers in a JSON value, those inside its texts and keys included."""
    if isinstance(value, dict):
        return set().union(*map(numbers, [*value, *value.values()]), set())
    if isinstance(value, list):
        return set().union(*map(numbers, value), set())
    if isinstance(value, str):
        return {float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", value)}
    return {float(value)} if isinstance(value, int | float) else set()


def test_every_figure_is_one_of_the_records(workdir, tmp_path):
    records = {
        stage: {
            name: json.loads((workdir / "stages" / stage / f"{name}.json").read_text())
            for name in ("recipe", "manifest")
        }
        for stage in ("aggregate", "align")
    }
    manifest = records["align"]["manifest"]
    report(workdir / "report.json", manifest["content"], 0.625)
    report(workdir / "old" / "report.json", "of another recipe", 0.999)
    report(workdir / "part" / "report.json", manifest["content"], 0.888, ["alignment"])
    own = StageFolder.of(workdir, "align")
    report(own.report, "", 0.75)  # of `run.tasks`
    forge(own, manifest=lambda told: told.update(files=kept_files(own)))
    (workdir / "demo").mkdir()
    (workdir / "demo" / "report.json").write_text('{"models": {}}')
    card = export(tmp_path, workdir, "peft")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["medmoe_jax", "medical"],
    }
    sizes = {
        name: sum(math.prod(shape) for shape in bank["shapes"].values())
        for name, bank in manifest["banks"].items()
    }
    recipe, data = section(card, "Recipe"), section(card, "Data")
    known = numbers(records) | {float(n) for n in sizes.values()} | {1.0, 2.0}
    assert numbers((recipe + data).replace(",", "")) <= known
    for name, one in records.items():
        own = recipe.split(f"Stage {list(records).index(name) + 1}: {name}\n")[1]
        section_ = one["recipe"]["recipe"]["stage"]
        assert f"{one['manifest']['steps']} steps of 8 rows, each of 48 tokens" in own
        assert f"Learning rate {section_['learning_rate']}, after" in own
        assert f"Loss of the last step: {one['manifest']['metrics']['train']['loss']}." in own
        banks = {row[0]: row for row in table(own, "bank added")}
        assert banks.keys() == section_["banks"].keys()
        for bank, fields in section_["banks"].items():
            assert banks[bank][4:6] == [f"{fields['experts']} x 2", str(fields["alpha"])]
        of = data.split(f"Stage {name}:")[1]
        read = one["manifest"]["metrics"]["rows"]
        assert f"rows {read['rows']}, tokens {read['tokens']:,}, target" in of
        assert one["recipe"]["recipe"]["data"]["tokenizer"] in of
        assert [[row[0], float(row[1]), row[3], row[4]] for row in table(of, "source")] == [
            [source, section_["mixture"][source], digest, "unknown"]
            for source, digest in sorted(one["recipe"]["recipe"]["data"]["sources"].items())
        ]
    assert table(recipe, "bank | state") == [
        [bank, manifest["banks"][bank]["state"], str(sizes[bank]), "yes"]
        for bank in ("attention", "knowledge", "alignment")
    ]
    assert manifest["base_fingerprint"] in section(card, "Base")
    scores = section(card, "Scores")
    row = ["quiz", "accuracy", "62.5", "50.0–70.0", "25.0", "30.0", "41"]
    own = [*row[:2], "75.0", *row[3:]]
    assert table(scores, "task") == [own] and "(seed 0)" in scores
    assert table(scores.split("From `report.json`")[1], "task") == [row]
    assert (
        "of which: demo/report.json, old/report.json, part/report.json" in scores
        and "88.8" not in scores
    )
    assert "**Not medical advice.**" in card.content and str(tmp_path) not in card.content


def test_reports_that_cannot_be_read_are_named_and_left_out(workdir, tmp_path, capsys):
    contents = {
        "list": "[1]",
        "other": '{"results": {"acc": 1}}',
        "older": '{"results": [{"task": "a", "score": 0.5}]}',
        "torn": "{",
    }
    for name, content in contents.items():
        (workdir / name).mkdir()
        (workdir / name / "report.json").write_text(content)
    own = StageFolder.of(workdir, "align")
    report(own.report, "", 0.75)
    forge(own, manifest=lambda told: told.update(files=kept_files(own)))
    scores = section(export(tmp_path, workdir, "peft"), "Scores")
    assert table(scores, "task")[0][2] == "75.0"
    assert all(f"{name}/report.json" in scores for name in contents)
    own.report.write_text("[1]")
    forge(own, manifest=lambda told: told.update(files=kept_files(own)))
    assert export(tmp_path, workdir, "hf") is None
    assert "align/report.json: " in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_what_is_not_known_is_said_to_be(workdir, tmp_path):
    forge(StageFolder.of(workdir, "align"), manifest=lambda told: told.update(metrics={}))
    card = export(tmp_path, workdir, "hf", "--off=alignment")
    assert card.data.library_name == "transformers"
    assert "Loss of the last step: unknown." in section(card, "Recipe")
    assert "rows unknown, tokens unknown, target tokens unknown" in section(card, "Data")
    assert section(card, "Scores").strip().startswith("Unknown: ")
    assert "| alignment | off | 480 | no |" in section(card, "Recipe")
    assert "Left out of this export: bank alignment." in section(card, "Limits")


def test_a_stage_that_was_not_trained_here_says_so(workdir, tmp_path):
    def imported(recipe):
        recipe["imported"] = {"adapter_model.safetensors": "0123abcd"}
        recipe["data"]["sources"] = {}

    forge(StageFolder.of(workdir, "align"), recipe=imported)
    recipe = section(export(tmp_path, workdir, "peft"), "Recipe").split("Stage 2: align")[1]
    assert "Not trained here" in recipe and "adapter_model.safetensors 0123abcd" in recipe
    assert "AdamW" not in recipe


def test_a_bases_own_card_and_licence_go_along(base, tmp_path):
    card = export(tmp_path, "", "hf", "--stage=base", base=base)
    assert (tmp_path / "hf" / "BASE_README.md").read_text() == CARD
    assert (tmp_path / "hf" / "LICENSE.txt").read_text() == "the terms"
    assert card.data.to_dict() == {
        "base_model": "org/tiny",
        "language": ["en", "fr"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-terms",
        "license_link": "LICENSE.txt",
        "pipeline_tag": "text-generation",
        "tags": ["medmoe_jax", "medical"],
    }
    assert f"| revision | {COMMIT} |" in card.content
    assert "Nothing was trained: this is the base." in card.content
    assert "[BASE_README.md](BASE_README.md)" in card.content


def test_a_base_card_that_cannot_be_read(base, tmp_path, capsys):
    broken = shutil.copytree(base, tmp_path / "base")
    (broken / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert export(tmp_path, "", "hf", "--stage=base", base=broken) is None
    error = capsys.readouterr().err
    assert f"{broken / 'README.md'}: its front matter cannot be read" in error
    assert error.count("\n") == 1 and not (tmp_path / "hf").exists()
