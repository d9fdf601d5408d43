"""Which ids end an answer, and which files are the tokenizer's."""

import json
import re

import pytest

from medmoe_jax.checkpoints import companions
from medmoe_jax.errors import UserError

IDS = companions.token_ids(1, None, 0)


@pytest.mark.parametrize(
    "config, generation, stop_ids, wanted",
    [
        (None, None, [7, 8], {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [7, 8]}),
        (None, None, [], {"bos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 0}, None, [0], {**IDS, "eos_token_id": 0}),
        ({"eos_token_id": 5, "bos_token_id": None}, None, [7], {**IDS, "eos_token_id": [5, 7]}),
        (
            {"eos_token_id": 5, "pad_token_id": 3},
            {"eos_token_id": [9, 7], "pad_token_id": 2, "top_p": 0.8},
            [7, 8],
            {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [9, 7, 8], "top_p": 0.8},
        ),
        ({}, {"eos_token_id": None}, [7], {**IDS, "eos_token_id": 7}),
    ],
)
def test_every_id_that_ends_an_answer_is_named(tmp_path, config, generation, stop_ids, wanted):
    assert IDS == {"bos_token_id": 1, "pad_token_id": 0}
    for name, content in {"config.json": config, "generation_config.json": generation}.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    folder = None if config is None else tmp_path
    assert companions.generation_config(folder, IDS, stop_ids) == wanted


def test_ends_in_plain_text_are_stop_strings(tmp_path):
    settings = companions.generation_config(None, IDS, [7], ["</turn>"])
    assert settings == {**IDS, "eos_token_id": 7, "stop_strings": ["</turn>"]}
    assert "stop_strings" not in companions.generation_config(None, IDS, [7])


@pytest.mark.parametrize(
    "own, wanted",
    [
        ("END", ["END", "</turn>"]),
        (["END", "</turn>"], ["END", "</turn>"]),
        (None, ["</turn>"]),
    ],
)
def test_stop_strings_of_the_base_stay_whole(tmp_path, own, wanted):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": own}))
    settings = companions.generation_config(tmp_path, IDS, [7], ["</turn>"])
    assert settings == {**IDS, "eos_token_id": 7, "stop_strings": wanted}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": ["x", 2]},
        {"eos_token_id": [True, 2]},
        {"eos_token_id": "x"},
        {"pad_token_id": [2]},
        {"stop_strings": 1},
        {"stop_strings": ["a", None]},
    ],
)
def test_fields_of_another_type(tmp_path, name, fields):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(fields))
    (field,) = fields
    with pytest.raises(UserError, match=rf"/{re.escape(name)}: {field}: .* is not "):
        companions.generation_config(tmp_path, IDS, [7])


def test_the_files_of_a_tokenizer(tmp_path):
    described = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja")
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    for name in (*described, *vocabularies, "config.json"):
        (tmp_path / name).touch()
    for main, wanted in {
        "tokenizer.json": {name: name for name in vocabularies},
        "tokenizer.model": {"tokenizer.model": "tokenizer.model"},
        "mine.json": {"tokenizer.json": "mine.json"},
        "mine.model": {"tokenizer.model": "mine.model"},
    }.items():
        found = companions.tokenizer_files(tmp_path / main)
        wanted |= {name: name for name in described}
        assert found == {name: tmp_path / file for name, file in wanted.items()}, main
    alone = tmp_path / "deep" / "tok260k.model"
    assert companions.tokenizer_files(alone) == {"tokenizer.model": alone}
