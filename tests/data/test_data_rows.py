"""Reading rows: every accepted form, and one clear message for each kind of bad input."""

import gzip
import json
import os

import pytest

from medmoe_jax.data import builder, rows
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.sources import open_path, open_sources
from medmoe_jax.data.streamed_rows import StreamedRows
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import recipe, source
from tests import tiny

TURNS = [{"role": "user", "content": "Q é 日"}, {"role": "assistant", "content": "A\nb"}]
AUTHORS = {
    "conversations": [{"from": "human", "value": "Q é 日"}, {"from": "gpt", "value": "A\nb"}]
}
PAIR = {"prompt": "Q é 日", "response": "A\nb", "language": "fr"}
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
    row = rows.RowReader()({"conversations": turns})
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
    ({"prompt": "Q"}, "needs one conversation (conversations or messages), or one question (pro"),
    ({"prompt": "Q", "response": ["A"]}, "'response' must be text, found a list"),
    ({"prompt": "Q", "response": "A", "language": 3}, "'language' must be text"),
    ("Q", "expected a JSON object, or a list of questions and answers in turn; found text"),
    (["Q"], "no assistant turn answers a user turn"),
    (["Q", "A", 3, "A"], "turn 2: content must be text, found a number"),
    (["Q", ""], "an answer is empty"),
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
    with pytest.raises(UserError, match="absent: no such file or folder"):
        list(rows.read_file(tmp_path / "absent"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is no ordinary file"):
        list(rows.read_file(tmp_path / "pipe"))
    with pytest.raises(UserError, match=r"unknown file ending; give a file that ends in '\.json'"):
        list(rows.read_file(write(tmp_path, "d.txt", "a,b")))
    (tmp_path / "d.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="not a complete gzip file"):
        list(rows.read_file(tmp_path / "d.jsonl.gz"))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps([PAIR] * 500).encode())[:-9])
    with pytest.raises(UserError, match="not a complete gzip file"):
        list(rows.read_file(tmp_path / "cut.json.gz"))
    (tmp_path / "latin.json").write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(rows.read_file(tmp_path / "latin.json"))


TALK = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def turns(row, **options):
    return rows.RowReader(**options)(row)["conversations"]


def said(row, **options):
    return [(turn["role"], turn["content"]) for turn in turns(row, **options)]


def test_the_reasoning_of_an_answer_may_stand_beside_it():
    columns = {"prompt": "Question", "reasoning_content": "CoT", "response": "Response"}
    reader = rows.RowReader(columns=columns)
    _, said = reader({"Question": "Q", "CoT": "R", "Response": "A"})["conversations"]
    assert said == {"role": "assistant", "content": "A", "reasoning_content": "R"}
    for none in ({}, {"CoT": ""}, {"CoT": None}):
        _, said = reader({"Question": "Q", **none, "Response": "A"})["conversations"]
        assert said == {"role": "assistant", "content": "A"}
    with pytest.raises(UserError, match="'reasoning_content' must be text, found a list"):
        reader({"Question": "Q", "CoT": ["R"], "Response": "A"})
    with pytest.raises(UserError, match="'reasoning_content' cannot stand beside the other keys"):
        turns({"messages": TURNS, "reasoning_content": "R"})


def test_a_question_or_an_answer_may_be_turns():
    """As TRL has them: earlier answers stand in the question, and are not learned."""
    system = {"role": "system", "content": "S"}
    asks = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    question = [system, *asks, {"role": "user", "content": "Q"}]
    answer = [{"role": "assistant", "content": "A"}]
    context = [system, asks[0], {**asks[1], "train_weight": 0}, question[-1]]
    for given in (answer, "A"):
        assert turns({"prompt": question, "completion": given}) == context + answer
    assert turns({"prompt": "Q", "completion": answer}) == [question[-1], *answer]
    assert turns({"prompt": question[3:], "system": "S", "response": "A"})[0] == system
    more = [*answer, question[-1], *answer]
    assert turns({"prompt": question[3:], "completion": more}) == [question[-1], *more]
    greeting = {"prompt": [asks[1], *question[3:]], "completion": answer}
    assert turns(greeting) == [question[-1], *answer]
    for row, message in [
        ({"prompt": asks[:1], "completion": []}, "no assistant turn answers a user turn"),
        ({"prompt": ["Q"], "completion": "A"}, "'prompt' must be text, found a list"),
        ({"prompt": 3, "completion": "A"}, "'prompt' must be text, found a number"),
        ({"prompt": question, "completion": "A", "input": "I"}, "'input' cannot stand beside"),
    ]:
        with pytest.raises(UserError, match=message):
            turns(row)


@pytest.mark.parametrize("lines", [False, True])
def test_texts_in_turn_are_questions_and_answers(tmp_path, lines):
    items = [["Q", "A", "q", "a", "thanks"], ["R", "B"]]
    text = "\n\n".join(map(json.dumps, items)) if lines else json.dumps(items)
    found = list(rows.read_file(write(tmp_path, "d.json", text), "sw"))
    said = [[(t["role"], t["content"]) for t in row["conversations"]] for row in found]
    ends = [("user", "Q"), ("assistant", "A"), ("user", "q"), ("assistant", "a")]
    assert said == [[*ends, ("user", "thanks")], [("user", "R"), ("assistant", "B")]]
    assert [row["language"] for row in found] == ["sw", "sw"]


def test_what_stands_beside_a_question_or_a_conversation():
    ends = [("user", "Q"), ("assistant", "A")]
    assert said({"conversations": TALK, "system": "S"}) == [("system", "S"), *ends]
    assert said({"prompt": "Q", "response": "A", "system": "S"}) == [("system", "S"), *ends]
    assert said({"prompt": "Q", "input": "I", "response": "A"})[0] == ("user", "Q\nI")
    assert said({"instruction": "", "input": "Q", "output": "A"}) == ends  # as inference asks it
    history = [("user", "q"), ("assistant", "a")]
    for pairs in ([["q", "a"]], '[["q", "a"]]', (("q", "a"),)):
        assert said({"instruction": "Q", "output": "A", "history": pairs}) == [*history, *ends]
    for empty in ("", None, []):
        row = {"instruction": "Q", "input": empty or "", "output": "A", "history": empty}
        assert said(row | {"system": empty or "", "tools": empty}) == ends
    tools = [{"type": "function", "function": {"name": "dose"}}]
    for given in (tools, json.dumps(tools)):
        assert rows.RowReader()({"conversations": TALK, "tools": given})["tools"] == tools
    assert said({"messages": json.dumps(TALK)}) == ends  # a cell of a table


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_is_refused_with_its_place(empty, tmp_path):
    """It would teach to say nothing. One that is not learned, or calls a tool, may be empty."""
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": empty}]
    later = [*talk, {"role": "user", "content": "R"}, {"role": "assistant", "content": "A"}]
    bad = [{"prompt": "Q", "response": empty}, {"messages": talk}, {"messages": later}]
    bad.append({"prompt": "Q", "response": "A", "history": [["q", empty]]})
    for row in bad:
        with pytest.raises(UserError, match=r"rows\.jsonl:7: an answer is empty, which teaches"):
            rows.parse_row(row, "rows.jsonl:7")
    (tmp_path / "rows.csv").write_text("question,answer\nQ,A\nR,\n")
    with pytest.raises(UserError, match=r"rows\.csv, line 3: an answer is empty"):
        list(rows.read_file(tmp_path / "rows.csv"))
    rows.parse_row({"messages": [talk[0], {**talk[1], "weight": 0}, *later[2:]]})
    rows.parse_row({"messages": [talk[0], {**talk[1], "reasoning_content": "Hm."}]})
    rows.RowReader(learned=False)(bad[0])  # of which nothing is learned
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows.parse_row({"messages": [talk[0], {**talk[1], "tool_calls": [call]}]})


STRANGE = [
    ({"prompt": "Q", "response": "A", "id": 7}, "nothing is known of 'id'; rename it to one of"),
    ({"conversations": TALK, "prompt": "x", "response": "y"}, "needs one conversation"),
    ({"conversations": TALK, "messages": TALK}, "needs one conversation"),
    ({"prompt": "Q", "question": "Q", "response": "A"}, "needs one conversation"),
    ({"conversations": TALK, "input": "I"}, "'input' cannot stand beside the other keys"),
    ({"conversations": TALK, "history": []}, "'history' cannot stand beside"),
    ({"conversations": [{**TALK[0], "lang": "x"}, TALK[1]]}, "turn 0: nothing is known of 'lang'"),
    ({"conversations": [{**TALK[0], "role": "user"}, TALK[1]]}, "'role', 'from' mean the same"),
    (
        {"conversations": [*TALK, {"from": "system", "value": "S"}], "system": "T"},
        "has a system tu",
    ),
    ({"conversations": TALK, "tools": "no"}, "'tools' is not valid JSON"),
    (
        {"conversations": TALK, "tools": [{"type": "x"}]},
        "'tools' must be a list of functions, each",
    ),
    (
        {"prompt": "Q", "response": "A", "history": ["q"]},
        "'history', pair 0: expected [question, a",
    ),
    (
        {"messages": '[{"role": "user", "content": "q", "content": "r"}]'},
        "'messages': the key 'content' stands twice in one object",
    ),
    (
        {"prompt": "Q", "response": "A", "history": '[["q", {"a": 1, "a": 2}]]'},
        "'history': the key 'a' stands twice in one object",
    ),
    (
        {"prompt": "Q", "response": "A", "tools": '[{"name": "f", "name": "g"}]'},
        "'tools': the key 'name' stands twice in one object",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": '[{"name": "f", "name": "g"}]'}]},
        "turn 0: 'tool_calls': the key 'name' stands twice in one object",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}],
                }
            ]
        },
        "turn 0: arguments of 'f': the key 'a' stands twice in one object",
    ),
    (
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "name": "g"}'}]},
        "turn 0: content: the key 'name' stands twice in one object",
    ),
    ({"prompt": "half \ud83d", "response": "A"}, "holds '\\ud83d', half of a surrogate pair"),
    ({"prompt": "Q", "response": "A", "half \udc00": 1}, "half of a surrogate pair"),
    ({"conversations": [TALK[0], {**TALK[1], "weight": 0.5}]}, "weight of a turn is 0 or 1"),
    ({"conversations": [TALK[0], {**TALK[1], "weight": 0}]}, "every answer has weight 0"),
    (
        {"conversations": [{**TALK[0], "weight": 1}, TALK[1]]},
        "turn 0: a weight of 1 in a turn of u",
    ),
    (
        {"conversations": [{**TALK[0], "reasoning": "R"}, TALK[1]]},
        "reasoning_content in a turn of u",
    ),
    ({"conversations": [{**TALK[0], "name": "Eve"}, TALK[1]]}, "'name' in a turn of user"),
    ({"conversations": [TALK[0], {"from": "function_call", "value": "x"}]}, "is not valid JSON"),
    ({"conversations": [TALK[0], {**TALK[1], "tool_calls": [{"f": 1}]}]}, "a tool call is {'name'"),
]


@pytest.mark.parametrize("item,message", STRANGE)
def test_what_is_not_understood_is_named(item, message):
    with pytest.raises(UserError) as caught:
        rows.RowReader()(item, "d.jsonl, line 3")
    assert str(caught.value).startswith("d.jsonl, line 3") and message in str(caught.value)


PARTS = [{"type": "image_url", "image_url": "x"}, {"type": "text"}, {"text": "Q"}, 3]


@pytest.mark.parametrize("part", PARTS)
def test_only_text_can_be_read_of_content_parts(part):
    good = [{"type": "text", "text": "one "}, "two", {"type": "text", "text": ".", "image": None}]
    row = {"messages": [{"role": "user", "content": good}, {"role": "assistant", "content": "A"}]}
    assert said(row)[0] == ("user", "one two.")
    row["messages"][0]["content"] = [*good, part]
    with pytest.raises(UserError, match=r"turn 0: a part of the content is of type .*; only text"):
        rows.RowReader()(row)


def test_what_is_to_be_ignored_is_counted():
    talk = [{**TALK[0], "at": 1}, {**TALK[1], "at": 2, "score": 3}]
    reader = rows.RowReader(ignore=("at", "score*", "system", "*_url"))
    row = {"conversations": talk, "system": "S", "score_1": 1, "page_url": "x"}
    assert [turn["role"] for turn in reader(row)["conversations"]] == ["user", "assistant"]
    reader({"conversations": [TALK[1], *TALK], "score_1": None})
    wanted = {"system": 1, "score_1": 1, "page_url": 1, "at": 2, "score": 1}
    assert reader.ignored == {**wanted, "answers before the first question": 1}
    # A pattern is for keys that nothing is known of; a name is for any.
    everything = rows.RowReader(ignore=("*",))
    row = everything({"conversations": talk, "system": "S", "x": 1})
    assert [turn["content"] for turn in row["conversations"]] == ["S", "Q", "A"]
    assert everything.ignored == {"x": 1, "at": 2, "score": 1}


def test_columns_of_other_names():
    columns = {"question": "Frage", "answer": "Antwort", "language": "Sprache"}
    row = {"Frage": "Q", "Antwort": "A", "Sprache": "de"}
    assert said(row, columns=columns) == [("user", "Q"), ("assistant", "A")]
    assert rows.RowReader(columns=columns)(row)["language"] == "de"
    with pytest.raises(UserError, match=r"no column 'Antwort' \(columns\.answer\); found 'Frage'"):
        said({"Frage": "Q"}, columns=columns)
    with pytest.raises(UserError, match="a key 'question' beside 'Frage', which columns"):
        said({**row, "question": "x"}, columns=columns)
    with pytest.raises(UserError, match=r"columns\.frage: no row has this key; use one of conv"):
        rows.RowReader(columns={"frage": "Frage"})


def test_a_column_beside_the_question_may_be_absent(tmp_path):
    """As null is: not every row has a context. One that no row has is a wrong name."""
    columns = {"prompt": "Q", "response": "A", "input": "context"}
    pair = {"Q": "q", "A": "a"}
    given = [pair, pair | {"context": None}, pair | {"context": "c"}]
    path = write(tmp_path, "d.jsonl", "\n".join(map(json.dumps, given)))
    wanted = ["q", "q", "q\nc"]
    found = open_path(path, rows.RowReader(columns=columns)).rows
    assert [row["conversations"][0]["content"] for row in found] == wanted
    built = builder.build_from_files([path], tmp_path, "d", rows.RowReader(columns=columns))
    assert list(builder.open_dataset(built)) == list(found)
    wrong = columns | {"input": "contxt"}
    for read in (
        lambda reader: open_path(path, reader),
        lambda reader: builder.build_from_files([path], tmp_path, "wrong", reader),
    ):
        message = rf"{path}, line 1: there is no column 'contxt' \(columns\.input\), nor in any"
        with pytest.raises(UserError, match=message):
            read(rows.RowReader(columns=wrong, ignore=("context",)))
    assert not (tmp_path / "wrong").exists()
    empty = write(tmp_path, "empty.jsonl", "")
    assert not len(open_path(empty, rows.RowReader(columns=columns)).rows)
    for own in ({"context": "c"}, {"context": None}, {}):
        with pytest.raises(UserError, match="a key 'input' beside 'context', which columns"):
            said(pair | own | {"input": "i"}, columns=columns)


def test_a_column_that_no_first_row_of_a_stream_has(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"prompt": "a", "response": "b", "context": "c"}\n' * 9)
    config = recipe()
    config.data.ignore = ("*",)
    config.data.shards = 1
    config.data.sources.mine = source(str(path), columns={"input": "contxt"}, window=4)
    encoder = Encoder(tiny.tokenizer(), TEMPLATES["plain"])
    with pytest.raises(
        UserError, match=r"source 'mine': .*there is no column 'contxt' .*that was read"
    ):
        open_sources(config.data.to_dict(), ["mine"], encoder)
    config.data.sources.mine.columns = {"input": "context"}
    (opened,) = open_sources(config.data.to_dict(), ["mine"], encoder).values()
    assert isinstance(opened.rows, StreamedRows)


@pytest.mark.parametrize("empty", [{}, {"language": None}, {"language": ""}])
def test_a_row_without_a_language_is_given_one(empty, tmp_path):
    row = {"prompt": "Q", "response": "A", **empty}
    assert rows.parse_row(row, language="en")["language"] == "en"
    table = write(tmp_path, "d.csv", "prompt,response,language\nQ,A,\nQ,A,fr\n")
    assert [row["language"] for row in rows.read_file(table, "en")] == ["en", "fr"]


@pytest.mark.parametrize("key", ["weight", "train", "loss", "train_weight"])
def test_answers_without_weight_are_marked(key):
    talk = [{**TALK[0], key: 0}, {**TALK[1], key: False}, TALK[0], {**TALK[1], key: 1.0}]
    found = turns({"conversations": talk})
    assert [turn.get("train_weight") for turn in found] == [None, 0, None, None]


def test_tool_calls_of_every_form_become_one():
    call = {"name": "dose", "arguments": {"drug": "aspirin"}}
    wanted = [{"type": "function", "function": call}]
    forms = [
        call,
        {"type": "function", "function": call},
        {"function": {**call, "arguments": json.dumps(call["arguments"])}, "index": None},
    ]
    for form in forms:
        talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [form]}]
        (_, answer) = turns({"messages": talk})
        assert answer == {"role": "assistant", "content": "", "tool_calls": wanted}
    share = [TALK[0], {"from": "function_call", "value": json.dumps(call)},
             {"from": "observation", "value": "75 mg"}, TALK[1]]  # fmt: skip
    found = turns({"conversations": share})
    assert found[1]["tool_calls"] == wanted and found[2] == {"role": "tool", "content": "75 mg"}
    named = {"role": "tool", "content": "75 mg", "tool_call_id": "1", "name": "dose"}
    talk = [TALK[0], {"role": "assistant", "tool_calls": [{**forms[1], "id": "1"}]}, named, TALK[1]]
    found = turns({"messages": talk})
    assert found[1]["tool_calls"] == [{"id": "1", **wanted[0]}] and found[2] == named


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(key):
    assert turns({"messages": [TALK[0], {**TALK[1], key: "R"}]})[1]["reasoning_content"] == "R"
    assert "reasoning_content" not in turns({"messages": [TALK[0], {**TALK[1], key: ""}]})[1]
