"""Reading rows: every accepted form, and one clear message for each kind of bad input."""

import gzip
import json

import pytest

from medmoe_jax.data import rows
from medmoe_jax.errors import UserError

TURNS = [{"role": "user", "content": "Q é 日"}, {"role": "assistant", "content": "A\nb"}]
AUTHORS = {
    "conversations": [{"from": "human", "value": "Q é 日"}, {"from": "gpt", "value": "A\nb"}]
}
PAIR = {"prompt": "Q é 日", "response": "A\nb", "language": "fr", "id": 7}
ROLES = {"conversations": TURNS, "language": None}


def write(tmp_path, name, text):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_every_form_gives_the_same_rows(tmp_path, kind, indent, ending):
    items = [AUTHORS, PAIR, ROLES]
    if kind == "json":
        text = " \n" + json.dumps(items, ensure_ascii=False, indent=indent) + "\n"
    else:
        text = "\n\n".join(json.dumps(item) for item in items)
    found = list(rows.read_file(write(tmp_path, f"d.{kind}{ending}", text), language="en"))
    assert [row["conversations"] for row in found] == [TURNS] * 3
    assert [row["language"] for row in found] == ["en", "fr", "en"]


def test_leading_answer_is_dropped_and_system_kept():
    turns = [
        {"from": "system", "value": "S"},
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
    ]
    row = rows.parse_row({"conversations": turns})
    assert [turn["content"] for turn in row["conversations"]] == ["S", "Q", "A"]
    assert [turn["role"] for turn in row["conversations"]] == ["system", "user", "assistant"]


def test_json_lines_are_streamed(tmp_path):
    path = write(tmp_path, "d.jsonl", json.dumps(PAIR) + "\n{broken")
    reader = rows.read_file(path)
    assert next(reader)["language"] == "fr"
    with pytest.raises(UserError, match=r"d\.jsonl, line 2: not valid JSON"):
        next(reader)


@pytest.mark.parametrize("text", ["[]", " [ ] ", "", "\n"])
def test_no_rows(tmp_path, text):
    assert list(rows.read_file(write(tmp_path, "d.json", text))) == []


BAD_ROWS = [
    ({"conversations": [{"from": "human", "value": "Q"}]}, "no assistant turn"),
    ({"conversations": [{"from": "gpt", "value": "A"}]}, "no assistant turn"),
    ({"conversations": []}, "no assistant turn"),
    ({"conversations": "Q"}, "'conversations' must be a list of turns, found text"),
    ({"conversations": [{"from": "bot", "value": "Q"}]}, "turn 0: unknown role 'bot'; use 'human'"),
    ({"conversations": [{"from": "human"}]}, "turn 0: needs 'from' and 'value'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "turn 0: content must be text, found a n"),
    ({"conversations": [3]}, "turn 0: expected a JSON object, found a number"),
    ({"prompt": "Q"}, "needs either 'conversations' or both 'prompt' and 'response'; found 'pr"),
    ({"prompt": "Q", "response": ["A"]}, "'response' must be text, found a list"),
    ({"prompt": "Q", "response": "A", "language": 3}, "'language' must be text"),
    (["Q", "A"], "expected a JSON object, found a list"),
]


@pytest.mark.parametrize("item,message", BAD_ROWS)
def test_a_bad_row_is_named_by_item_and_line(tmp_path, item, message):
    text = "[\n" + ",\n".join(json.dumps(i) for i in [PAIR, PAIR, item]) + "\n]"
    with pytest.raises(UserError) as caught:
        list(rows.read_file(write(tmp_path, "d.json", text)))
    assert "d.json, item 2 (line 4)" in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(UserError, match=r"d\.jsonl, line 2") as caught:
        lines = f"{json.dumps(PAIR)}\n{json.dumps(item)}"
        list(rows.read_file(write(tmp_path, "d.jsonl", " " + lines)))
    assert message in str(caught.value)


BAD_LISTS = [
    ('[{"prompt": "Q", "response": "A"}', "item 0 (line 1): expected ',' or ']'"),
    ('[{"prompt": "Q", "response": "A"},\n{"prompt"]', "item 1 (line 2): not valid JSON"),
    ('[{"prompt": "Q", "response": "A"},]', "item 1 (line 1): not valid JSON"),
    ('[{"prompt": "Q", "response": "A"}] x', "text after the closing ']'"),
    ("[", "item 0 (line 1): not valid JSON"),
]


@pytest.mark.parametrize("text,message", BAD_LISTS)
def test_a_broken_list(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        list(rows.read_file(write(tmp_path, "d.json", text)))
    assert message in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(rows.read_file(tmp_path / "absent.json"))
    with pytest.raises(UserError, match=r"unknown file ending; give a file that ends in '\.json'"):
        list(rows.read_file(write(tmp_path, "d.csv", "a,b")))
    (tmp_path / "d.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="not a complete gzip file"):
        list(rows.read_file(tmp_path / "d.jsonl.gz"))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps([PAIR] * 500).encode())[:-9])
    with pytest.raises(UserError, match="not a complete gzip file"):
        list(rows.read_file(tmp_path / "cut.json.gz"))
    (tmp_path / "latin.json").write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(rows.read_file(tmp_path / "latin.json"))
