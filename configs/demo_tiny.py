"""The tiny demonstration: a decoder made on the spot learns medicine in MedCare's two stages.

  make demo-tiny       (or: medmoe demo --tiny)

Stage `pretrain` makes the base: all its weights, on everyday text without a single medical fact.
From then on it is frozen. `align_free` is `align` without the orthogonality term, from the same
stage 1. Two CPU cores, under 8 minutes.
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
        mixture={"alignment": 1.0},
        steps=450,
        learning_rate=7e-4,
    )


def get_config() -> ConfigDict:
    """The tiny demonstration's recipe; `medmoe demo` sets the tokenizer it trained."""
    config = recipe()
    config.base.seed = 2
    config.base.decoder = ConfigDict(
        {
            "vocab_size": 2048,
            "d_model": 128,
            "n_layers": 4,
            "n_heads": 4,
            "n_kv_heads": 4,
            "head_dim": 32,
            "d_ff": 384,
            "tied": True,
            "embed_scale": 128**0.5,
            "max_positions": 256,
        }
    )
    config.data.template = "user_assistant"
    config.data.length = 128
    config.data.global_batch = 8
    config.data.shards = 4
    config.data.sources.general = source(reader="demo_general")
    config.data.sources.knowledge = source(reader="demo_knowledge")
    config.data.sources.alignment = source(reader="demo_alignment")
    # Commands that name no stage take the last one.
    config.stages.order = ("pretrain", "aggregate", "align_free", "align")
    config.stages.pretrain = stage(
        train_base=("*",),
        mixture={"general": 1.0},
        steps=1800,
        learning_rate=2e-3,
        weight_decay=0.01,
    )
    config.stages.aggregate = stage(
        after="pretrain",
        banks={
            "attention": bank(sites=("attn.*",), rank=16, alpha=32.0),
            "noise": bank(sites=("mlp.*",), experts=8, rank=8, alpha=16.0, gate="token", top_k=2),
            "knowledge": bank(sites=KNOWLEDGE_SITES, rank=32, alpha=64.0),
        },
        mixture={"knowledge": 20.0, "alignment": 1.0},
        steps=700,
        learning_rate=2e-3,
    )
    config.stages.align = _align(weight=1.0)
    config.stages.align_free = _align(weight=0.0)
    config.run.remat = "none"
    config.run.log_every = 10
    config.run.save_every = 200
    config.run.score_batch = 64
    return config
