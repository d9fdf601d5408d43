"""The comparison of exports with what serves them: its reader in transformers, and its rule."""

import json

import numpy as np
import pytest

from benchmarks import served_texts, vllm_texts
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.api.opening import language_model
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.cli.export import FORMATS
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import Trained
from tests import naive, tiny

QUESTIONS = ["What is heparin for?", "insulin: yes or no, sugar?", "Is codeine for cough?"]


def wordy_base(folder):
    """A random base that says words only: bytes and padding of its vocabulary score 0."""
    params = naive.random_params(tiny.DECODER)
    texts = [text for row in tiny.knowledge_rows() for text in row.values()]
    said = sorted({i for text in texts for i in tiny.tokenizer().encode(text)})
    head = np.zeros_like(params["head"])
    head[said] = np.asarray(params["head"])[said]
    return save_hf(folder, tiny.DECODER, {**params, "head": head}, "llama")


@pytest.mark.parity
def test_exports_answer_in_transformers_as_we_do(tmp_path):
    config = tiny.medcare_config()
    config.base.path = str(wordy_base(tmp_path / "tiny"))
    setup = open_setup(config)
    spec = BankSpec("bank", ("attn.q", "attn.o", "mlp.up", "mlp.down"), 0, 2, rank=4)
    banks = naive.random_banks((spec,), tiny.DECODER, size=2.0)
    trained = Trained("", {"bank": (spec, "frozen")}, banks, setup.load_base())
    bare = Trained("", {}, {}, trained.base)
    for kind, of, name in (
        ("hf", trained, "merged"),
        ("hf", bare, "base"),
        ("peft", trained, "adapter"),
    ):
        FORMATS[kind].write(setup, of, str(tmp_path / name), None, {})
    ours = [
        {
            "prompt": setup.encoder.prompt([{"role": "user", "content": question}]),
            "text": text,
            "ids": setup.tokenizer.encode(text),
        }
        for question, text in zip(
            QUESTIONS, language_model(setup, trained).generate(QUESTIONS, 12), strict=True
        )
    ]
    for weights, adapter in (*vllm_texts.EXPORTS.values(), ("base", "")):
        adapter = adapter and str(tmp_path / adapter)
        answers = served_texts.in_transformers(str(tmp_path / weights), QUESTIONS, 12, adapter)
        found = vllm_texts.compare(ours, answers)
        assert found["same_prompts"] == 3, found
        assert found["same_texts"] == (3 if adapter or weights == "merged" else 0), found


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
