"""What pages tell a reader to type: commands and options exist, fields are there, code runs."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from medmoe_jax.api.configs import check_field, config, is_new
from medmoe_jax.cli import main
from medmoe_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md"}
    | {*ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")}
)
# Pages whose Python blocks stand alone; others have tests of their own, or need names of a run.
ALONE = ("concepts.md", "configs.md", "guide.md", "start/notebook.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|((?:^    [^\n]*\n|^\n)+)", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MENTION = re.compile(r"`(medmoe [^`]+)`")
CALL = re.compile(r"(?:\w+=\S+ +)*(medmoe\b.*)")
# What a page leaves open: any recipe stands there.
OPEN = {"--config=...": "--config=medcare:qwen2-1.5b"}


def calls(text: str) -> list[str]:
    """The lines of a page's blocks that call `medmoe`, continued ones as one, without comments."""
    found = []
    for language, fenced, indented in BLOCK.findall(text):
        if language in ("", "bash", "sh", "console", "text"):
            found += re.sub(r" *\\\n *", " ", fenced or indented).splitlines()
    lines = (re.sub(r"\s+#\s.*", "", line).strip().removeprefix("$ ") for line in found)
    return [match[1] for line in lines if (match := CALL.fullmatch(line))]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands."""
    kinds = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(kinds[0].choices) if kinds else {}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its commands."""
    return {*parser._option_string_actions}.union(*map(options, subparsers(parser).values()))


def fault(call: str, top: argparse.ArgumentParser) -> str:
    """What is wrong with a whole call, or nothing; it is read as the command reads it.

    Raises:
      UserError: a field that the recipe does not have.
    """
    if re.search(r"(\.\.\.|…)$", call) or "[" in call:
        return mention_fault(re.sub(r"[\[\]]", " ", call), top)
    try:
        arguments, rest = top.parse_known_args([OPEN.get(w, w) for w in shlex.split(call)[1:]])
    except SystemExit:
        return f"not parsed: {call}"
    others = [word for word in rest if not word.startswith("--config")]
    if others and arguments.command != "lm-eval":  # which hands on what is not its own
        return f"unknown {others}: {call}"
    check_fields([word for word in rest if word.startswith("--config")])
    return ""


def mention_fault(call: str, top: argparse.ArgumentParser) -> str:
    """What is wrong with a call that leaves things out, or nothing: its words must exist."""
    words, known = call.split()[1:], subparsers(top)
    if not words[0].startswith("-") and words[0].rstrip(":") not in {*known, "COMMAND"}:
        return f"no command: {call}"
    parser = known.get(words[0], top)
    named = {w.partition("=")[0] for w in words if re.match(r"--\w", w)}
    strangers = {w for w in named if not w.startswith("--config")} - options(parser)
    return f"unknown {strangers}: {call}" if strangers else ""


def check_fields(words: list[str]) -> None:
    """Raise UserError for a field that the recipe among these words does not have."""
    named = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    recipe = config(named[0]) if named and not named[0].startswith("mine") else None
    for word in words if recipe else []:
        name = word.removeprefix("--config.").partition("=")[0]
        if word.startswith("--config.") and not is_new(recipe, name):
            check_field(recipe, name)


@pytest.fixture(scope="module")
def top():
    return main.parser()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page, top):
    text = page.read_text(encoding="utf-8")
    faults = [fault(call, top) for call in calls(text)]
    faults += [mention_fault(call, top) for call in MENTION.findall(text)]
    assert not [one for one in faults if one]


def test_what_is_looked_at_is_what_is_trained():
    """A run is asked about with the settings that it is trained with: others may not fit."""
    asked = 0
    for page in PAGES:
        found = [call.split() for call in calls(page.read_text(encoding="utf-8"))]
        trained = [words[2:] for words in found if words[1:2] == ["train"]]
        for words in found:
            if words[1:2] == ["doctor"] and words[2:]:
                asked += 1
                assert words[2:] in trained, f"{page}: {' '.join(words)}"
    assert asked


def test_the_check_sees_what_is_wrong(top):
    for call in (
        "medmoe trian --workdir=x",
        "medmoe train --config=medcare",
        "medmoe train --config=medcare --workdir=x --epochs=2",
        "medmoe eval --workdir=x --task=medqa",
        "medmoe data build --ouput=x ...",
    ):
        assert fault(call, top), call
    assert mention_fault("medmoe data bild --dedup", top)
    with pytest.raises(UserError, match=r"did you mean 'stages\.align\.epochs'"):
        fault("medmoe train --config=medcare --workdir=x --config.stages.align.epoch=2", top)
    page = "Text.\n\n    $ A=1 medmoe train \\\n        --b  # why\n    make x\n\n"
    page += "```bash\nmedmoe chat\n```\n```python\nmedmoe\n```\n"
    assert calls(page) == ["medmoe train --b", "medmoe chat"]


def test_make_has_the_targets_that_pages_name():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {*re.findall(r"(?:^    |`)make ([a-z][\w-]*)", text, re.MULTILINE)} <= targets, page


@pytest.mark.parametrize("page", ALONE)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = PYTHON.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    assert blocks
