"""The page of errors quotes messages that the program has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = "…"


def texts(tree: ast.AST) -> list[str]:
    """The texts of a module, with one sign in the place of what an f-string fills in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else LEFT_OUT for v in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def is_there(message: str, known: str) -> bool:
    """Whether the parts of a message stand in one text in this order."""
    parts = [re.escape(part.strip()) for part in message.split(LEFT_OUT) if part.strip(" ;:'")]
    return re.search("[^\n]*?".join(parts), known) is not None


def test_every_message_is_one_of_the_program():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \| ", page, re.MULTILINE)
    messages = [one for row in rows for one in re.findall(r"`([^`]+)`", row)]
    sources = (ROOT / "medmoe_jax").rglob("*.py")
    known = "\n".join(
        text.replace("\n", " ") for s in sources for text in texts(ast.parse(s.read_text("utf-8")))
    )
    assert len(messages) > 40
    assert not [one for one in messages if not is_there(one, known)]
    assert not is_there("process … differs from process 1 in …", known)


def test_exit_statuses_are_those_of_the_command():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    told = set(
        re.findall(r"\b(\d+) ", page.partition("Exit statuses:")[2].partition("Anything")[0])
    )
    source = (ROOT / "medmoe_jax" / "cli" / "main.py").read_text(encoding="utf-8")
    wanted = re.findall(r"(\d+) = ", ast.get_docstring(ast.parse(source)))
    assert set(wanted) <= told | {"0", "1"}
