"""Tables on a terminal: whole at any width, all of them by one class."""

import io
import re
from pathlib import Path

import pytest

from medmoe_jax.screen import Screen, ScreenTable, plain

PACKAGE = Path(__file__).parents[1] / "medmoe_jax"
NUMBERS = [f"{heading} number {i}" for i, heading in enumerate(("effective", "own", "a") * 4)]
ROWS = [
    [f"{kind}_of_some_length:with_a_split_{row}", "short"]
    + [f"{1000 * (row + 1) + i:,}.{i:03} – {i}" for i in range(len(NUMBERS))]
    for row, kind in enumerate(("knowledge", "质量控制医学考试题目"))
]
TABLE = ScreenTable(("task", "metric"), NUMBERS, ROWS, "a title", "a caption")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_no_number_is_cut_and_no_name(width):
    text = plain(TABLE, width)
    assert "…" not in text and text.count("a title") == text.count("a caption") == 1
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for row in ROWS:
        for number in row[2:]:
            assert sum(number in line for line in lines) == 1, number
    # A name's pieces stand below each other, in every block; of the other column is nothing there.
    letters = "".join(re.sub("[^a-z_]", "", line.split("  ")[0]) for line in lines)
    assert "knowledge_of_some_length" in letters
    headings = re.sub(r"\s+", " ", text)
    assert all(word in headings for word in ("effective", "number", "11"))


def test_what_has_room_is_one_table():
    assert plain(TABLE).count("knowledge") == plain(TABLE).count("metric") == 1
    assert plain(ScreenTable(("only", "names"), (), [["a", "b"]])).splitlines()[-1].split() == [
        "a",
        "b",
    ]
    assert plain(ScreenTable(("no",), ("rows",))).split()[:2] == ["no", "rows"]


def test_a_file_gets_the_whole_table_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    Screen(file=out).print(TABLE)
    assert all(number in out.getvalue() for row in ROWS for number in row[2:])


def test_every_table_is_one_of_these():
    others = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"rich\.table|from rich import .*\btable\b", path.read_text())
    ]
    assert others == ["screen.py"]
