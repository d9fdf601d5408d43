"""Every command that writes ends with status 74 and one line when its storage fails."""

import errno

import pytest

from medmoe_jax.cli.main import main
from tests import tiny
from tests.full_disk import failing

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": f"{row['prompt']} {n}", "response": row["response"]}
    for n, row in enumerate(tiny.alignment_rows()[:4])
]
CHOICES = [{"prompt": f"{n} mg?", "answer": "yes", "choices": ["yes", "no"]} for n in range(4)]
TEXTS = [{"prompt": "flu?", "completion": "yes"}]

# What each command is asked, by the folder of rows and what is to be written.
MODEL = {
    "export": lambda rows, out: ["export", "--format=peft", f"--output={out}"],
    "generate": lambda rows, out: [
        "generate", f"--input={rows}/choices.jsonl", f"--output={out}/g.jsonl", "--max-tokens=2"],
    "score": lambda rows, out: ["score", f"--input={rows}/texts.jsonl", f"--output={out}/s.jsonl"],
    "eval": lambda rows, out: ["eval", f"--tasks={rows}/choices.jsonl", f"--output={out}"],
    "analyze": lambda rows, out: [
        "analyze", "routing", "--stage=aggregate", f"--data={rows}/rows.jsonl", f"--out={out}"],
    "train": lambda rows, out: [
        "train", "--config.stages.order=('aggregate',)", "--config.stages.aggregate.steps=2"],
}  # fmt: skip
OTHERS = {
    "overlap": lambda rows, out: [
        "overlap", f"--train={rows}/rows.jsonl", f"--tasks={rows}/choices.jsonl",
        f"--output={out}"],
    "data build": lambda rows, out: [
        "data", "build", f"--input={rows}/rows.jsonl", f"--output={out}"],
    "tokenizer train": lambda rows, out: [
        "tokenizer", "train", f"--input={rows}/rows.jsonl", "--vocab-size=296",
        f"--output={out}/t.model"],
    "plot": lambda rows, out: ["plot", str(tiny.trained()[1]), f"--output={out}"],
}  # fmt: skip
LATER = {"train": 20, "plot": 4}  # a write after the first that fails; 2 for the others


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder of rows to train on, to choose an answer for and to score."""
    folder = tmp_path_factory.mktemp("rows")
    for name, there in {"rows": ROWS, "choices": CHOICES, "texts": TEXTS}.items():
        tiny.write_rows(folder / f"{name}.jsonl", there)
    return folder


@pytest.mark.parametrize("name", [*MODEL, *OTHERS])
def test_a_write_that_fails(name, config, workdir, rows, tmp_path, capsys):
    """The first write or a later one; where storage is there again, the command does its work."""
    out, later = tmp_path / "made" / "out", LATER.get(name, 2)
    place = [] if name in OTHERS else [config, f"--workdir={out if name == 'train' else workdir}"]
    words = (MODEL | OTHERS)[name](rows, out) + place
    for at, number in ((1, errno.ENOSPC), (later, errno.EIO)):
        capsys.readouterr()
        with failing(tmp_path, at, number):
            status = main(words)
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if "error: " in line]
        assert status == 74, (at, said)
        assert len(errors) == 1 and "Traceback" not in said, (at, said)
        assert "out" in errors[0], (at, errors)
        assert not [path for path in tmp_path.rglob("*.partial*") if path.is_file()], at
    with failing(tmp_path, 10**9, 0) as seen:
        assert main(words) == 0, capsys.readouterr().err
    assert seen["seen"] >= later
