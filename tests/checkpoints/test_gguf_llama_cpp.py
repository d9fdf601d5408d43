"""GGUF files out as llama.cpp runs them (skipped where it is absent; `make llama-cpp`)."""

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.checkpoints import gguf_models
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.checkpoints.gguf_export import save_gguf, save_gguf_adapter
from medmoe_jax.data import tokenizers
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.gguf_fields import tokenizer_fields
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.portable import portable_template
from medmoe_jax.data.templates import load_template
from tests import naive, tiny
from tests.base.test_parity import ours
from tests.checkpoints.test_gguf_parity import SPECS, TEXTS, real
from tests.gguf_files import HF, hf_config, write

llama_cpp = pytest.importorskip("llama_cpp", exc_type=ImportError)
pytestmark = pytest.mark.parity
VOCABULARY = {"vocab_size": 300}
# llama.cpp takes phi3's window for a mistake of the file.
CHANGES = {"phi3": {**VOCABULARY, "sliding_window": 64}}
F32 = 0  # ggml's number of the type, here of the cache


def opened(path, **options):
    return llama_cpp.Llama(
        str(path),
        **options,
        logits_all=True,
        verbose=False,
        n_ctx=256,
        n_threads=2,
        type_k=F32,
        type_v=F32,
    )


def log_probabilities(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def error(model, path, ids):
    """The largest difference of a log-probability between llama.cpp and us, in nats."""
    config, params = gguf_models.load(path, jnp.float32)
    model.eval(ids)
    theirs = log_probabilities(model.scores[: len(ids)])
    return np.abs(theirs - log_probabilities(ours(config, params, np.array([ids]))[1][0])).max()


def export(folder, config, params, family, encoder):
    fields = tokenizer_fields(encoder, config.vocab_size, portable_template(encoder).source)
    save_gguf(folder, config, params, family, kind="float32", fields=fields.values)
    return folder / "model.gguf"


@pytest.mark.parametrize("name", HF)
def test_every_architecture(name, tmp_path):
    encoder = Encoder(tiny.tokenizer(), TEMPLATES["user_assistant"])
    write(tmp_path / "m.gguf", name, **CHANGES.get(name, VOCABULARY))
    config, params = gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    path = export(tmp_path / "out", config, params, hf_config(name)["model_type"], encoder)
    ids = list(map(int, np.random.default_rng(0).integers(4, 300, 17)))
    assert error(opened(path), path, ids) <= 5e-3  # its GELU is a table of halves
    # The measure sees what is wrong by little.
    half = {**params, "final_norm": params["final_norm"] * 0.9}
    want = log_probabilities(ours(config, params, np.array([ids]))[1])
    got = log_probabilities(ours(config, half, np.array([ids]))[1])
    assert np.abs(got - want).max() >= 2e-2


@pytest.mark.parametrize("template", ["user_assistant", "llama2"])
def test_prompts_have_the_ids_that_were_trained(template, tmp_path):
    encoder = Encoder(tiny.tokenizer(), TEMPLATES[template])
    params = naive.random_params(tiny.DECODER)
    path = export(tmp_path / "out", tiny.DECODER, params, "llama", encoder)
    model, tokenizer = opened(path), tokenizers.load(open_base(str(path), "", {}, 0).tokenizer)
    read = load_template("tokenizer", tokenizer)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False) == encoder.tokenizer.encode(text)
        turns = [{"role": "user", "content": text}]
        prompt = read.render(turns, (), True).encode()
        assert model.tokenize(prompt, add_bos=True, special=True) == encoder.prompt(turns)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_an_adapter_does_what_folding_does(name, tmp_path):
    encoder = Encoder(tiny.tokenizer(), TEMPLATES["user_assistant"])
    write(tmp_path / "m.gguf", name, **CHANGES.get(name, VOCABULARY))
    config, params = gguf_models.load(tmp_path / "m.gguf", jnp.float32)
    banks = naive.random_banks(SPECS, config, size=2.0)
    members = [(spec, banks[spec.name]) for spec in SPECS]
    base = export(tmp_path / "base", config, params, name, encoder)
    save_gguf_adapter(tmp_path / "adapter", config, name, members)
    ids = list(map(int, np.random.default_rng(0).integers(4, 300, 17)))
    model = opened(base, lora_path=str(tmp_path / "adapter" / "adapter.gguf"))
    model.eval(ids)
    got = log_probabilities(model.scores[: len(ids)])
    folded = lifecycle.merge_into(params, members)
    want, bare = (
        log_probabilities(ours(config, tree, np.array([ids]))[1][0]) for tree in (folded, params)
    )
    assert np.abs(got - want).max() <= 5e-3 and np.abs(bare - want).max() >= 0.1


@pytest.mark.slow
def test_a_real_model_answers_alike(tmp_path):
    source = real("SmolLM2-135M-Instruct.Q4_1.gguf")
    base = open_base(str(source), "", {}, 0)
    tokenizer = tokenizers.load(base.tokenizer)
    encoder = Encoder(tokenizer, load_template("tokenizer", tokenizer))
    params = base.load(jnp.float32, None)
    path = export(tmp_path / "out", base.config, params, base.family, encoder)
    model = opened(path)
    turns = [{"role": "user", "content": "What is scurvy and what causes it?"}]
    answer = model.create_chat_completion(turns, temperature=0.0, max_tokens=24)
    said = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == len(encoder.prompt(turns))
    ids = encoder.prompt(turns) + tokenizer.encode(said)
    greedy = ours(base.config, params, np.array([ids]))[1][0].argmax(-1)
    start = len(encoder.prompt(turns))
    np.testing.assert_array_equal(greedy[start - 1 : -1], ids[start:])
    model.reset()
    assert error(model, path, tokenizer.encode(TEXTS[0])) <= 2e-2
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
