"""A tiny MedCare recipe with its data, tokenizer and base, made once for all rooms that train."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from configs import medcare
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.data import tokenizers
from medmoe_jax.training.config import recipe, source
from medmoe_jax.training.run import train
from medmoe_jax.training.setup import Setup, open_setup
from tests import naive

DRUGS = ("aspirin", "insulin", "heparin", "digoxin", "codeine", "quinine", "atropine", "lithium")
USES = ("pain", "sugar", "clots", "rhythm", "cough", "malaria", "poison", "mania")
MARKERS = ("<|im_start|>", "<|im_end|>")
DECODER = DecoderConfig(
    vocab_size=304, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24,
    max_positions=128,
)  # fmt: skip


STEPS = 12


@contextlib.contextmanager
def quick_compiles():
    """Compile with few optimisations, and every program once a session."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}

    def apply(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    apply(settings)
    try:
        yield
    finally:
        apply(before)


@functools.cache
def folder() -> Path:
    """A folder for the whole session; a child process takes its parent's from $MEDMOE_TINY."""
    if "MEDMOE_TINY" in os.environ:
        return Path(os.environ["MEDMOE_TINY"])
    path = Path(tempfile.mkdtemp(prefix="medmoe-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def knowledge_rows() -> list[dict]:
    """What a drug is given for."""
    return [
        {"prompt": f"What is {drug} for?", "response": f"It is for {use}."}
        for drug, use in zip(DRUGS, USES, strict=True)
    ] * 3


def alignment_rows() -> list[dict]:
    """The same facts in another format."""
    return [
        {"prompt": f"{drug}: yes or no, {use}?", "response": "yes" if right == use else "no"}
        for drug, right in zip(DRUGS, USES, strict=True)
        for use in (right, "fever")
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def data(name: str) -> Path:
    """The file of `knowledge` or `alignment` rows."""
    rows = {"knowledge": knowledge_rows, "alignment": alignment_rows}[name]()
    path = folder() / f"{name}.jsonl"
    return path if path.exists() else write_rows(path, rows)


@functools.cache
def tokenizer():
    """A sentencepiece tokenizer of 300 pieces with the markers of chatml."""
    path = folder() / "tokenizer.model"
    if path.exists():
        return tokenizers.load(path)
    texts = [text for row in knowledge_rows() + alignment_rows() for text in row.values()]
    return tokenizers.train(texts, 300, path, MARKERS)


@functools.cache
def base_path(seed: int = 0) -> Path:
    """A base on disk whose layers all matter, with four rows of padding in its vocabulary."""
    path = folder() / f"base{seed}"
    if not path.exists():
        save_hf(path, DECODER, naive.random_params(DECODER, seed), "llama")
    return path


def shrink(config) -> None:
    """MedCare's banks at ranks for a tiny base."""
    for stage in config.stages.order:
        for one in config.stages[stage].banks.values():
            one.rank, one.alpha, one.experts = 2, 4.0, min(one.experts, 4)


def medcare_config():
    """The stages of configs/medcare.py on the tiny base and data."""
    config = recipe()
    config.base.path = str(base_path())
    config.base.tokenizer = str(tokenizer().path)
    config.data.template = "user_assistant"
    config.data.length = 48
    config.data.global_batch = 8
    config.data.shards = 4
    config.data.sources.knowledge = source(str(data("knowledge")))
    config.data.sources.alignment = source(str(data("alignment")))
    config.stages.order = ("aggregate", "align")
    common = {"steps": STEPS, "learning_rate": 3e-2, "epochs": 0.0}
    config.stages.aggregate = medcare.aggregate(
        mixture={"knowledge": 2.0, "alignment": 1.0}, **common
    )
    config.stages.align = medcare.align(mixture={"alignment": 1.0}, **common)
    shrink(config)
    config.run.remat = "none"
    config.run.log_every = 2
    config.run.save_every = 4
    config.run.score_batch = 8
    return config


@functools.cache
def trained() -> tuple[Setup, Path]:
    """The recipe's parts and a work directory in which both stages are finished."""
    setup = open_setup(medcare_config())
    workdir = folder() / "trained"
    # Whichever room asks first: runs that are compared bit for bit are compiled alike.
    with quick_compiles():
        train(setup, workdir)
    return setup, workdir
