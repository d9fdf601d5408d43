"""What the pages name exists: files, and the functions and classes in them; examples run."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")})
NAMED = re.compile(r"`([\w./]+\.py)(?::(\w+))?`")


# Whose docstrings have examples, on plain arrays.
WITH_EXAMPLES = (
    "kernels.grouped",
    "kernels.lora_linear",
    "kernels.permute",
    "kernels.router_equations",
    "kernels.routing",
    "routing.dispatch",
)


def find(name: str, page: Path) -> Path | None:
    """The file that a page names: from the root, within the package or beside the page."""
    folders = (ROOT, ROOT / "medmoe_jax", page.parent)
    return next((f / name for f in folders if (f / name).is_file()), None)


def defined(file: Path) -> set[str]:
    """What a module defines at its top."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_exist(page):
    wrong = []
    for name, what in NAMED.findall(page.read_text(encoding="utf-8")):
        file = find(name, page)
        if file is None or (what and what not in defined(file)):
            wrong.append(f"{name}:{what}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_code_is_taken_for_a_part_of_a_list(page):
    """The site takes an indented block right after a list for a paragraph of its last item."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    item = r"^(?:[-*]|\d+\.) .*\n(?:(?: .*)?\n)*?\n {4,}\S.*"
    assert not [found.splitlines()[-1] for found in re.findall(item, text, re.M)]


def test_every_line_on_what_is_the_same_names_its_tests():
    """That they exist is seen above."""
    text = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (?!compared|what|-)(.+) \|$", text, re.MULTILINE)
    assert len(lines) > 30
    for line in lines:
        compared, same, tests = line.split(" | ")
        assert compared and re.search(r"bit for bit|the same|\de-\d|twice", same), line
        for name in tests.split(", "):
            assert re.fullmatch(r"`tests/[\w/]+/test_\w+\.py:(test|Test)\w+`", name), line


def test_one_call_is_told_from_the_command_to_the_kernel():
    """In the table and in the drawing alike."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## One call of `medmoe train`")[2].partition("\n## ")[0]
    table, drawing = section.split("```mermaid")
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py):\w+`", table, re.MULTILINE)
    assert len(steps) >= 11
    assert steps[0] == "cli/main.py" and steps[-1].startswith("kernels/")
    drawn = set(re.findall(r'\["([\w/]+\.py)"\]', drawing))
    assert set(steps) <= drawn
    assert all((ROOT / "medmoe_jax" / name).is_file() for name in drawn)


@pytest.mark.slow
def test_examples_in_docstrings():
    for name in WITH_EXAMPLES:
        module = importlib.import_module(f"medmoe_jax.{name}")
        failed, tried = doctest.testmod(module)
        assert tried and not failed, name


@pytest.mark.slow
def test_the_code_of_the_page_on_reuse_runs():
    """Every block in turn, in one namespace, as a reader would paste them."""
    text = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/reuse.md, block {number}", "exec"), names)
