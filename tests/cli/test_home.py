"""`~/x`, as shells leave it in `--option=~/x`, lies in the home folder, for options and fields."""

import shutil

import pytest

import medmoe_jax
from medmoe_jax.cli.main import main
from tests import tiny

pytestmark = pytest.mark.slow

RECIPE = """
from tests import tiny

def get_config():
    config = tiny.medcare_config()
    config.base.path, config.base.tokenizer = "~/base", "~/tokenizer.model"
    config.data.sources.knowledge.path = "~/knowledge.jsonl"
    config.data.sources.alignment.path = "~/alignment.jsonl"
    config.data.languages = "~/languages.csv"
    config.run.tasks = ("~/items.jsonl",)
    config.run.compilation_cache = "~/programs"
    config.stages.aggregate.steps = config.stages.align.steps = 2
    return config
"""
ITEMS = [{"prompt": "aspirin: yes or no, pain?", "answer": "yes", "choices": ["yes", "no"]}]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with all that a run needs; the current folder is another one, and empty."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(tiny.base_path(), home / "base")
    shutil.copy(tiny.tokenizer().path, home / "tokenizer.model")
    for name in ("knowledge", "alignment"):
        shutil.copy(tiny.data(name), home)
    tiny.write_rows(home / "items.jsonl", ITEMS)
    tiny.write_rows(home / "prompts.jsonl", [{"prompt": "aspirin?", "completion": "pain"}])
    (home / "recipe.py").write_text(RECIPE)
    (home / "languages.csv").write_text("code,expert,name,note\nen,west,English,\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not list(here.iterdir())


def test_every_command_finds_and_makes_what_it_is_told(home, capsys):
    run = ["--config=~/recipe.py", "--workdir=~/runs/a"]
    made = {
        "eval": ["--tasks=~/items.jsonl", "--output=~/eval"],
        "score": ["--input=~/prompts.jsonl", "--output=~/scores.jsonl"],
        "generate": ["--input=~/prompts.jsonl", "--output=~/texts.jsonl", "--max-tokens=2"],
        "export": ["--format=hf", "--output=~/exported"],
    }
    medmoe_jax.train("~/recipe.py", "~/runs/a")
    for command, options in made.items():
        assert main([command, *run, *options]) == 0, (command, capsys.readouterr().err)
    assert main(["plot", "~/runs/a", "--output=~/plots"]) == 0, capsys.readouterr().err
    asked = ["--train=~/knowledge.jsonl", "--tasks=~/items.jsonl", "--output=~/overlap"]
    assert main(["overlap", *asked]) == 0, capsys.readouterr().err
    built = ["--input", "~/knowledge.jsonl", "--output=~/built", "--name=mine"]
    assert main(["data", "build", *built]) == 0, capsys.readouterr().err
    shutil.copytree(home / "eval", home / "again")
    assert main(["compare", "~/eval", "~/again", "--output=~/compared"]) == 0
    names = "runs/a eval scores.jsonl texts.jsonl exported plots overlap built compared"
    for name in names.split():
        assert (home / name).exists(), name
