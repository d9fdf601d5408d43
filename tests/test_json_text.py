"""Whatever is wrong with a JSON text from outside is one error that names its place."""

import json
from pathlib import Path

import pytest

from medmoe_jax import json_text
from medmoe_jax.checkpoints import files
from medmoe_jax.cli.session import read_rows
from medmoe_jax.data.json_items import json_items
from medmoe_jax.data.medical.files import parse_json
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import records, user_tasks

BROKEN = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "digits": '{"a": ' + "7" * 5_000 + "}",
    "cut": '{"a": [1, 2',
}
READERS = {
    "rows": lambda path: list(json_items(path.open(), str(path))),
    "a list of rows": lambda path: list(json_items(path.open(), str(path))),
    "a user's task": user_tasks.read,
    "records of an evaluation": records.read,
    "rows to score": lambda path: read_rows(path, ("prompt",)),
    "settings": files.read_json,
    "a medical set": lambda path: parse_json(path.read_text(), path),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_it_is_a_decode_error(text):
    for given in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError):
            json_text.loads(given)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_every_reader_names_the_file(tmp_path: Path, reader, text):
    path = tmp_path / "given.json"
    path.write_text(f'[{{"b": 1}},\n{text}]' if reader == "a list of rows" else text + "\n")
    with pytest.raises(UserError, match=r"given\.json"):
        READERS[reader](path)


def test_lines_have_their_numbers():
    content = '\ufeff{"a": 1}\r\n\n[2]\n'.encode()
    assert list(json_text.lines(content, "f")) == [("f:1", {"a": 1}), ("f:3", [2])]
    with pytest.raises(UserError, match="f:2: not JSON"):
        list(json_text.lines(b"1\n{\n", "f"))


@pytest.mark.parametrize("reader", ["a user's task", "records of an evaluation", "rows to score"])
def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path: Path, reader):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"\n" + '{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"empty\.jsonl:2: not UTF-8"):
        READERS[reader](path)


def test_bytes_that_are_no_text():
    with pytest.raises(json.JSONDecodeError, match="not text"):
        json_text.loads(b'"\xff"')


def test_what_is_right_comes_through():
    assert json_text.loads('{"a": [1, 2.5, "é", null]}') == {"a": [1, 2.5, "é", None]}
    assert json_text.loads('{"a": 1, "a": 2}', list) == [("a", 1), ("a", 2)]
