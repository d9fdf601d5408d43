"""The demonstration: SmolLM2-135M-Instruct learns medicine in MedCare's two stages.

  make demo            (or: medmoe demo --config.base.path=MODEL)

Stage `aggregate` learns 180 facts, asked in many ways, and a few clinical formats; stage `align`
the formats, orthogonal to the knowledge. `align_free` is `align` without the orthogonality term,
from the same stage 1. Two CPU cores, 5 GiB.
"""

from ml_collections import ConfigDict

from medmoe_jax.training.config import bank, orthogonality, recipe, source, stage

KNOWLEDGE_SITES = ("mlp.*",)


def _align(weight: float) -> ConfigDict:
    return stage(
        after="aggregate",
        merge=("attention",),
        drop=("noise",),
        states={"knowledge": "frozen"},
        banks={"alignment": bank(sites=KNOWLEDGE_SITES, rank=32, alpha=64.0)},
        losses={"orthogonality": orthogonality("alignment", "knowledge", weight=weight)},
        mixture={"alignment": 4.0, "knowledge": 2.0, "everyday": 0.5},
        steps=30,
        learning_rate=1e-3,
        warmup=0.1,
    )


def get_config() -> ConfigDict:
    """The demonstration's recipe; `base.path` may be any chat model in English."""
    config = recipe()
    config.base.path = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.template = "tokenizer"
    config.data.length = 256
    config.data.global_batch = 4
    config.data.shards = 4
    config.data.sources.knowledge = source(reader="demo_answers")
    config.data.sources.alignment = source(reader="demo_alignment:en")
    config.data.sources.everyday = source(reader="demo_everyday")
    # Commands that name no stage take the last one.
    config.stages.order = ("aggregate", "align_free", "align")
    config.stages.aggregate = stage(
        banks={
            "attention": bank(sites=("attn.*",), rank=16, alpha=32.0),
            "noise": bank(sites=("mlp.*",), experts=8, rank=16, alpha=32.0, gate="token", top_k=2),
            "knowledge": bank(sites=KNOWLEDGE_SITES, rank=32, alpha=64.0),
        },
        mixture={"knowledge": 8.0, "alignment": 1.0, "everyday": 1.0},
        steps=100,
        learning_rate=3e-3,
        warmup=0.2,
        b2=0.95,  # the stage has 100 steps: a mean of squares over 1,000 would come too late
    )
    config.stages.align = _align(weight=1.0)
    config.stages.align_free = _align(weight=0.0)
    config.run.mesh.fsdp, config.run.mesh.sequence = 1, -1  # four rows, on any number of devices
    config.run.remat = "dots"
    config.run.log_every = 2
    config.run.save_every = 100
    config.run.score_batch = 32
    return config
