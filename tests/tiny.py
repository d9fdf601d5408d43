"""A tiny MedCare recipe with its data, tokenizer and base, made once for all rooms that train."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock

from configs import medcare
from medmoe_jax.base.config import DecoderConfig
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.data import tokenizers
from medmoe_jax.training.config import recipe, source
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import Setup, open_setup
from medmoe_jax.training.train import train
from tests import naive, quick

DRUGS = ("aspirin", "insulin", "heparin", "digoxin", "codeine", "quinine", "atropine", "lithium")
USES = ("pain", "sugar", "clots", "rhythm", "cough", "malaria", "poison", "mania")
MARKERS = ("<|im_start|>", "<|im_end|>")
DECODER = DecoderConfig(
    vocab_size=304, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24,
    max_positions=128,
)  # fmt: skip
STEPS = 12


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, which `make(path)` fills: in one process, whichever of the run asks first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.with_name(f"{path.name}.done")
    with filelock.FileLock(path.with_name(f"{path.name}.lock")):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # what a process that was killed has left
            make(path)
            done.touch()
    return path


def folder() -> Path:
    """Where the files of this module are, for all processes of a run."""
    return quick.folder() / "tiny"


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
    return once(folder() / f"{name}.jsonl", lambda path: write_rows(path, rows))


@functools.cache
def tokenizer():
    """A sentencepiece tokenizer of 300 pieces with the markers of chatml."""
    texts = [text for row in knowledge_rows() + alignment_rows() for text in row.values()]
    path = folder() / "tokenizer.model"
    once(path, lambda path: tokenizers.train(texts, 300, path, MARKERS))
    return tokenizers.load(path)


@functools.cache
def base_path(seed: int = 0) -> Path:
    """A base on disk whose layers all matter, with four rows of padding in its vocabulary."""
    params = functools.partial(naive.random_params, DECODER, seed)
    return once(folder() / f"base{seed}", lambda path: save_hf(path, DECODER, params(), "llama"))


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
    return setup, once(folder() / "trained", lambda workdir: train(Run(setup, workdir)))
