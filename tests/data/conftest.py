"""Tokenizers that are trained once for the tests of this room, and a smaller packer."""

import json

import pytest
import sentencepiece
import tokenizers as hf

from medmoe_jax.data import batches
from medmoe_jax.data import tokenizers as tk
from tests.data.samples import CHATML, texts


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory):
    """Sentencepiece, with the markers of chatml as tokens, without a dummy prefix."""
    return tk.train(texts(), 450, tmp_path_factory.mktemp("sp") / "t.model", CHATML)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory):
    """Sentencepiece, no markers."""
    return tk.train(texts(), 420, tmp_path_factory.mktemp("sp") / "t.model")


@pytest.fixture(scope="session")
def dummy_tokenizer(tmp_path_factory):
    """Sentencepiece as trained by default: a dummy prefix, and extra spaces removed."""
    prefix = tmp_path_factory.mktemp("sp") / "t"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(prefix),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return tk.load(prefix.with_suffix(".model"))


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory):
    """A tokenizer.json of the GPT-2 kind, with chatml markers and a config beside it."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", *CHATML],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tk.load(folder)


@pytest.fixture(scope="session")
def metaspace_tokenizer(tmp_path_factory):
    """A tokenizer.json of the Llama-2 kind: dummy space, byte fallback, stripped when decoding."""
    tokenizer = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    folder = tmp_path_factory.mktemp("metaspace")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return tk.load(folder / "tokenizer.json")


@pytest.fixture(params=["chatml", "plain", "dummy", "byte_level", "metaspace"])
def any_tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def few_bins(monkeypatch):
    """Fewer sequences are packed at once, so that a stream's first batch comes sooner."""
    monkeypatch.setattr(batches, "PACK_BINS", 5)
