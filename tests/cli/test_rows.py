"""Every command on rows that cannot be used, that are cut, or that arguments make readable."""

import json

import pytest

from medmoe_jax.cli.main import main
from medmoe_jax.data.builder import open_dataset
from tests import tiny
from tests.data import chat_templates

CONFIG = """from tests import tiny

def get_config():
    return tiny.medcare_config()
"""
HALF = '"pill \\ud83d"'
# Takes one question alone.
REFUSES = (
    "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    + chat_templates.THINKING
)


@pytest.fixture
def arguments(tmp_path):
    """`--config=` of the tiny recipe, with a template that refuses a question."""
    (tmp_path / "recipe.py").write_text(CONFIG)
    (tmp_path / "chat.jinja").write_text(REFUSES)
    config = [f"--config={tmp_path / 'recipe.py'}"]
    return [*config, f"--config.data.template={tmp_path / 'chat.jinja'}"]


def commands(config, folder, rows, asked):
    """Every command that reads rows or prompts, by its words."""
    made, bare = f"--output={folder / 'made.jsonl'}", [*config, "--stage=base"]
    return {
        "data build": [f"--input={rows}", f"--output={folder / 'out'}"],
        "data inspect": [f"--dataset={rows}", f"--tokenizer={tiny.tokenizer().path}",
                         f"--template={folder / 'chat.jinja'}"],
        "tokenizer train": [f"--input={rows}", made, "--vocab-size=300"],
        "train": [*config, f"--workdir={folder / 'w'}",
                  f"--config.data.sources.alignment.path={rows}"],
        "score": [*bare, f"--input={asked}", made],
        "generate": [*bare, f"--input={asked}", made],
        "eval": [*bare, f"--tasks={folder / 'items.jsonl'}", f"--output={folder / 'report'}"],
        "analyze routing": [*bare, f"--data={rows}", f"--out={folder / 'out'}"],
    }  # fmt: skip


def error_of(capsys, command, arguments):
    capsys.readouterr()
    assert main([*command.split(), *arguments]) == 1, command
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def files(folder, prompt):
    """Rows and prompts of which the third, or the first, is this one."""
    good = '{"prompt": "aspirin?", "response": "pain"}\n'
    (folder / "rows.jsonl").write_text(good * 2 + f'{{"prompt": {prompt}, "response": "x"}}\n')
    asked = f'{{"prompt": {prompt}, "completion": "x"}}\n'
    (folder / "asked.jsonl").write_text(asked)
    item = f'{{"prompt": {prompt}, "answer": "x", "choices": ["x", "y"]}}\n'
    (folder / "items.jsonl").write_text(item)
    return folder / "rows.jsonl", folder / "asked.jsonl"


def test_half_a_character_is_named_by_every_command(arguments, tmp_path, capsys):
    rows, asked = files(tmp_path, HALF)
    for command, more in commands(arguments, tmp_path, rows, asked).items():
        error = error_of(capsys, command, more)
        place = {
            "score": f"{asked}:1: ",
            "generate": f"{asked}:1: ",
            "eval": f"{tmp_path / 'items.jsonl'}:1: ",
        }.get(command, f"{rows}, line 3: ")
        assert place in error and "half of a surrogate pair" in error, command
    error = error_of(capsys, "generate", [*arguments, "--stage=base", "pill \udcff"])
    assert "'pill \\udcff' is not UTF-8 text" in error
    assert not (tmp_path / "w").exists() and not (tmp_path / "out").is_file()


def test_a_row_that_the_template_refuses_is_named(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medmoe_jax.api.model.open_stage", None)  # no model is opened for it
    rows, asked = files(tmp_path, '"no"')
    of_templates = ("data inspect", "train", "score", "generate")
    for command in of_templates:
        error = error_of(capsys, command, commands(arguments, tmp_path, rows, asked)[command])
        place = f"{asked}:1: " if command in ("score", "generate") else f"{rows}, line 3: "
        assert place in error and "refuses this conversation: not this" in error, command
    monkeypatch.undo()
    for command, place in (
        ("eval", "task 'items', item 0: "),
        ("analyze routing", f"{rows}, line 3: "),
    ):
        error = error_of(capsys, command, commands(arguments, tmp_path, rows, asked)[command])
        assert place in error or "no bank that takes part" in error, error
    tasks = f"--config.run.tasks=('{tmp_path / 'items.jsonl'}',)"
    error = error_of(capsys, "train", [*arguments, tasks, f"--workdir={tmp_path / 'w'}"])
    assert "task 'items', item 0: " in error and not (tmp_path / "w").exists()


def test_reasoning_is_that_of_the_answer_beside_it(arguments, tmp_path):
    row = {"id": 7, "prompt": "aspirin?", "reasoning": "old thought", "response": "old"}
    asked, made = tiny.write_rows(tmp_path / "asked.jsonl", [row]), tmp_path / "made.jsonl"
    more = [*arguments, "--stage=base", "--max-tokens=4", f"--input={asked}", f"--output={made}"]
    assert main(["generate", *more]) == 0
    answered = json.loads(made.read_text())
    assert answered["id"] == 7 and answered["prompt"] == "aspirin?"
    assert "old" not in answered["response"]
    assert "old" not in answered.get("reasoning", "")


def test_prompts_that_were_cut_are_counted(arguments, tmp_path, capsys):
    long = json.dumps("aspirin? " * 90)
    rows, asked = files(tmp_path, long)
    for command in ("score", "generate", "eval"):
        more = commands(arguments, tmp_path, rows, asked)[command]
        more += ["--max-tokens=4"] * (command == "generate")
        assert main([command, *more]) == 0
        assert "1 prompts were cut to fit 128 positions" in capsys.readouterr().err


def test_columns_keys_splits_and_options(tmp_path, capsys):
    rows = [{"Q": "aspirin?", "A": "pain", "id": n} for n in range(4)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "chat.jinja").write_text(chat_templates.THINKING)
    reading = ["--column", "question=Q", "--column", "answer=A"]
    build = ["--input", str(path), f"--output={tmp_path / 'd'}"]
    words = error_of(capsys, "data build", [*build, *reading])
    assert "nothing is known of 'id'" in words and words.endswith(
        ", say what it is with --column=KEY=NAME, or add it to --ignore (in a recipe: data.ignore) "
        "to leave it out"
    )
    assert main(["data", "build", *build, *reading, "--ignore=id"]) == 0
    assert "left out: id (4)" in capsys.readouterr().out
    look = [f"--dataset={path}", f"--tokenizer={tiny.tokenizer().path}", *reading, "--ignore=i*"]
    look += [f"--template={tmp_path / 'chat.jinja'}"]
    for option, count in (("--option=enable_thinking=false", 2), ("--rows=4", 4)):
        assert main(["data", "inspect", *look, option]) == 0
        shown = capsys.readouterr().out
        assert shown.count("pain<|im_end|>") == max(3, count) and "exact duplicates" in shown
        assert "left out of the rows: id (4)" in shown
    words = error_of(capsys, "data inspect", [*look, "--option=thinking=1"])
    assert "data.template_options.thinking: the chat template has no such variable" in words
    assert "'x' is not NAME=VALUE" in error_of(capsys, "data inspect", [*look, "--column=x"])
    assert "--column=x: no row has this" in error_of(capsys, "data build", [*build, "--column=x=y"])
    assert "no splits" in error_of(capsys, "data inspect", [*look, "--split=dev"])
    count = ["--input", str(path), str(tmp_path / "d"), *reading, "--ignore=id"]
    assert "one split and our own columns" in error_of(capsys, "data languages", count)


def test_rows_that_repeat_others_are_counted_and_left_out(tmp_path, capsys):
    answer = " ".join(f"word{i}" for i in range(50))
    said = [answer, "other " + answer, f"{answer} held out", answer, "short", f"{answer}!"]
    rows, held, more = tmp_path / "rows.jsonl", tmp_path / "held.jsonl", tmp_path / "more.jsonl"
    pairs = [{"prompt": "q", "response": text, "id": 1} for text in said]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    held.write_text(json.dumps({"question": "q", "answer": said[2], "source": "exam"}) + "\n")
    more.write_text(json.dumps({"prompt": "q", "response": "short"}) + "\n")
    keep = ["--ignore=id"]
    tokenizer = f"--tokenizer={tiny.tokenizer().path}"
    assert main(["data", "inspect", f"--dataset={rows}", tokenizer, *keep]) == 0
    shown = "".join(capsys.readouterr().out.split())  # paths are cut where a line is full
    assert "exactduplicates1" in shown and "nearduplicates3" in shown
    assert f"exactduplicates:{rows},line4={rows},line1" in shown
    assert f"nearduplicates:{rows},line6~1.00~{rows},line1" in shown
    out = [f"--output={tmp_path / 'out'}", "--input", str(rows), str(more), *keep]
    assert main(["data", "build", *out, "--name=a", "--dedupe"]) == 0
    shown = capsys.readouterr().out
    assert "left out of 7 rows: exact 2, near 3, held out 0; see " in shown
    assert shown.count("left out: id (6)") == 1  # they are read twice
    against = [f"--against={held}", "--similarity=0.97"]
    assert main(["data", "build", *out, "--name=b", *against]) == 0
    assert "exact 0, near 0, held out 1; see " in capsys.readouterr().out
    built = tmp_path / "out" / "b"
    look = ["data", "inspect", f"--dataset={built}", tokenizer, f"--against={held}"]
    assert main(look) == 0
    assert "held-outrows5" not in (shown := "".join(capsys.readouterr().out.split()))
    assert "held-outrows4" in shown and f"~{held},line1" in shown
    error = error_of(capsys, "data build", [*out, "--name=c", "--dedupe", "--similarity=1.2"])
    assert "similarity 1.2: give a number from 0.5 to 1" in error
    assert not (tmp_path / "out" / "c").exists()


def test_a_built_set_is_built_anew_with_a_language_and_without_keys(tmp_path, capsys):
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    pair = {"prompt": "q", "response": "a", "tools": [{"name": "f"}]}
    rows.write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "language": "fr"}) + "\n")
    held.write_text(json.dumps({"Q": "q", "A": "a"}) + "\n")
    out = f"--output={tmp_path / 'out'}"
    assert main(["data", "build", "--input", str(rows), out, "--name=first"]) == 0
    first = tmp_path / "out" / "first"
    more = ["--language=en", "--ignore=tools", "--against", str(first / "1.0.0")]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**pair, "prompt": "another question"}) + "\n")
    capsys.readouterr()
    named = ["--input", str(first), str(other), out, "--name=second"]
    assert main(["data", "build", *named, *more[:2]]) == 0
    assert "left out: tools (3)" in capsys.readouterr().out
    found = list(open_dataset(tmp_path / "out" / "second"))
    assert [row["language"] for row in found] == ["en", "fr", "en"]
    assert not any("tools" in row for row in found)
    named[-1] = (
        "--name=third"  # a row that calls tools repeats one without them, once these are out
    )
    assert main(["data", "build", *named, *more]) == 0
    assert "left out of 3 rows: exact 0, near 0, held out 2" in capsys.readouterr().out
    # Held-out rows need no column that stands beside the question.
    other.write_text(json.dumps({"Q": "q", "A": "b", "context": "c"}) + "\n")
    columns = [f"--column={key}" for key in ("prompt=Q", "response=A", "input=context")]
    named = ["--input", str(other), out, "--name=fourth", *columns, "--against", str(held)]
    assert main(["data", "build", *named]) == 0


def test_rows_with_items_of_tasks_are_left_out(tmp_path, capsys):
    question = "Which drug is first given against a fever of unknown origin in small children today"
    texts = ["aspirin?", f"Exam: {question}? Think.", "cough?", f"{question} or not", question]
    rows, items = tmp_path / "rows.jsonl", tmp_path / "items.jsonl"
    pairs = [{"prompt": text, "response": "x"} for text in texts]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    other = {"prompt": "cough", "answer": "x", "choices": ["x", "y"]}
    item = {"prompt": f"{question}?", "answer": "x", "choices": ["x", "y"]}
    items.write_text(json.dumps(other) + "\n" + json.dumps(item) + "\n")
    out = ["--input", str(rows), f"--output={tmp_path / 'out'}", "--name=a"]
    assert main(["data", "build", *out, f"--against=task:{items}"]) == 0
    assert "left out of 5 rows: exact 0, near 0, held out 4; see " in capsys.readouterr().out
    removed = (tmp_path / "out" / "a" / "1.0.0" / "removed.jsonl").read_text().splitlines()
    found = {(one["place"], one["of"]) for one in map(json.loads, removed)}
    lines = ((2, 1), (3, 0), (4, 1), (5, 1))
    assert found == {(f"{rows}, line {line}", f"items, item {i}") for line, i in lines}
    overlap = [f"--train={rows}", f"--tasks={items}", f"--output={tmp_path / 'overlap'}"]
    assert main(["overlap", *overlap]) == 0  # which is the same rule
    named = (tmp_path / "overlap" / "overlap.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["also"]) + 1 for line in named] == [1, 3]
    error = error_of(capsys, "data build", [*out[:3], "--name=b", "--against=suite:none"])
    assert "there is no suite 'none'" in error
    error = error_of(capsys, "data build", [*out[:3], "--name=b", "--against=absent.jsonl"])
    assert "absent.jsonl" in error and not (tmp_path / "out" / "b").exists()


def test_files_of_tasks_with_one_name_are_told_apart(tmp_path, capsys):
    """Wherever tasks are named: of two, one alone was looked at, or kept its score."""
    (tmp_path / "recipe.py").write_text(CONFIG)
    config = f"--config={tmp_path / 'recipe.py'}"
    rows, _ = files(tmp_path, '"aspirin?"')
    items = [tmp_path / folder / "exam.jsonl" for folder in "ab"]
    for path in items:
        path.parent.mkdir()
        path.write_text('{"prompt": "aspirin: yes or no?", "answer": "no"}\n')
    one, other = items
    out, workdir = f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'w'}"
    named, train = f"--tasks={one},{other}", [config, workdir]
    during = "--config.stages.align.evaluation"
    for command, more in (
        ("eval", [config, "--stage=base", named, out]),
        ("overlap", [named, f"--train={rows}", out]),
        ("data build", [f"--input={rows}", out, *(f"--against=task:{i}" for i in items)]),
        ("train", [*train, f"--config.run.tasks=('{one}','{other}')"]),
        ("train", [*train, f"{during}.tasks=('{one}','{other}')", f"{during}.every=2"]),
    ):
        error = error_of(capsys, command, more)
        assert f"'{one}' and '{other}' would both be called 'exam'" in error
        assert not (tmp_path / "out").exists() and not (tmp_path / "w").exists()


def test_texts_of_others_do_not_steer_the_terminal(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"\\u001b[2Jkey": 1}\n')
    words = error_of(
        capsys, "data inspect", [f"--dataset={rows}", f"--tokenizer={tiny.tokenizer().path}"]
    )
    assert "\\x1b[2Jkey" in words and "\x1b" not in words
    rows.write_text('{"prompt": "a\\u001b[2J", "response": "b"}\n')
    assert (
        main(["data", "inspect", f"--dataset={rows}", f"--tokenizer={tiny.tokenizer().path}"]) == 0
    )
    assert "\x1b" not in capsys.readouterr().out
