"""MedCare (arXiv 2406.17484): knowledge and noise aggregators, then orthogonal alignment.

  medmoe train --config=configs/medcare.py:qwen1.5-1.8b --workdir=runs/medcare \\
      --config.data.sources.knowledge.path=knowledge.jsonl \\
      --config.data.sources.alignment.path=alignment.jsonl

The argument is BASE, or BASE,paper for the published form of the orthogonality term (elementwise
sum, weight 1, the knowledge bank trained along). BASE is a key of HUB in
medmoe_jax/base/presets.py; any other decoder: --config.base.path=DIR.

Stage `aggregate` trains on knowledge and alignment rows together; the noise bank soaks up what is
particular to formats. Before stage `align` it is dropped, the attention bank is merged, and the
knowledge bank is frozen; then the alignment bank trains on alignment rows only, kept orthogonal to
the knowledge. After it everything folds into a plain dense checkpoint.

Hardware: meant for TPU slices (FSDP over all chips); the 1.8B base in bfloat16 with 16 rows of
3072 tokens asks for a v5e-8 or larger. The expected result is a model that gains on knowledge
exams over its base and keeps that gain when it learns the formats; measured figures of this
project are in docs/.
"""

from ml_collections import ConfigDict

from medmoe_jax.base.presets import CHAT, HUB
from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage


def aggregate(**fields) -> ConfigDict:
    """Stage 1: attention LoRA, noise aggregator and knowledge aggregator together."""
    banks = {
        "attention": bank(sites=("attn.*",), rank=16, alpha=32.0, dropout=0.05),
        "noise": bank(
            sites=("mlp.*",), experts=8, rank=16, alpha=32.0, gate="token", top_k=2, dropout=0.05
        ),
        # s = 2 like the experts beside it, at twice their rank.
        "knowledge": bank(sites=("mlp.*",), rank=32, alpha=64.0, dropout=0.05),
    }
    return stage(**{"banks": banks, **fields})


def align(published: bool = False, **fields) -> ConfigDict:
    """Stage 2: the alignment bank, orthogonal to the knowledge."""
    if published:
        loss = orthogonality(
            "alignment", "knowledge", weight=1.0, reduction="sum", stop_gradient=False
        )
    else:
        loss = orthogonality("alignment", "knowledge", weight=1.0)
    return stage(
        **{
            "after": "aggregate",
            "merge": ("attention",),
            "drop": ("noise",),
            "states": {"knowledge": "train" if published else "frozen"},
            "banks": {"alignment": bank(sites=("mlp.*",), rank=32, alpha=64.0, dropout=0.05)},
            "losses": {"orthogonality": loss},
            **fields,
        }
    )


def get_config(arg: str = "qwen1.5-1.8b") -> ConfigDict:
    """The recipe for a base, `BASE` or `BASE,paper`."""
    base, _, form = arg.partition(",")
    if base not in HUB or form not in ("", "paper"):
        raise ValueError(f"'{arg}': give BASE or BASE,paper with BASE one of {', '.join(HUB)}")
    config = recipe()
    config.base.path = HUB[base]
    config.base.dtype = "bfloat16"
    config.data.template = CHAT.get(base, "chatml")
    config.data.length = 3072
    config.data.global_batch = 128
    config.data.shards = 64
    config.data.sources.knowledge = source("knowledge.jsonl")
    config.data.sources.alignment = source("alignment.jsonl")
    config.stages.order = ("aggregate", "align")
    config.stages.aggregate = aggregate(mixture={"knowledge": 1.0, "alignment": 1.0}, epochs=1.0)
    config.stages.align = align(form == "paper", mixture={"alignment": 1.0}, epochs=3.0)
    config.run.accumulation = 8
    return config
