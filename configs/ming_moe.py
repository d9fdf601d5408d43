"""MING-MOE (arXiv 2404.09027): a sparse mixture of LoRA experts, with no task label at inference.

  medmoe train --config=configs/ming_moe.py:qwen1.5-1.8b --workdir=runs/ming_moe \\
      --config.data.sources.medical.path=medical.jsonl

The argument is a key of HUB in medmoe_jax/base/presets.py; any other decoder:
--config.base.path=DIR.

One stage. Attention gets plain LoRA; every projection of every feed-forward network gets eight
experts and a router of its own, which picks two a token from the token alone. The experts depend on
the token, so they do not fold into the base: serve the model with `medmoe generate`, or leave the
bank out (--off=experts) to export the attention part.

Hardware: meant for TPU slices (FSDP over all chips); the 1.8B base in bfloat16 with 16 rows of 3072
tokens asks for a v5e-8 or larger.
"""

from ml_collections import ConfigDict

from medmoe_jax.base.presets import CHAT, HUB
from medmoe_jax.training.config import bank, recipe, source, stage


def routed_experts(**fields) -> ConfigDict:
    """The only stage: attention LoRA and routed experts, trained together."""
    banks = {
        "attention": bank(sites=("attn.*",), rank=16, alpha=32.0, dropout=0.05),
        "experts": bank(
            sites=("mlp.*",), experts=8, rank=16, alpha=32.0, gate="token", top_k=2, dropout=0.05
        ),
    }
    return stage(**{"banks": banks, **fields})


def get_config(arg: str = "qwen1.5-1.8b") -> ConfigDict:
    """The recipe for a base."""
    if arg not in HUB:
        raise ValueError(f"'{arg}': give one of {', '.join(HUB)}")
    config = recipe()
    config.base.path = HUB[arg]
    config.base.dtype = "bfloat16"
    config.data.template = CHAT.get(arg, "chatml")
    config.data.length = 3072
    config.data.global_batch = 128
    config.data.shards = 64
    config.data.sources.medical = source("medical.jsonl")
    config.stages.order = ("mixture",)
    config.stages.mixture = routed_experts(mixture={"medical": 1.0}, epochs=1.0)
    config.run.accumulation = 8
    return config
