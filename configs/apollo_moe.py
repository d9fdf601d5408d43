"""Apollo-MoE (arXiv 2410.10626): language experts in the last layers, fifty languages.

  medmoe train --config=configs/apollo_moe.py:qwen2-0.5b --workdir=runs/apollo_moe \\
      --config.data.sources.medical.path=medical.jsonl

The argument is BASE, then in any order and each after a comma: a VARIANT, `lora`,
`function_preserving`. BASE is a key of HUB in medmoe_jax/base/presets.py.

| variant | experts | layers | a token's network |
|---|---|---|---|
| `language_family` (default; the released form) | 7 families | last 2 | two of the experts |
| `post_moe` | 12 major languages | last 2 | two of the experts |
| `hybrid` | 12 major languages | all | two of the experts |
| `language_specific` | 12 major languages | last 2 | the dense one and one expert |

Every expert is at first a copy of the dense feed-forward network, and everything trains. A router
picks the experts. In training the expert of the token's language is always among the picks; at
inference it is left to the router. --config.stages.mixture.banks.experts.forcing=off never forces,
`always` forces at inference too, by --language or the language detected.

The published weights of two picks do not sum to one, so the copies do not keep the dense model's
function at first; with `function_preserving` they do. In `language_specific` the expert stands
beside the dense network, which all languages share, and adds nothing at first; that, and its weight
being the router's probability (so that the router learns), is our reconstruction.

`lora` is this project's own: the base stays frozen, and the experts are low-rank factors inside its
networks, whose weights sum to one (in `language_specific`, factors beside each linear layer).

Rows carry their "language", or it is detected; the table of languages and experts is data that a
user may replace: --config.data.languages=FILE (docs/languages.md). The experts depend on the token,
so they do not fold into a dense checkpoint.

Hardware: meant for TPU slices; the 0.5B base with all weights trained in float32 asks for a v5e-8.
"""

from ml_collections import ConfigDict

from medmoe_jax.base.presets import HUB
from medmoe_jax.training.config import bank, recipe, source, stage

LAST = (-2, None)
EVERY = (None, None)
# Variant: the table of languages, its experts, the layers with experts, the forms of an expert in
# full and low-rank, a token's picks.
VARIANTS = {
    "language_family": ("families", 7, LAST, ("ffn", "ffn_lora"), 2),
    "post_moe": ("major", 12, LAST, ("ffn", "ffn_lora"), 2),
    "hybrid": ("major", 12, EVERY, ("ffn", "ffn_lora"), 2),
    "language_specific": ("major", 12, LAST, ("ffn_beside", "lora"), 1),
}
WORDS = ("lora", "function_preserving")


def language_experts(
    experts: int,
    layers: tuple,
    form: str,
    *,
    top_k: int = 2,
    renormalise: bool | None = None,
    **fields,
) -> ConfigDict:
    """The only stage: language experts, and all of the base unless they are low-rank.

    A frozen base cannot make up for weights that do not sum to one: low-rank experts inside its
    networks have theirs renormalised, whole ones do not, unless `renormalise` says otherwise.
    """
    if renormalise is None:
        renormalise = form == "ffn_lora"
    banks = {
        "experts": bank(
            sites=("mlp.*",), layers=layers, form=form, experts=experts, gate="language",
            top_k=top_k, renormalise=renormalise, router_bias=False, forcing="train",
        )
    }  # fmt: skip
    full = form in ("ffn", "ffn_beside")
    defaults = {
        "banks": banks,
        "train_base": ("*",) if full else (),
        "learning_rate": 1e-4 if full else 2e-4,
        "weight_decay": 0.1 if full else 0.0,
    }
    return stage(**{**defaults, **fields})


def get_config(arg: str = "qwen2-0.5b") -> ConfigDict:
    """The recipe for a base, a variant and its form."""
    base, *words = arg.split(",")
    variants = [word for word in words if word in VARIANTS] or ["language_family"]
    known = {*VARIANTS, *WORDS}
    if base not in HUB or len(variants) > 1 or not known.issuperset(words):
        raise ValueError(
            f"'{arg}': give BASE[,VARIANT][,lora][,function_preserving] with BASE one of "
            f"{', '.join(HUB)} and VARIANT one of {', '.join(VARIANTS)}"
        )
    table, experts, layers, (full, low_rank), top_k = VARIANTS[variants[0]]
    if "function_preserving" in words and top_k == 1:
        raise ValueError(
            f"'{arg}': {variants[0]} keeps the dense model's function as it is; leave out "
            "function_preserving"
        )
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
    config.stages.mixture = language_experts(
        experts,
        layers,
        low_rank if "lora" in words else full,
        top_k=top_k,
        renormalise=True if "function_preserving" in words else None,
        mixture={"medical": 1.0},
        epochs=1.0,
    )
    return config
