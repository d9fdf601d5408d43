"""One rule for every option and field that takes a path: used, or refused and nothing made."""

import argparse
import os
import re
import subprocess
import sys

import pytest

from medmoe_jax.checkpoints.files import MetricsLog, new_folder, write_json
from medmoe_jax.cli import main, places
from medmoe_jax.data import builder, tokenizers
from medmoe_jax.data.medical.locate import data_root
from medmoe_jax.errors import UserError
from medmoe_jax.storage.fetched import fetched
from medmoe_jax.storage.places import cache_folder, check, local, place, scheme_of
from medmoe_jax.training.places import FIELDS, found_from, settle_fields
from tests import tiny

# Options that take text which is no path.
_NO_PATH = {
    "coordinator", "command", "config", "action", "method", "stage", "off", "language", "split",
    "answer", "score", "shots_as", "compat", "format", "dtype", "name", "ignore", "column",
    "option", "mask", "push", "prompt", "topology", "search", "devices", "kind", "kinds",
    "model", "price", "request", "scales", "url", "asked", "host", "stop", "system",
    "shell",
}  # fmt: skip


def parsers(parser, names=()):
    """Yields `(names of the command, parser)` of all commands and their actions."""
    yield names, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from parsers(one, (*names, name))


def options():
    """Yields `(words of the command, option's name, action)` of every option that takes text."""
    for names, one in parsers(main.parser()):
        for action in one._actions:
            takes = action.nargs != 0 and not isinstance(action, argparse._SubParsersAction)
            if takes and action.type is None and action.dest not in ("help", "version"):
                yield names, action.dest, action


def paths():
    """Yields those of `options` that take a path."""
    return (one for one in options() if one[1] in places.OPTIONS)


def test_every_option_that_takes_text_is_known_to_take_a_path_or_none():
    names = {name for _, name, _ in options()}
    assert names <= _NO_PATH | set(places.OPTIONS), names - _NO_PATH - set(places.OPTIONS)
    assert not _NO_PATH & set(places.OPTIONS)


def arguments_for(parser, name, value):
    """A command line with one option of that value, and all that must be there besides."""
    line = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.dest == "help":
            continue
        if action.dest != name and not action.required:
            continue
        text = value if action.dest == name else next(iter(action.choices or ["x"]))
        text = text if action.type is None else "300"
        line += [text] if not action.option_strings else [action.option_strings[0], text]
    return line


@pytest.mark.parametrize(
    "command, name",
    sorted({(names, name) for names, name, _ in paths()}),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_unknown_place_is_refused_by_name_and_nothing_is_made(
    command, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    parser = dict(parsers(main.parser()))[command]
    for value in ("http://host/x", "az://box/x", "gs:/bucket/x", "S3:///x"):
        assert main.main([*command, *arguments_for(parser, name, value)]) == 1
        said = capsys.readouterr().err
        assert f"--{name.replace('_', '-')}: '{value}'" in said, said
    if not places.OPTIONS.get(f"{command[0]} {name}", True):
        assert main.main([*command, *arguments_for(parser, name, "gs://bucket/x")]) == 1
        assert "'gs://bucket/x' is a place that cannot be used here" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


BYTES = os.fsdecode(b"caf\xe9")  # as Python has a name in Latin-1 where names are UTF-8
SHOWN = r"caf\udce9"


@pytest.mark.parametrize("value", [BYTES, f"folder/{BYTES}.jsonl", f"a,task:{BYTES}=b"])
def test_a_word_that_is_not_utf8_is_refused_and_nothing_is_made(
    value, tmp_path, monkeypatch, capsys
):
    """In whichever option: the report of finished work would name it."""
    monkeypatch.chdir(tmp_path)
    for command, parser in parsers(main.parser()):
        for name in {name for names, name, _ in paths() if names == command}:
            assert main.main([*command, *arguments_for(parser, name, value)]) == 1
            said = capsys.readouterr().err
            assert "is not UTF-8 text; write it" in said and SHOWN in said, said
    field = f"--config.data.template_options.x={value}"
    assert main.main(["train", "--workdir=w", "--config=medcare", field]) == 1
    assert f"'{field}' is not UTF-8".replace(BYTES, SHOWN) in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_names_that_are_not_utf8_are_refused_from_python(tmp_path, monkeypatch):
    for of in (place, local, fetched):
        with pytest.raises(UserError, match=re.escape(f"'a/{SHOWN}' is not UTF-8 text; write it")):
            of(f"a/{BYTES}")
    config = tiny.medcare_config()
    config.data.sources.knowledge.path = BYTES
    with pytest.raises(UserError, match=re.escape(f"sources.knowledge.path: '{SHOWN}' is not")):
        settle_fields(config)
    folder = tmp_path / BYTES
    folder.mkdir()
    monkeypatch.setenv("MEDMOE_DATA", str(folder))
    with pytest.raises(UserError, match=r"\$MEDMOE_DATA: .* is not UTF-8"):
        data_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with pytest.raises(UserError, match=r"\$XDG_CACHE_HOME, .* is not UTF-8"):
        cache_folder()
    monkeypatch.chdir(folder)
    assert local(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(UserError, match=r"--output: the current folder '.*' is not UTF-8"):
        place("x", "--output")


def test_a_name_that_the_locale_cannot_write():
    """From a recipe, or as text in a program: in ASCII no file has it."""
    program = "from medmoe_jax.storage.places import local; local('caf\\xe9', 'data.path')"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], stderr=-1, env={**os.environ, **env}, timeout=60
    )
    last = done.stderr.splitlines()[-1]
    assert b"UserError: data.path: 'caf\\xe9' cannot be written in the encoding of the loc" in last


def test_the_home_folder_stands_for_its_sign_in_every_option_and_field(monkeypatch):
    """Also where shells leave it: behind `=`, commas and names; not within a name."""
    monkeypatch.setenv("HOME", "/h")
    root = os.path.expanduser("~root")
    given = "~/a,task:~/b,cmedtc,x=~/c,~,~none/e,./~/f,g~/h,~root/i,./~root/j"
    wanted = f"/h/a,task:/h/b,cmedtc,x=/h/c,/h,~none/e,./~/f,g~/h,{root}/i,./~root/j"
    for name in places.OPTIONS:
        words = name.split()
        arguments = argparse.Namespace(command=words[0], **{words[-1]: given})
        places.settle_options(arguments, [])
        assert getattr(arguments, words[-1]) == wanted
    config = tiny.medcare_config()
    for section, field in (name.split(".") for name in FIELDS):
        config[section][field] = (given,) if field == "tasks" else given
    config.data.sources.knowledge.path = given
    config.stages.align.evaluation.tasks = (given, "~/i")
    settle_fields(config)
    for section, field in (name.split(".") for name in FIELDS):
        assert config[section][field] == ((wanted,) if field == "tasks" else wanted)
    assert config.data.sources.knowledge.path == wanted
    assert config.stages.align.evaluation.tasks == (wanted, "/h/i")
    for of in (place, local, fetched):
        assert [str(of(path)) for path in ("~/x", "~", "a,~/x", "~none")] == [
            "/h/x", "/h", "a,~/x", "~none",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["analyze", "routing", "--data=rows.jsonl", "--out"],
        ["compare", "a", "b", "--output"],
        ["eval", "--tasks=mmlu", "--output"],
        ["overlap", "--train=rows.jsonl", "--tasks=mmlu", "--output"],
        ["plot", "a", "--output"],
        ["route", "--workdir=a", "--data=a=rows.jsonl", "--output"],
        ["data", "build", "--input=rows.jsonl", "--output"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_where_a_folder_is_written_is_told_before_the_work(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    for path, file in (("rows.jsonl", "rows.jsonl"), ("rows.jsonl/x", f"{tmp_path}/rows.jsonl")):
        assert main.main([*words[:-1], f"{words[-1]}={path}"]) == 1
        assert f"error: {file}: is not a folder; give the" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    "words",
    [["tokenizer", "train", "--vocab-size=300"], ["generate"], ["score"]],
    ids=lambda words: words[0],
)
def test_what_is_read_is_not_written_over(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    before = rows.read_bytes()
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    for output in ("rows.jsonl", "./rows.jsonl", "link.jsonl"):
        assert main.main([*words, "--input=rows.jsonl", f"--output={output}"]) == 1
        said = f"--output: '{output}' is what --input reads, and would be lost"
        assert said in capsys.readouterr().err
    assert rows.read_bytes() == before


def test_relative_paths_of_a_configuration_are_found_from_any_folder(tmp_path, monkeypatch):
    """Files and folders; not names, not what is here, not what is elsewhere, not what is empty."""
    home, other = tmp_path / "home", tmp_path / "other"
    for name in ("home/base", "home/lr=3,x", "home/plain", "home/cmedtc", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("t.model", "rows.jsonl", "lr=3,x/items.jsonl"):
        (home / name).touch()
    config = tiny.medcare_config()
    config.base.path, config.base.tokenizer, config.data.template = "base", "t.model", "plain"
    config.data.sources.knowledge.path = "lr=3,x/../rows.jsonl"
    config.data.sources.alignment.path = "hf://datasets/base"
    config.run.tasks = ("cmedtc", "lr=3,x/items.jsonl", "gone.jsonl")
    before = config.to_dict()
    monkeypatch.chdir(home)
    found_from(config, str(home))
    assert config.to_dict() == before
    monkeypatch.chdir(other)
    (other / "t.model").touch()
    found_from(config, str(home))
    assert config.base.path == f"{home}/base" and config.base.tokenizer == "t.model"
    assert config.data.template == "plain" and config.data.languages == ""
    assert config.data.sources.knowledge.path == f"{home}/lr=3,x/../rows.jsonl"
    assert config.data.sources.alignment.path == "hf://datasets/base"
    assert config.run.tasks == ("cmedtc", f"{home}/lr=3,x/items.jsonl", "gone.jsonl")


@pytest.mark.parametrize(
    "command, name",
    sorted(
        {
            (names, name)
            for names, name, action in paths()
            if action.option_strings and name not in places.MAY_BE_EMPTY
        }
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_empty_option_is_refused_by_name(command, name, tmp_path, monkeypatch, capsys):
    """A default of its own would write where nobody asked it to."""
    monkeypatch.chdir(tmp_path)
    line = arguments_for(dict(parsers(main.parser()))[command], name, "")
    option = f"--{name.replace('_', '-')}"
    at = line.index(option)
    for words in (line, [*line[:at], f"{option}=", *line[at + 2 :]]):
        assert main.main([*command, *words]) == 1
        assert f"{option}: is empty; give a path" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_an_unknown_place_in_a_field_is_refused_by_name():
    fields = [*FIELDS, "data.sources.knowledge.path"]
    for name in fields:
        config = tiny.medcare_config()
        *sections, field = name.split(".")
        section = config
        for one in sections:
            section = section[one]
        section[field] = ("az://box/x",) if name == "run.tasks" else "az://box/x"
        with pytest.raises(UserError, match=f"{name}: 'az://box/x' is a place"):
            settle_fields(config)
    settle_fields(tiny.medcare_config())


def test_what_writes_refuses_an_unknown_place_itself(tmp_path, monkeypatch):
    """So that a notebook is told too."""
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda path: write_json(path, {}),
        lambda path: MetricsLog(path),
        lambda path: fetched(path),
        lambda path: builder.build([{"conversations": []}], path, "x"),
        lambda path: tokenizers.train([], 300, path),
        lambda path: new_folder(path).__enter__(),
    ):
        with pytest.raises(UserError, match="'http://host/x' is a place that cannot be used here"):
            act("http://host/x")
    for act in (lambda path: builder.build([], path, "x"), lambda path: local(path)):
        with pytest.raises(UserError, match="'gs://b/x' is a place that cannot be used here"):
            act("gs://b/x")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["a/b", "./gs:/x", "/gs:/x", "tico19:fr", "a=b:c", "task:x", ""])
def test_a_path_of_this_machine_is_left_as_it_is(path):
    assert scheme_of(path) == "" and str(place(path)) == str(local(path))


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"x: 'gs://b/c' needs .* pip install 'medmoe_jax\[gcs\]'"):
        check("gs://b/c", "x", {"gs"})
