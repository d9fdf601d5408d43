"""Apollo-MoE (arXiv 2410.10626): language experts in the last layers, fifty languages.

  medmoe train --config=configs/apollo_moe.py:qwen2-0.5b --workdir=runs/apollo_moe \\
      --config.data.sources.medical.path=medical.jsonl

The argument is BASE or BASE,VARIANT; BASE is a key of HUB in medmoe_jax/base/presets.py, VARIANT
one of VARIANTS below. The default, `language_family`, is the released form: in the last two layers
every feed-forward network becomes seven, one a language family, each at first a copy of the dense
one. A router picks two a token, in training always with the family of the token's language among
them; at inference it needs no language. Everything trains. `lora` is this project's own: the base
stays frozen, and the experts are low-rank factors inside its networks.

The published weights of the two picks do not sum to one, so the copies do not keep the dense
model's function at first; --config.stages.mixture.banks.experts.renormalise=True makes them do so.

Rows carry their "language"; the table of languages and experts is data that a user may replace:
--config.data.languages=FILE. The experts depend on the token, so they do not fold into a dense
checkpoint.

Hardware: meant for TPU slices; the 0.5B base with all weights trained in float32 asks for a v5e-8.
"""

from ml_collections import ConfigDict

from medmoe_jax.base.presets import HUB
from medmoe_jax.training.config import bank, recipe, source, stage

# Variant: the table of languages, its experts, the layers with experts, the form of an expert.
VARIANTS = {
    "language_family": ("families", 7, (-2, None), "ffn"),
    "post_moe": ("major", 12, (-2, None), "ffn"),
    "hybrid": ("major", 12, (None, None), "ffn"),
    "lora": ("families", 7, (-2, None), "ffn_lora"),
}


def mixture(experts: int, layers: tuple, form: str, **fields) -> ConfigDict:
    """The only stage: language experts, and all of the base unless they are low-rank."""
    banks = {
        "experts": bank(
            sites=("mlp.*",), layers=layers, form=form, experts=experts, gate="language", top_k=2,
            renormalise=False, router_bias=False, forcing="train",
        )
    }  # fmt: skip
    full = form == "ffn"
    defaults = {
        "banks": banks,
        "train_base": ("*",) if full else (),
        "learning_rate": 1e-4 if full else 2e-4,
        "weight_decay": 0.1 if full else 0.0,
    }
    return stage(**{**defaults, **fields})


def get_config(arg: str = "qwen2-0.5b") -> ConfigDict:
    """The recipe for a base and a variant."""
    base, _, variant = arg.partition(",")
    variant = variant or "language_family"
    if base not in HUB or variant not in VARIANTS:
        raise ValueError(
            f"'{arg}': give BASE or BASE,VARIANT with BASE one of {', '.join(HUB)} and VARIANT one "
            f"of {', '.join(VARIANTS)}"
        )
    table, experts, layers, form = VARIANTS[variant]
    config = recipe()
    config.base.path = HUB[base]
    config.base.dtype = "bfloat16"
    config.data.template = "user_assistant"
    config.data.languages = table
    config.data.length = 4096
    config.data.global_batch = 32
    config.data.shards = 32
    config.data.sources.medical = source("medical.jsonl")
    config.stages.order = ("mixture",)
    config.stages.mixture = mixture(experts, layers, form, mixture={"medical": 1.0}, epochs=1.0)
    return config
