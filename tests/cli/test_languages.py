"""`medmoe data languages`."""

import re

import pytest

from medmoe_jax.cli.main import main
from tests import tiny

ROWS = [
    {"prompt": "What is malaria?", "response": "An infection.", "language": "en"},
    {"prompt": "What is aspirin for?", "response": "It is for pain and for fever."},
    {"prompt": "Was hilft gegen Kopfschmerzen?", "response": "Aspirin hilft, und Schlaf auch."},
    {"prompt": "a?", "response": "b"},
    {"prompt": "a?", "response": "b", "language": "xx"},
]


@pytest.fixture
def rows(tmp_path):
    return str(tiny.write_rows(tmp_path / "rows.jsonl", ROWS))


def counted(capsys, *arguments):
    """`{language: (expert, named, detected)}` as printed."""
    assert main(["data", "languages", *arguments]) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"jsonl  (\S+) +(.*?) {2,}(\d+) +(\d+) *$", printed, re.MULTILINE)
    return {language: tuple(cells) for language, *cells in found}


def test_rows_of_each_language(rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert counted(capsys, f"--input={rows}", "--table=families") == {
        "en": ("indo-european", "1", "1"),
        "de": ("indo-european", "0", "1"),
        "unknown": ("", "0", "1"),
        "xx": ("not in the table", "1", "0"),
    }
    off = counted(capsys, f"--input={rows}", "--detect=0")
    assert off == {"unknown": ("", "0", "3"), "en": ("", "1", "0"), "xx": ("", "1", "0")}


def test_a_table_or_a_threshold_that_is_none(rows, capsys):
    for more, message in (
        ("--table=family", "'family' is neither a file nor one of families, major"),
        ("--detect=50", "language is 50.0; give 0 to 1"),
    ):
        assert main(["data", "languages", f"--input={rows}", more]) == 1
        assert message in capsys.readouterr().err
