"""From a Hugging Face folder through configs/medcare.py and back out, on the command line.

A random Qwen2 folder, as wide as the 0.5B, with four layers and few words, is adapted, its banks
are set to large random values, and both exports must give the logits that the banks gave beside
the base as it was.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from medmoe_jax.adapters.model import AdaptedConfig, hidden
from medmoe_jax.base import decoder
from medmoe_jax.base.loss import logits
from medmoe_jax.checkpoints import huggingface
from medmoe_jax.checkpoints import stages as store
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.cli.configs import load_config
from medmoe_jax.training.recipe import parse
from medmoe_jax.training.transitions import next_roster
from tests import naive, quick, tiny
from tests.randomised import randomise
from tests.torch_side import load_adapter, load_model, torch, transformers
from tests.torch_side import logits as theirs

pytestmark = [pytest.mark.parity, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4  # max|a - b| / max|b|, float32
SIZES = dict(
    vocab_size=4096, hidden_size=896, intermediate_size=4864, num_hidden_layers=4,
    num_attention_heads=14, num_key_value_heads=2,
)  # fmt: skip
BANKS = ("attention", "knowledge", "alignment")


def build_tokenizer():
    """A small byte-level vocabulary with the markers of chatml."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", *tiny.MARKERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = tiny.knowledge_rows() + tiny.alignment_rows()
    tokenizer.train_from_iterator([text for row in rows for text in row.values()], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def build_base(folder: Path) -> Path:
    """A random Qwen2 with tied embeddings, in several shards, with its tokenizer."""
    config = transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=sum(p.nbytes for p in model.parameters()) // 3)
    build_tokenizer().save_pretrained(folder)
    return folder


def medmoe(*arguments):
    """The command in a process of its own, with one device."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick.flags(1),
    }
    command = [sys.executable, "-m", "medmoe_jax.cli.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def recipe_arguments(base: Path):
    """configs/medcare.py on that base, one step a stage."""
    return [
        "--config=configs/medcare.py:qwen2-0.5b",
        f"--config.base.path={base}",
        "--config.base.dtype=float32",
        f"--config.data.sources.knowledge.path={tiny.data('knowledge')}",
        f"--config.data.sources.alignment.path={tiny.data('alignment')}",
        "--config.data.length=64",
        "--config.data.global_batch=2",
        "--config.data.shards=1",
        "--config.stages.aggregate.steps=1",
        "--config.stages.align.steps=1",
        "--config.run.accumulation=1",
    ]


def reference(base: Path, arguments, workdir: Path, ids_BxT):
    """`logits(gains)`: ours, the banks times `{bank: gain}` beside the base as it was."""
    config, params = huggingface.load(base, jnp.float32)
    roster = {}
    for stage in parse(load_config(arguments), config):
        roster = next_roster(stage, roster)
    assert tuple(roster) == BANKS
    assert [state for _, state in roster.values()] == ["merged", "frozen", "train"]
    adapted = AdaptedConfig(config, tuple(spec for spec, _ in roster.values()))
    banks = store.load_final(StageFolder.of(workdir, "align"))[0]["banks"]
    positions = jnp.tile(jnp.arange(ids_BxT.shape[1])[None], (len(ids_BxT), 1))

    @jax.jit
    def run(params, banks, gains):
        banks = {
            name: {site: {**p, "lora_b": gains[name] * p["lora_b"]} for site, p in bank.items()}
            for name, bank in banks.items()
        }
        ones = jnp.ones_like(positions)
        x, _, _ = hidden(adapted, params, banks, jnp.asarray(ids_BxT), ones, positions)
        return logits(config, decoder.head(params), x)

    return lambda **gains: np.asarray(run(params, banks, {**dict.fromkeys(BANKS, 1.0), **gains}))


@pytest.fixture
def folder(tmp_path):
    """A folder that does not outlive the test: it takes several gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_medcare_and_back(folder):
    base = build_base(folder / "base")
    arguments = recipe_arguments(base)
    medmoe("train", *arguments, f"--workdir={folder / 'trained'}")
    workdir = randomise(folder / "trained", folder / "random", size=0.1)
    exports = {kind: folder / kind for kind in ("hf", "peft")}
    for kind, output in exports.items():
        options = (f"--workdir={workdir}", f"--format={kind}", f"--output={output}")
        medmoe("export", *arguments, *options)

    ids_BxT = np.random.default_rng(3).integers(3, 400, (2, 16))
    ours = reference(base, arguments, workdir, ids_BxT)
    want, bare = ours(), ours(**dict.fromkeys(BANKS, 0.0))
    wrong = {(name, gain): ours(**{name: gain}) for name in BANKS for gain in (0.0, 2.0)}
    load = {
        "hf": functools.partial(load_model, exports["hf"]),
        "peft": functools.partial(load_adapter, base, exports["peft"]),
    }
    for kind, open_export in load.items():
        got = theirs(open_export(), ids_BxT)
        half = naive.rel(theirs(open_export(torch.bfloat16), ids_BxT), want)
        figures = {"float32": naive.rel(got, want), "bfloat16": half, "moved": naive.rel(bare, got)}
        print(kind, figures)
        assert figures["float32"] <= TOLERANCE
        assert figures["moved"] >= 0.1
        for what, other in wrong.items():
            assert naive.rel(got, other) >= 100 * TOLERANCE, f"{kind}: {what} is not seen"

    before, tokenizer = map(transformers.AutoTokenizer.from_pretrained, (base, exports["hf"]))
    text = "<|im_start|>user\nWhat is codeine for?<|im_end|>"
    assert tokenizer(text).input_ids == before(text).input_ids
    # The base ends a text with one token, and MedCare's answers with another.
    generation = transformers.GenerationConfig.from_pretrained(exports["hf"])
    assert generation.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
