"""The comparison of exports with what serves them: its reader in transformers, and its rule."""

import json

import pytest

from benchmarks import served_texts, vllm_texts
from medmoe_jax.cli.main import main
from medmoe_jax.data.encode import Encoder
from tests import tiny
from tests.randomised import randomise

QUESTIONS = ["What is heparin for?", "insulin: yes or no, sugar?", "Is codeine for cough?"]
CONFIG = "from tests import tiny\n\ndef get_config():\n    return tiny.medcare_config()\n"


@pytest.mark.parity
def test_exports_answer_in_transformers_as_generate_does(tmp_path):
    setup, trained = tiny.trained()
    workdir = randomise(trained, tmp_path / "w", size=0.5)
    (tmp_path / "recipe.py").write_text(CONFIG)
    config = f"--config={tmp_path / 'recipe.py'}"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))

    def medmoe(command, *options):
        assert main([command, config, f"--workdir={workdir}", *options]) == 0

    for name, options in {
        "merged": ("--format=hf",),
        "base": ("--format=hf", "--stage=base"),
        "adapter": ("--format=peft",),
    }.items():
        medmoe("export", f"--output={tmp_path / name}", *options)
    files = (f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    medmoe("generate", "--max-tokens=12", *files)
    texts = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").open()]
    encoder = Encoder(setup.tokenizer, setup.template)
    ours = [
        {
            "prompt": encoder.prompt([{"role": "user", "content": question}]),
            "text": text,
            "ids": setup.tokenizer.encode(text),
        }
        for question, text in zip(QUESTIONS, texts, strict=True)
    ]
    answers = {
        kind: served_texts.in_transformers(
            str(tmp_path / weights), QUESTIONS, 12, str(tmp_path / adapter) if adapter else ""
        )
        for kind, (weights, adapter) in {**vllm_texts.EXPORTS, "bare": ("base", "")}.items()
    }
    for kind in vllm_texts.EXPORTS:
        found = vllm_texts.compare(ours, answers[kind])
        assert found["same_prompts"] == found["same_texts"] == 3 and not found["different"], found
    assert vllm_texts.compare(ours, answers["bare"])["same_texts"] < 3


def test_where_two_answers_part():
    ours = [{"prompt": [1], "text": "a b", "ids": [5, 6]}, {"prompt": [2], "text": "c", "ids": [7]}]
    theirs = [
        {"prompt": [1], "text": "a d", "ids": [5, 9], "gap": [2.0, 0.001]},
        {"prompt": [2], "text": "c", "ids": [7, 3], "gap": [1.0, 0.5]},
    ]
    found = vllm_texts.compare(ours, theirs)
    assert (found["same_prompts"], found["same_texts"], found["least_gap"]) == (2, 1, 0.001)
    assert found["different"] == [{"question": 0, "token": 1, "gap": 0.001, "theirs": "a d"}]


def test_the_rank_that_a_server_is_told(tmp_path):
    config = {"r": 8, "rank_pattern": {"q_proj": 20}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert served_texts._rank(str(tmp_path)) == 32
