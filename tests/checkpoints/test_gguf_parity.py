"""GGUF files as transformers reads them: small ones of every architecture, and two real models.

The real ones are looked for in the folder that $MEDMOE_MODELS names (`make models` fetches one).
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.adapters import lifecycle
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.checkpoints import gguf_models
from medmoe_jax.checkpoints.bases import open_base
from medmoe_jax.checkpoints.gguf_architectures import ARCHITECTURES
from medmoe_jax.checkpoints.gguf_export import save_gguf
from medmoe_jax.data import tokenizers
from tests import naive
from tests.base.test_parity import error, ours, theirs
from tests.gguf_files import write
from tests.torch_side import torch, transformers

pytestmark = pytest.mark.parity
# What a file does not say, transformers takes from its own defaults.
CHANGES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_scaling": None},
    # Its padding id is beyond a smaller vocabulary, and its window is not read.
    "phi3": {"vocab_size": 32064, "sliding_window": 64},
}


def ends(writer):
    """Ids within the small vocabulary."""
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def read_by_transformers(path):
    """Its model out of the file, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", CHANGES)
def test_small_files(name, tmp_path):
    path = tmp_path / "m.gguf"
    write(path, name, "Q8_0", more=ends, **CHANGES[name])
    config, params = gguf_models.load(path, jnp.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    got = ours(config, params, tokens)[1]
    assert error(got, theirs(read_by_transformers(path), tokens)) <= 2e-5


SPECS = (
    BankSpec("attention", ("attn.q", "attn.k", "attn.v", "attn.o"), 0, 3, rank=3, alpha=6.0),
    BankSpec("mlp", ("mlp.gate", "mlp.up", "mlp.down"), 1, 3, experts=2, rank=2, alpha=8.0),
)


@pytest.mark.parametrize("name", CHANGES)
def test_exported_files(name, tmp_path):
    """Our files, with banks folded in, give transformers the logits of base and banks."""
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "m.gguf", name, more=ends, **CHANGES[name])
    config, params = gguf_models.load(tmp_path / "base" / "m.gguf", jnp.float32)
    banks = naive.random_banks(SPECS, config, size=2.0)
    members = [(spec, banks[spec.name]) for spec in SPECS]
    ids = {f"tokenizer.ggml.{key}_token_id": i for key, i in (("bos", 1), ("eos", 2))}
    family = {arch.name: arch.family for arch in ARCHITECTURES.values()}[name]
    save_gguf(
        *(tmp_path / "out", config, params, family),
        kind="float32",
        members=members,
        fields={**ids, "tokenizer.ggml.padding_token_id": 0},
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    got = theirs(read_by_transformers(tmp_path / "out" / "model.gguf"), tokens)
    want = ours(config, lifecycle.merge_into(params, members), tokens)[1]
    assert error(got, want) <= 2e-5
    assert error(got, ours(config, params, tokens)[1]) >= 0.1


def real(name):
    """A real model's file; skips where it is not at hand."""
    path = Path(os.environ.get("MEDMOE_MODELS", "models")) / name
    if not path.is_file():
        pytest.skip(f"{path}: no such file (make models; $MEDMOE_MODELS names another folder)")
    return path


TEXTS = (
    "Scurvy is caused by a lack of vitamin C: 60 mg a day prevents it.",
    "  Two  spaces,\n\nlines\tand 12345.67 numbers; don't, I'LL, naïve café 中文 🙂",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"])
def test_real_files(name):
    path = real(name)
    config, params = gguf_models.load(path, jnp.float32)
    tokenizer = tokenizers.load(open_base(str(path), "", {}, 0).tokenizer)
    tokens = np.array([tokenizer.encode(TEXTS[0], start=True)])
    got, want = ours(config, params, tokens)[1], theirs(read_by_transformers(path), tokens)
    assert error(got, want) <= 2e-5
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # A model that reads other tokens than it was trained on finds them unlikely.
    z = got[0] - np.log(np.exp(got[0] - got[0].max(-1, keepdims=True)).sum(-1, keepdims=True))
    z -= got[0].max(-1, keepdims=True)
    assert -np.mean([z[t, tokens[0, t + 1]] for t in range(len(tokens[0]) - 1)]) < 4.0


def test_smollm_ids_are_those_of_transformers():
    path = real("SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = tokenizers.load(open_base(str(path), "", {}, 0).tokenizer)
    want = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        # Its reader does not cut digits, which this vocabulary has only one by one.
        for word in text.translate(str.maketrans("0123456789", "a" * 10)).split(" "):
            assert tokenizer.encode(word) == want.encode(word, add_special_tokens=False), word
    assert tokenizer.encode("12345") == [tokenizer.encode(digit)[0] for digit in "12345"]
    assert tokenizer.chat_template == want.chat_template
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
